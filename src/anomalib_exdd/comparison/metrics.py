"""Metrics of a run, by Anomalib's own classes, on raw scores."""

from types import SimpleNamespace
from typing import Any

import torch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1AdaptiveThreshold, F1Max
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MAP_SIDE = 128
"""Longest side of the maps that are kept, in pixels."""
_FIELDS = ["scores", "labels"]


def image_metrics(scores_N: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return image AUROC, image AP and best F1; nothing if the images are all normal or all defective.

    Args:
        scores_N: Raw image scores, float32.
        labels_N: 1 for defective images.
    """
    if len(labels_N.unique()) < 2:
        return {}
    metrics: dict[str, Any] = {"image_AUROC": AUROC, "image_AP": AUPR, "image_F1": F1Max}
    return {name: _compute(metric, unit_interval(scores_N), labels_N) for name, metric in metrics.items()}


def pixel_metrics(maps_NHW: Tensor, masks_NHW: Tensor) -> dict[str, float]:
    """Return pixel AUROC, pixel AP and AUPRO; nothing if no pixel, or every one, is defective.

    Args:
        maps_NHW: Raw anomaly maps, float32.
        masks_NHW: Defects, bool.
    """
    if not masks_NHW.any() or masks_NHW.all():
        return {}
    scaled, masks = unit_interval(maps_NHW), masks_NHW.long()
    metrics: dict[str, Any] = {"pixel_AUROC": AUROC, "pixel_AP": AUPR}
    found = {name: _compute(metric, scaled, masks) for name, metric in metrics.items()}
    return {**found, "AUPRO": _compute(AUPRO, maps_NHW, masks_NHW.float())}


def best_f1_threshold(scores_N: Tensor, labels_N: Tensor) -> float:
    """Return the score from which Anomalib calls an image defective: best F1 on validation images.

    Args:
        scores_N: Raw scores of validation images, float32.
        labels_N: 1 for defective images.
    """
    return _compute(F1AdaptiveThreshold, scores_N, labels_N)


def unit_interval(scores: Tensor) -> Tensor:
    """Bring scores to [0, 1] in the same order, ties staying ties and different scores staying different.

    The ranking metrics of torchmetrics put every batch with a score outside [0, 1] through a sigmoid, which is 1 in
    float32 for all scores above 17: distances would be tied. The bits of a float, read as an integer, are in the order
    of the floats.

    Args:
        scores: float32, any shape.

    Returns:
        float64, the same shape.
    """
    bits = scores.contiguous().view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (ordered + 2**31).double() / 2**32


def small_maps(maps_NHW: Tensor) -> Tensor:
    """Shrink maps for pictures, a pixel being the highest of those it stands for, so that thin defects stay visible.

    Args:
        maps_NHW: float32.

    Returns:
        float16, finite, the longest side at most 128 pixels.
    """
    height, width = maps_NHW.shape[-2:]
    scale = min(1.0, MAP_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    pooled = F.adaptive_max_pool2d(maps_NHW[:, None], size)[:, 0]
    limit = torch.finfo(torch.float16).max
    return pooled.clamp(-limit, limit).half()


def _compute(metric_class: Any, scores: Tensor, labels: Tensor) -> float:
    metric = metric_class(fields=_FIELDS)
    metric.update(SimpleNamespace(scores=scores, labels=labels))
    return float(metric.compute())
