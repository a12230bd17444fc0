"""What every subcommand here is."""

from jsonargparse import ArgumentParser, Namespace


class Subcommand:
    """A subcommand as Anomalib's registry wants it: a class with a parser and a method that runs."""

    @staticmethod
    def get_parser() -> ArgumentParser:
        """Return the parser of the subcommand's arguments."""
        raise NotImplementedError

    def run(self, config: Namespace) -> None:
        """Run the subcommand, and end with one line where its input is wrong."""
        try:
            self.call(config)
        except (ValueError, FileNotFoundError) as error:
            msg = f"Error: {error}"
            raise SystemExit(msg) from error

    def call(self, config: Namespace) -> None:
        """Do the work."""
        raise NotImplementedError
