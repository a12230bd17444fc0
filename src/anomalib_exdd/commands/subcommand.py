"""What every subcommand here is."""

from typing import ClassVar

from jsonargparse import ArgumentParser, Namespace


class Subcommand:
    """A subcommand as Anomalib's registry wants it: a class with a parser and a method that runs."""

    kept: ClassVar[str] = ""
    """What is left of an interrupted run, for a subcommand that goes on from there when it is called again."""

    @classmethod
    def get_parser(cls) -> ArgumentParser:
        """Return the parser of the subcommand's arguments; the docstring of the class is its description."""
        parser = ArgumentParser(description=cls.__doc__)
        cls.add_arguments(parser)
        return parser

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments to a parser."""

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
