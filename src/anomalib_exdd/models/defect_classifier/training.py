"""How the classifier is trained: the published settings, and the loss, with the rare class weighted up."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.models.settings import check, check_at_least, check_choice, check_image_size

PresetName = Literal["in_and_out", "diag"]
OptimizerName = Literal["sgd", "adam"]
PositiveWeight = float | Literal["balanced"]


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


def label_loss(logits: Tensor, labels: Tensor, weights: tuple[float, float]) -> Tensor:
    """Return the mean binary cross-entropy of images, float32; weights are those of a normal and a defective one."""
    labels = labels.bool()
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
    return (losses * torch.where(labels, weights[1], weights[0])).mean()


def label_weights(normal: int, defective: int, pos_weight: PositiveWeight) -> tuple[float, float]:
    """Return the weights of a normal and of a defective image, whose mean over so many training images is 1.

    "balanced" is scikit-learn's rule of that name, ``n / (2 n_class)``: both kinds count the same together.

    Example:
        >>> label_weights(30, 10, "balanced"), label_weights(30, 10, 1.0)
        ((0.6666666666666666, 2.0), (1.0, 1.0))
    """
    if normal == 0 or defective == 0:
        kind = "defective" if defective == 0 else "normal"
        msg = f"The training images have no {kind} one. Add some; defects may be made by `anomalib synthesize`."
        raise ValueError(msg)
    ratio = normal / defective if pos_weight == "balanced" else float(pos_weight)
    scale = (normal + defective) / (normal + ratio * defective)
    return scale, ratio * scale
