"""Make this package's classes known to Anomalib under their plain names.

Anomalib looks classes up in three ways: among the subclasses of its base classes (importing ours is enough), as
attributes of `anomalib.models` and `anomalib.data` (`class_path: ExDD`), and below the packages of a list of allowed
ones (`class_path: anomalib_exdd.ExDD`). `register` serves all three, any number of times.
"""

import warnings
from importlib import import_module
from types import ModuleType

PACKAGE = "anomalib_exdd"

# Class -> the file it is defined in. Not the package around the file: when a user's first import is that package, it
# is this registration that finishes before the package's own names exist.
MODELS = {
    "DefectClassifier": "anomalib_exdd.models.defect_classifier.lightning_model",
    "ExDD": "anomalib_exdd.models.exdd.lightning_model",
}
DATAMODULES = {
    "DefectFolder": "anomalib_exdd.data.folder",
    "KSDD2": "anomalib_exdd.data.ksdd2",
    "SurfaceSample": "anomalib_exdd.data.surfaces",
    "SyntheticDefects": "anomalib_exdd.data.synthetic_defects",
}
# Subcommand -> the file its class is defined in, and the class.
SUBCOMMANDS = {
    "compare": ("anomalib_exdd.comparison.command", "Compare"),
    "drift": ("anomalib_exdd.station.command", "DriftCommand"),
    "info": ("anomalib_exdd.commands.banks", "Info"),
    "teach": ("anomalib_exdd.commands.banks", "Teach"),
    "forget": ("anomalib_exdd.commands.banks", "Forget"),
    "review": ("anomalib_exdd.station.command", "ReviewCommand"),
    "synthesize": ("anomalib_exdd.synthesis.command", "Synthesize"),
}


def register() -> None:
    """Register everything that this package adds to Anomalib; safe to call again."""
    register_models()
    register_data()
    register_subcommands()


def register_models() -> None:
    """Add the models to `anomalib.models`, and this package to those `get_model` may import from."""
    anomalib_models = import_module("anomalib.models")
    anomalib_models.ALLOWED_MODULES.add(PACKAGE)
    _add_classes(anomalib_models, MODELS)


def register_data() -> None:
    """Add the data modules to `anomalib.data`."""
    _add_classes(import_module("anomalib.data"), DATAMODULES)


def register_subcommands() -> None:
    """Add the subcommands to those of Anomalib's command line, where it has one."""
    registry = import_module("anomalib.cli.pipelines").PIPELINE_REGISTRY
    if registry is None:  # Anomalib lacks what its own pipelines need
        return
    for name, (home, class_name) in SUBCOMMANDS.items():
        registry.setdefault(name, getattr(import_module(home), class_name))


def _add_classes(module: ModuleType, homes: dict[str, str]) -> None:
    """Add our classes to Anomalib's module, unless it has one of that name.

    In that case ours is not even imported: Anomalib's command line refuses a plain name that two classes bear.
    """
    for name, home in homes.items():
        present = getattr(module, name, None)
        if present is None:
            setattr(module, name, getattr(import_module(home), name))
        elif not present.__module__.startswith(f"{PACKAGE}."):
            warnings.warn(
                f"{module.__name__} has a class {name} of its own ({present.__module__}), which is kept. "
                f"Use `class_path: {PACKAGE}.{name}` for the one of anomalib-exdd.",
                stacklevel=2,
            )
