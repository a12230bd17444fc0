"""Arguments of a model that trains in a second."""

from typing import Any

SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "pre_trained": False,
    "image_size": (96, 64),
    "negative_ratio": 0.1,
    "negative_minimum": 20,
    "positive_minimum": 20,
}
