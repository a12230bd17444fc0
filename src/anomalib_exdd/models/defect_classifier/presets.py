"""The published training settings, and those that are in force for a model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from anomalib_exdd.models.settings import check_at_least, check_choice, check_image_size

PresetName = Literal["in_and_out", "diag"]
OptimizerName = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Preset:
    """Settings of a training.

    Attributes:
        image_size: Height and width that images are resized to.
        optimizer: Name of the optimizer.
        learning_rate: Its learning rate, constant.
        momentum: Its momentum, if it is SGD.
        weight_decay: Its weight decay.
        batch_size: Images per training batch; the data module decides, the preset says what was published.
        max_epochs: Passes over the training images at most.
    """

    image_size: tuple[int, int]
    optimizer: OptimizerName
    learning_rate: float
    momentum: float
    weight_decay: float
    batch_size: int
    max_epochs: int


PRESETS: dict[PresetName, Preset] = {
    "in_and_out": Preset((600, 200), "sgd", 0.01, 0.0, 0.0, batch_size=5, max_epochs=50),  # arXiv:2406.00501
    "diag": Preset((704, 256), "adam", 1e-4, 0.0, 0.0, batch_size=32, max_epochs=50),  # arXiv:2407.03961
}


def in_force(arguments: Mapping[str, Any]) -> Preset:
    """Complete a preset by the arguments that were given instead of its values.

    Args:
        arguments: Name of the ``preset``, and values by the names of :class:`Preset`; None where the preset decides.

    Raises:
        ValueError: If a value is out of its range.
    """
    check_choice("preset", arguments["preset"], get_args(PresetName))
    preset = PRESETS[arguments["preset"]]
    given = {each.name: arguments.get(each.name) for each in fields(Preset)}
    values = {name: getattr(preset, name) if value is None else value for name, value in given.items()}
    settings = Preset(**{**values, "image_size": tuple(values["image_size"])})
    check_image_size(settings.image_size)
    check_choice("optimizer", settings.optimizer, get_args(OptimizerName))
    check_at_least("batch_size", settings.batch_size, 1)
    if settings.learning_rate <= 0:
        msg = f"Argument `learning_rate` has to be positive, but got {settings.learning_rate}."
        raise ValueError(msg)
    if settings.weight_decay < 0:
        msg = f"Argument `weight_decay` has to be at least 0, but got {settings.weight_decay}."
        raise ValueError(msg)
    if not 0 <= settings.momentum < 1:
        msg = f"Argument `momentum` has to be in [0, 1), but got {settings.momentum}."
        raise ValueError(msg)
    if settings.momentum and settings.optimizer != "sgd":
        msg = f"Argument `momentum` is for the optimizer sgd, but got {settings.momentum} with {settings.optimizer}."
        raise ValueError(msg)
    return settings
