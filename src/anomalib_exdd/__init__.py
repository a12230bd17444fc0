"""ExDD for Anomalib: dual memory banks of normal and defective patches that find and locate surface defects.

Importing this package costs next to nothing: every name below is loaded on first use, because the package is also
imported at the start of every Python process of its environment (see `anomalib_exdd._autoload`).
"""

TYPE_CHECKING = False  # as in `typing`, whose import alone would cost more than all of ours at start-up
if TYPE_CHECKING:
    from anomalib_exdd.comparison.command import compare
    from anomalib_exdd.data import KSDD2, DefectFolder, SurfaceSample, SyntheticDefects
    from anomalib_exdd.models.defect_classifier.lightning_model import DefectClassifier
    from anomalib_exdd.models.exdd.lightning_model import ExDD
    from anomalib_exdd.plugin import register

    __version__: str

__all__ = [
    "KSDD2",
    "DefectClassifier",
    "DefectFolder",
    "ExDD",
    "SurfaceSample",
    "SyntheticDefects",
    "__version__",
    "compare",
    "register",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use (PEP 562) and keep it."""
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        value: object = version("anomalib-exdd")
    else:
        from importlib import import_module  # noqa: PLC0415

        from anomalib_exdd import plugin  # noqa: PLC0415

        homes = {"compare": "anomalib_exdd.comparison.command", "register": plugin.__name__}
        homes |= plugin.CLASSES["anomalib.models"] | plugin.CLASSES["anomalib.data"]
        value = getattr(import_module(homes[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Show the public names whether or not they have been loaded."""
    return sorted({*globals(), *__all__})
