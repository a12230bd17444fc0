"""The methods of a comparison: as equal as their models allow, with notes on the differences; and their models."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from pandas import json_normalize
from torch import nn

from anomalib_exdd.models.defect_classifier import DefectClassifier
from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.exdd.features import PatchFeatureExtractor
from anomalib_exdd.models.transforms import crops_of

from .config import ComparisonConfig, MethodConfig, find_class, instantiate, resolve_arguments
from .data import resolve_data
from .results import Method

_COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}
_TRAINER_ARGUMENTS = {
    "accelerator", "barebones", "default_root_dir", "devices", "enable_progress_bar", "fast_dev_run", "logger",
    "num_nodes", "strategy",
}  # fmt: skip
"""Arguments of models and of the trainer that the comparison sets itself."""


@dataclass(frozen=True)
class ResolvedMethod:
    """A method as it will run."""

    config: MethodConfig
    described: Method  # as the results have it: with all arguments of its model but the seed of the run
    takes_seed: bool  # whether the model takes the seed of the run
    image_size: tuple[int, int] | None  # height and width of its input; None for the model's own
    weights: str  # file of its backbone's weights; empty where the model finds them itself
    uses_defects: bool  # whether it sees defective training images

    def run_settings(self, comparison: ComparisonConfig, seed: int) -> dict[str, Any]:
        """Return everything that a run depends on, except for the content of the data and the versions."""
        seeded = {"seed": seed} if self.takes_seed else {}
        owner = f"Argument `data` of method {self.config.name!r}"
        return {
            "method": self.config.name,
            "seed": seed,
            "model": {"class_path": self.config.class_path, "init_args": {**self.described.arguments, **seeded}},
            "trainer": dict(self.config.trainer),
            "data": resolve_data(comparison.data, self.config.data, seed, owner),
            "image_size": None if self.image_size is None else list(self.image_size),
            "weights": self.weights,
            "uses_defects": self.uses_defects,
            "quick": comparison.quick,
            "accelerator": comparison.accelerator,
        }


def resolve_method(method: MethodConfig, comparison: ComparisonConfig) -> ResolvedMethod:
    """Give a method the settings that all methods share, where its model has an argument for them.

    Raises:
        ValueError: If the model is unknown or does not take an argument or a value.
    """
    owner = f"Method {method.name!r}"
    found = find_class(method.class_path, AnomalibModule)
    for name, ours in (("init_args", _COMPONENTS), ("trainer", _TRAINER_ARGUMENTS)):
        if forbidden := sorted(ours & getattr(method, name).keys()):
            msg = f"{owner}: `{name}` cannot give `{forbidden[0]}`, as the comparison sets it (see also `image_size`)."
            raise ValueError(msg)
    resolve_arguments(Trainer, method.trainer, f"Argument `trainer` of method {method.name!r}")
    parameters = inspect.signature(found).parameters
    size = method.image_size or comparison.image_size
    shared = {"backbone": comparison.backbone, "layers": comparison.layers, "image_size": size and list(size)}
    given = {name: value for name, value in shared.items() if value is not None and name in parameters}
    given |= method.init_args
    arguments = resolve_arguments(found, given, f"{owner}, {found.__name__}", _COMPONENTS)
    takes_seed = "seed" in parameters and "seed" not in given
    if takes_seed:
        arguments.pop("seed")
    if arguments.get("image_size") is not None:
        size = (arguments["image_size"][0], arguments["image_size"][1])
    weights, weight_notes = _weights(arguments, comparison)
    uses_defects = method.uses_defects
    if uses_defects is None:
        uses_defects = issubclass(found, ExDD | DefectClassifier) or arguments.get("supervised") is True
    notes = [*method.notes, *_size_notes(found, size, comparison), *weight_notes]
    notes += _data_notes(found, method, uses_defects=uses_defects)
    published = method.published, method.published_source
    described = Method(method.name, method.class_path, arguments, notes, *published)
    return ResolvedMethod(method, described, takes_seed, size, weights, uses_defects)


def build_model(run: Mapping[str, Any]) -> AnomalibModule:
    """Build a model by :meth:`.ResolvedMethod.run_settings`: raw scores, without metrics and pictures of its own.

    Raises:
        ValueError: If the weights do not fit.
    """
    found = find_class(run["model"]["class_path"], AnomalibModule)
    arguments = dict(run["model"]["init_args"])
    for name in ("dtd_dir", "imagenet_dir"):
        if arguments.get(name) is not None:
            with suppress(OSError):  # a failed download leaves an empty folder, which Anomalib takes for a complete one
                Path(arguments[name]).rmdir()
    components: dict[str, Any] = {
        # It changes nothing, because Anomalib's normalisation clips scores, but keeps a threshold that the model finds.
        "post_processor": PostProcessor(
            enable_normalization=False, enable_thresholding=False, enable_threshold_matching=False
        ),
        "evaluator": False,
        "visualizer": False,
    }
    if run["image_size"] is not None:
        components["pre_processor"] = _pre_processor(found, run["image_size"])
    weights = run["weights"]
    if not weights:
        return instantiate(found, arguments, **components)
    if "weights" in inspect.signature(found).parameters:
        return instantiate(found, {**arguments, "weights": weights}, **components)
    with _timm_without_downloads() as wanted:
        model = instantiate(found, arguments, **components)
    extractors = [each for each in model.modules() if isinstance(each, TimmFeatureExtractor)]
    backbones = [each for each in extractors if each.feature_extractor in wanted]  # a student starts untrained
    if not backbones:
        msg = f"{found.__name__} has no timm backbone that {weights} could be loaded into."
        raise ValueError(msg)
    for each in backbones:
        ours = PatchFeatureExtractor(str(each.backbone), [str(layer) for layer in each.layers], weights=Path(weights))
        ours.load_weights()
        each.load_state_dict(ours.backbone.state_dict())
    return model


def input_size(processor: PreProcessor) -> tuple[int, int] | None:
    """Return the height and width that a pre-processor resizes to; None if it does not."""
    if processor.transform is None:
        return None
    shape = processor.transform(torch.zeros(1, 3, 1, 1)).shape
    return None if shape[-2:] == (1, 1) else (int(shape[-2]), int(shape[-1]))


def _pre_processor(found: type[AnomalibModule], size: tuple[int, int] | None) -> PreProcessor:
    configure: Any = found.configure_pre_processor
    if size is None or "image_size" not in inspect.signature(configure).parameters:
        return configure()
    return configure(image_size=tuple(size))


def _size_notes(found: type[AnomalibModule], size: tuple[int, int] | None, comparison: ComparisonConfig) -> list[str]:
    processor = _pre_processor(found, size)
    actual, wanted = input_size(processor), comparison.image_size
    notes = []
    if wanted is not None and actual is not None and actual != tuple(wanted):
        notes.append(f"Input {actual[0]} x {actual[1]} instead of {wanted[0]} x {wanted[1]}.")
    if crops := crops_of(processor.transform):
        notes.append(f"Crops images ({', '.join(map(str, crops))}); pixel metrics are of what is left.")
    return notes


def _data_notes(found: type[AnomalibModule], method: MethodConfig, *, uses_defects: bool) -> list[str]:
    notes = []
    if not uses_defects:
        notes.append("Without the defective training images.")
    elif issubclass(found, DefectClassifier):
        notes.append("With the defective training images, without their masks.")
    elif not issubclass(found, ExDD):
        notes.append("With the defective training images and their masks.")
    if method.data:
        (changed,) = json_normalize(method.data).to_dict("records")  # nested names joined by dots
        words = [f"{name.rpartition('init_args.')[2]} {value}" for name, value in changed.items()]
        notes.append(f"Data with {', '.join(words)}.")
    return notes


def _weights(arguments: Mapping[str, Any], comparison: ComparisonConfig) -> tuple[str, list[str]]:
    """Return the file of the backbone's weights (empty for the model's own), and notes."""
    if "backbone" not in arguments:
        return "", ["Network of its own, without the shared backbone."] if comparison.backbone else []
    used, notes = str(arguments["backbone"]), []
    if comparison.backbone is not None and used != comparison.backbone:
        notes.append(f"Backbone {used} instead of {comparison.backbone}.")
    if arguments.get("weights") is not None:
        return "", [*notes, f"Weights of {Path(arguments['weights']).name}."]
    if arguments.get("pre_trained") is False and used != "filter_bank":
        return "", [*notes, "Backbone without trained weights."]
    if comparison.weights is None or used == "filter_bank":
        return "", notes
    if used.partition(".")[0] != str(comparison.backbone).partition(".")[0]:
        return "", [*notes, f"timm's weights, because {comparison.weights.name} is of {comparison.backbone}."]
    return str(comparison.weights), notes


@contextmanager
def _timm_without_downloads() -> Iterator[list[nn.Module]]:
    """Let models be built without timm's pretrained weights; yield the networks that were to have them."""
    create, wanted = timm.create_model, []

    def untrained(*args: Any, **kwargs: Any) -> nn.Module:
        network = create(*args, **{**kwargs, "pretrained": False})
        if kwargs.get("pretrained"):
            wanted.append(network)
        return network

    timm.create_model = untrained
    try:
        yield wanted
    finally:
        timm.create_model = create
