"""The published training settings, and how a model's arguments replace them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from anomalib_exdd.models.settings import check_at_least, check_choice, check_image_size

PresetName = Literal["in_and_out", "diag"]
OptimizerName = Literal["sgd", "adam"]


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training."""

    image_size: tuple[int, int]  # height and width that images are resized to
    optimizer: OptimizerName
    learning_rate: float  # constant
    momentum: float  # of SGD
    weight_decay: float
    batch_size: int  # as published; the data module decides
    max_epochs: int


PRESETS: dict[PresetName, TrainingSettings] = {
    "in_and_out": TrainingSettings((600, 200), "sgd", 0.01, 0.0, 0.0, batch_size=5, max_epochs=50),  # arXiv:2406.00501
    "diag": TrainingSettings((704, 256), "adam", 1e-4, 0.0, 0.0, batch_size=32, max_epochs=50),  # arXiv:2407.03961
}


def training_settings(arguments: Mapping[str, Any]) -> TrainingSettings:
    """Replace a preset's values by the arguments that were given.

    Args:
        arguments: Name of the ``preset``, and values by the names of :class:`TrainingSettings`; None for the preset's.

    Raises:
        ValueError: If a value is out of its range.
    """
    check_choice("preset", arguments["preset"], get_args(PresetName))
    values = dict(vars(PRESETS[arguments["preset"]]))
    values |= {name: arguments[name] for name in values if arguments.get(name) is not None}
    settings = TrainingSettings(**{**values, "image_size": tuple(values["image_size"])})
    check_image_size(settings.image_size)
    check_choice("optimizer", settings.optimizer, get_args(OptimizerName))
    check_at_least("weight_decay", settings.weight_decay, 0)
    if settings.learning_rate <= 0:
        msg = f"Argument `learning_rate` has to be positive, but got {settings.learning_rate}."
        raise ValueError(msg)
    if not 0 <= settings.momentum < 1:
        msg = f"Argument `momentum` has to be in [0, 1), but got {settings.momentum}."
        raise ValueError(msg)
    if settings.momentum and settings.optimizer != "sgd":
        msg = f"Argument `momentum` is for the optimizer sgd, but got {settings.momentum} with {settings.optimizer}."
        raise ValueError(msg)
    return settings
