"""The published training settings, and how a model's arguments replace them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from anomalib_exdd.models.settings import check, check_at_least, check_choice, check_image_size

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
    """Replace a preset's values by the arguments that are not None; a ValueError if one is out of its range."""
    check_choice("preset", arguments["preset"], get_args(PresetName))
    values = dict(vars(PRESETS[arguments["preset"]]))
    values |= {name: arguments[name] for name in values if arguments.get(name) is not None}
    settings = TrainingSettings(**{**values, "image_size": tuple(values["image_size"])})
    check_image_size(settings.image_size)
    check_choice("optimizer", settings.optimizer, get_args(OptimizerName))
    check_at_least("weight_decay", settings.weight_decay, 0)
    check("learning_rate", settings.learning_rate, "positive", fits=settings.learning_rate > 0)
    check("momentum", settings.momentum, "in [0, 1)", fits=0 <= settings.momentum < 1)
    check("momentum", settings.momentum, "0 without SGD", fits=settings.optimizer == "sgd" or not settings.momentum)
    return settings
