"""Make this package's classes known to Anomalib under their plain names.

Anomalib looks classes up in three ways: among the subclasses of its base classes (importing ours is enough), as
attributes of `anomalib.models` and `anomalib.data` (`class_path: ExDD`), and below the packages of a list of allowed
ones (`class_path: anomalib_exdd.ExDD`). `register` serves all three, any number of times.
"""

import warnings
from importlib import import_module

PACKAGE = "anomalib_exdd"

# Anomalib's module -> class -> the file it is defined in. Not the package around the file: when a user's first import
# is that package, it is this registration that finishes before the package's own names exist.
CLASSES = {
    "anomalib.models": {
        "DefectClassifier": "anomalib_exdd.models.defect_classifier.lightning_model",
        "ExDD": "anomalib_exdd.models.exdd.lightning_model",
    },
    "anomalib.data": {
        "DefectFolder": "anomalib_exdd.data.folder",
        "KSDD2": "anomalib_exdd.data.ksdd2",
        "SurfaceSample": "anomalib_exdd.data.surfaces",
        "SyntheticDefects": "anomalib_exdd.data.synthetic_defects",
    },
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
    for name in CLASSES:
        register_classes(name)
    register_subcommands()


def register_classes(anomalib_module: str) -> None:
    """Add our classes to one of Anomalib's modules, unless it has one of that name.

    In that case ours is not even imported: Anomalib's command line refuses a plain name that two classes bear.
    """
    module = import_module(anomalib_module)
    if anomalib_module == "anomalib.models":
        module.ALLOWED_MODULES.add(PACKAGE)  # those that `get_model` may import from
    for name, home in CLASSES[anomalib_module].items():
        present = getattr(module, name, None)
        if present is None:
            setattr(module, name, getattr(import_module(home), name))
        elif not present.__module__.startswith(f"{PACKAGE}."):
            warnings.warn(
                f"{module.__name__} has a class {name} of its own ({present.__module__}), which is kept. "
                f"Use `class_path: {PACKAGE}.{name}` for the one of anomalib-exdd.",
                stacklevel=1,
            )


def register_subcommands() -> None:
    """Add the subcommands to those of Anomalib's command line, where it has one."""
    registry = import_module("anomalib.cli.pipelines").PIPELINE_REGISTRY
    if registry is None:  # Anomalib lacks what its own pipelines need
        return
    for name, (home, class_name) in SUBCOMMANDS.items():
        registry.setdefault(name, getattr(import_module(home), class_name))
