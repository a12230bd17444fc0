"""`anomalib-exdd`: Anomalib's own command line with this package registered for certain.

The `anomalib` command knows this package through the hook of `anomalib_exdd._autoload`. This one needs no hook: it is
for interpreters that skip start-up files and for environments that opt out of them.
"""


def main() -> None:
    """Register with Anomalib, then run its command line with the arguments of this process."""
    # Here, not above: whoever imports this module to look at it should not wait for torch.
    from anomalib.cli.cli import main as anomalib_main  # noqa: PLC0415

    from anomalib_exdd.plugin import register  # noqa: PLC0415

    register()
    anomalib_main()
