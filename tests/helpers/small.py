"""Arguments and a batch for a model that trains in a second."""

from typing import Any

import torch
from anomalib.data import ImageBatch
from torch import Tensor

SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "pre_trained": False,
    "image_size": (96, 64),
    "negative_ratio": 0.1,
    "negative_minimum": 20,
    "positive_minimum": 20,
}


def batch(labels: list[int], masks: Tensor | None) -> ImageBatch:
    count = len(labels)
    images = torch.rand(count, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    names = [f"image{number}.png" for number in range(count)]
    return ImageBatch(image=images, gt_label=torch.tensor(labels), gt_mask=masks, image_path=names)
