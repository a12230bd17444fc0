"""What every subcommand here is."""

from typing import ClassVar

from jsonargparse import ArgumentParser, Namespace


class Subcommand:
    """A subcommand as Anomalib's registry wants it: a class with a parser and a method that runs."""

    kept: ClassVar[str] = ""
    """What is left of an interrupted run, for a subcommand that goes on from there when it is called again."""

    @staticmethod
    def get_parser() -> ArgumentParser:
        """Return the parser of the subcommand's arguments."""
        raise NotImplementedError

    def run(self, config: Namespace) -> None:
        """Run the subcommand; end with one line where its input is wrong, or where a longer run cannot go on."""
        try:
            self.call(config)
        except (ValueError, FileNotFoundError) as error:
            msg = f"Error: {error}"
            raise SystemExit(msg) from error
        except (RuntimeError, OSError) as error:  # a missing extra, no memory, no network, no space on the disk
            if not self.kept:
                raise
            msg = f"Error: {' '.join(str(error).split())} ({self.kept})"
            raise SystemExit(msg) from error

    def call(self, config: Namespace) -> None:
        """Do the work."""
        raise NotImplementedError
