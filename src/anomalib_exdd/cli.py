"""`anomalib-exdd`: Anomalib's own command line with this package registered.

The `anomalib` command knows this package through the hook of `anomalib_exdd._autoload`. This one needs no hook: it is
for interpreters that skip start-up files and for environments that opt out of them. It also takes paths with letters
beyond ASCII, which Anomalib refuses as non-printable.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any
from unicodedata import category


def main() -> None:
    """Register with Anomalib, then run its command line with the arguments of this process."""
    # Here, not above: whoever imports this module to look at it should not wait for torch.
    from anomalib.cli.cli import main as anomalib_main  # noqa: PLC0415

    from anomalib_exdd.plugin import register  # noqa: PLC0415

    register()
    with suppress(ModuleNotFoundError):  # where Anomalib keeps the check is nothing that it promises
        anomalib_path: Any = import_module("anomalib.data.utils.path")
        anomalib_path.contains_non_printable_characters = has_control_characters
    anomalib_main()


def has_control_characters(path: object) -> bool:
    """Tell whether a path has characters that Anomalib means to refuse."""
    return any(category(letter) == "Cc" for letter in str(path))
