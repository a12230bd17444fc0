"""Models of a comparison, built from the settings of a run."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.post_processing import PostProcessor

from anomalib_exdd.models.exdd.features import PatchFeatureExtractor

from .instantiation import build
from .methods import model_class, pre_processor

_DOWNLOADS = ("dtd_dir", "imagenet_dir")  # arguments that name a folder to which Anomalib downloads


def build_model(run: Mapping[str, Any]) -> AnomalibModule:
    """Build the model of a run: raw scores, no metrics or pictures of its own.

    Args:
        run: What :meth:`.PreparedMethod.run_settings` returned.

    Raises:
        ValueError: If the weights do not fit.
    """
    found = model_class(run["model"]["class_path"])
    arguments = dict(run["model"]["init_args"])
    for name in _DOWNLOADS:
        _forget_failed_download(arguments.get(name))
    components: dict[str, Any] = {
        # It changes nothing, because Anomalib's normalisation clips scores: it keeps the threshold of a model that
        # finds one itself.
        "post_processor": PostProcessor(
            enable_normalization=False, enable_thresholding=False, enable_threshold_matching=False
        ),
        "evaluator": False,
        "visualizer": False,
    }
    if run["image_size"] is not None:
        components["pre_processor"] = pre_processor(found, run["image_size"])
    parameters = inspect.signature(found).parameters
    weights = run["weights"]
    if not weights or "weights" in parameters:
        if weights:
            arguments["weights"] = weights
        return build(found, arguments, **components)
    if "pre_trained" in arguments:
        arguments["pre_trained"] = False
    with _without_downloads():
        model = build(found, arguments, **components)
    load_backbones(model, Path(weights))
    return model


def load_backbones(model: AnomalibModule, weights: Path) -> None:
    """Load local weights into all timm backbones of a model.

    Raises:
        ValueError: If it has none, or the weights do not fit.
    """
    backbones = [each for each in model.modules() if isinstance(each, TimmFeatureExtractor)]
    if not backbones:
        msg = f"{type(model).__name__} has no timm backbone that {weights} could be loaded into."
        raise ValueError(msg)
    for each in backbones:
        ours = PatchFeatureExtractor(str(each.backbone), [str(layer) for layer in each.layers], weights=weights)
        ours.load_weights()
        each.load_state_dict(ours.backbone.state_dict())


@contextmanager
def _without_downloads() -> Iterator[None]:
    """Let models that always take timm's weights be built without them."""
    create = timm.create_model

    def untrained(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **{**kwargs, "pretrained": False})

    with mock.patch.object(timm, "create_model", untrained):
        yield


def _forget_failed_download(folder: str | None) -> None:
    """Remove an empty folder, which a failed download leaves and Anomalib would take for a complete one."""
    if folder is not None and Path(folder).is_dir() and not any(Path(folder).iterdir()):
        Path(folder).rmdir()
