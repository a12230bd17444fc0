"""What each method of a comparison gets, so that it is as fair as the models allow, and notes where it is not."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer

from anomalib_exdd.models.defect_classifier import DefectClassifier
from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.transforms import crops_of

from .classes import find_class, merge, resolve_arguments
from .data import resolve_data
from .settings import ComparisonSettings, MethodSettings

COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}
"""Arguments of models that the comparison sets itself: scores are raw, and metrics its own."""
_SET_BY_US = {
    "accelerator",
    "barebones",
    "default_root_dir",
    "devices",
    "enable_progress_bar",
    "fast_dev_run",
    "logger",
    "num_nodes",
    "strategy",
}


@dataclass(frozen=True)
class PreparedMethod:
    """A method as it will run.

    Attributes:
        settings: What was asked for.
        class_path: Class of the model.
        arguments: Its arguments, all of them but the seed of the run.
        seeded: Whether the model takes the seed of the run.
        image_size: Height and width that its pre-processor is built for; None for its own.
        weights: File of its backbone's weights; empty for those that the model takes itself.
        uses_defects: Whether it sees defective training images.
        notes: What is not the same as for the others.
    """

    settings: MethodSettings
    class_path: str
    arguments: dict[str, Any]
    seeded: bool
    image_size: tuple[int, int] | None
    weights: str
    uses_defects: bool
    notes: list[str]

    def run_settings(self, comparison: ComparisonSettings, seed: int) -> dict[str, Any]:
        """Return everything that a run of the method depends on, but the data's contents and the versions."""
        owner = f"Argument `data` of method {self.settings.name!r}"
        return {
            "method": self.settings.name,
            "seed": seed,
            "model": {
                "class_path": self.class_path,
                "init_args": {**self.arguments, **({"seed": seed} if self.seeded else {})},
            },
            "trainer": dict(self.settings.trainer),
            "data": resolve_data(comparison.data, self.settings.data, seed, owner),
            "image_size": None if self.image_size is None else list(self.image_size),
            "weights": self.weights,
            "uses_defects": self.uses_defects,
            "quick": comparison.quick,
            "accelerator": comparison.accelerator,
        }


def model_class(class_path: str) -> type[AnomalibModule]:
    """Find a model by its name."""
    return find_class(class_path, AnomalibModule, "anomalib.models")


def prepare(method: MethodSettings, comparison: ComparisonSettings) -> PreparedMethod:
    """Give a method what all methods share, where its model has an argument for it.

    Raises:
        ValueError: If the model is unknown or does not take an argument or a value.
    """
    owner = f"Method {method.name!r}"
    try:
        found = model_class(method.class_path)
    except ValueError as error:
        msg = f"{owner}: {error}"
        raise ValueError(msg) from error
    given = dict(method.init_args)
    if ours := sorted(COMPONENTS & set(given)):
        msg = f"{owner}: argument `{ours[0]}` is set by the comparison. For another input size give `image_size`."
        raise ValueError(msg)
    parameters = set(inspect.signature(found).parameters)
    size = method.image_size or comparison.image_size
    shared = {"backbone": comparison.backbone, "layers": comparison.layers, "image_size": size}
    for name, value in shared.items():
        if value is not None and name in parameters and name not in given:
            given[name] = list(value) if isinstance(value, list | tuple) else value
    seeded = "seed" in parameters and "seed" not in given
    arguments = resolve_arguments(found, given, COMPONENTS, f"{owner}, {found.__name__}")
    if seeded:
        arguments.pop("seed", None)
    weights, notes = _backbone(arguments, parameters, comparison)
    if "image_size" in arguments and arguments["image_size"] is not None:
        size = (arguments["image_size"][0], arguments["image_size"][1])
    uses_defects = _uses_defects(found, arguments) if method.uses_defects is None else method.uses_defects
    notes = [*method.notes, *_size(found, size, comparison), *notes, *_defects(found, uses_defects=uses_defects)]
    if method.data:
        changed = ", ".join(f"{name} {value}" for name, value in _flat(method.data).items())
        notes.append(f"Data with {changed}.")
    check_trainer(method)
    return PreparedMethod(method, method.class_path, arguments, seeded, size, weights, uses_defects, notes)


def pre_processor(found: type[AnomalibModule], size: tuple[int, int] | None) -> PreProcessor:
    """Build a model's own pre-processor, for an input size where it takes one."""
    configure: Any = found.configure_pre_processor
    if size is None or "image_size" not in inspect.signature(configure).parameters:
        return configure()
    return configure(image_size=tuple(size))


def input_size(processor: PreProcessor) -> tuple[int, int] | None:
    """Return the height and width that a pre-processor resizes to; None if it does not."""
    if processor.transform is None:
        return None
    shape = processor.transform(torch.zeros(1, 3, 1, 1)).shape
    return None if shape[-2:] == (1, 1) else (int(shape[-2]), int(shape[-1]))


def check_trainer(method: MethodSettings) -> None:
    """Refuse trainer arguments that do not exist, or that a comparison sets itself.

    Raises:
        ValueError: If there are such.
    """
    owner = f"Argument `trainer` of method {method.name!r}"
    if ours := sorted(_SET_BY_US & set(method.trainer)):
        msg = f"{owner} cannot give `{ours[0]}`: every run of a comparison has one device and a folder of its own."
        raise ValueError(msg)
    resolve_arguments(Trainer, method.trainer, set(), owner)


def _size(found: type[AnomalibModule], size: tuple[int, int] | None, comparison: ComparisonSettings) -> list[str]:
    processor = pre_processor(found, size)
    actual, wanted = input_size(processor), comparison.image_size
    notes = []
    if wanted is not None and actual is not None and actual != tuple(wanted):
        notes.append(f"Input {actual[0]} x {actual[1]} instead of {wanted[0]} x {wanted[1]}.")
    if crops := crops_of(processor.transform):
        notes.append(f"Crops images ({', '.join(map(str, crops))}); pixel metrics are of what is left.")
    return notes


def _backbone(
    arguments: Mapping[str, Any], parameters: set[str], comparison: ComparisonSettings
) -> tuple[str, list[str]]:
    """Return the file of the backbone's weights, and notes."""
    if "backbone" not in parameters:
        return "", ["Network of its own, without the shared backbone."] if comparison.backbone else []
    used, notes = str(arguments["backbone"]), []
    if comparison.backbone is not None and used != comparison.backbone:
        notes.append(f"Backbone {used} instead of {comparison.backbone}.")
    if arguments.get("weights") is not None:
        return "", [*notes, f"Weights of {Path(arguments['weights']).name}."]
    if arguments.get("pre_trained") is False:
        return "", [*notes, "Backbone without trained weights."] if used != "filter_bank" else notes
    if comparison.weights is None or used == "filter_bank":
        return "", notes
    if used.partition(".")[0] != str(comparison.backbone).partition(".")[0]:
        return "", [*notes, f"timm's weights, because {comparison.weights.name} is of {comparison.backbone}."]
    return str(comparison.weights), notes


def _uses_defects(found: type[AnomalibModule], arguments: Mapping[str, Any]) -> bool:
    return issubclass(found, ExDD | DefectClassifier) or arguments.get("supervised") is True


def _defects(found: type[AnomalibModule], *, uses_defects: bool) -> list[str]:
    if not uses_defects:
        return ["Without the defective training images."]
    if issubclass(found, DefectClassifier):
        return ["With the defective training images, without their masks."]
    return [] if issubclass(found, ExDD) else ["With the defective training images and their masks."]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in merge({}, settings).items():
        if isinstance(value, Mapping):
            flat |= _flat(value, "" if name == "init_args" else f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
