"""What a run measures of a trained model: predictions, metrics, nearest patches, speed and memory."""

import statistics
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.metrics import AUPR, AUPRO, AUROC, F1AdaptiveThreshold, F1Max
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.exdd.explanation import explain_image

from .environment import keep_freed_memory
from .results import ImageResult

SPEED_IMAGES = 128
"""Test images for the throughput."""
LATENCY_IMAGES = 30
"""Single images whose median time is the latency."""
EXPLAINED_IMAGES = 100
"""Normal, and defective, test images that are explained."""
MAP_SIDE = 128
"""Longest side of the maps that are kept, in pixels."""
_WARM_UP = 3


class Predictions(Callback):
    """Collects raw scores, and maps and masks if wanted, while Lightning tests a model."""

    def __init__(self, *, with_maps: bool = False) -> None:
        self.with_maps = with_maps
        self.images: list[ImageResult] = []
        self._maps: list[Tensor] = []
        self._masks: list[Tensor] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kw: Any) -> None:
        """Keep the predictions of a batch."""
        size = len(batch.image)
        scores, maps = batch.pred_score, batch.anomaly_map
        if scores is None:
            scores = maps.flatten(1).amax(dim=1)  # as Anomalib's post-processor does
        rows = zip(
            batch.image_path,
            batch.mask_path or [""] * size,
            batch.gt_label.reshape(size).long().tolist(),
            scores.detach().float().reshape(size).tolist(),
            strict=True,
        )
        self.images += [
            ImageResult(str(path), str(mask or "") if label else "", label, score) for path, mask, label, score in rows
        ]
        if self.with_maps and maps is not None:
            self._maps.append(maps.detach().float().reshape(size, *maps.shape[-2:]).cpu())
            if batch.gt_mask is not None:
                self._masks.append(batch.gt_mask.reshape(size, *batch.gt_mask.shape[-2:]).bool().cpu())

    @property
    def scores(self) -> Tensor:
        """Image scores, float32, shape (N,)."""
        return torch.tensor([image.score for image in self.images])

    @property
    def labels(self) -> Tensor:
        """1 for defective images, int64, shape (N,)."""
        return torch.tensor([image.label for image in self.images])

    @property
    def maps(self) -> Tensor | None:
        """Anomaly maps, float32, shape (N, H, W)."""
        return torch.cat(self._maps) if self._maps else None

    @property
    def masks(self) -> Tensor | None:
        """Masks, bool, shape (N, H, W); None unless every image has one."""
        return torch.cat(self._masks) if self._masks and len(self._masks) == len(self._maps) else None

    def check(self) -> None:
        """Refuse scores and maps that are not finite."""
        for name, values in (("image scores", [self.scores]), ("anomaly maps", self._maps)):
            if not all(bool(torch.isfinite(value).all()) for value in values):
                msg = f"Some {name} of the model are not finite, as after a training that diverged."
                raise ValueError(msg)


def image_metrics(scores_N: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Return image AUROC, image AP and best F1 of raw scores; nothing if all images have the same label."""
    if len(labels_N.unique()) < 2:
        return {}
    metrics = {"image_AUROC": AUROC, "image_AP": AUPR, "image_F1": F1Max}
    return {name: _compute(metric, unit_interval(scores_N), labels_N) for name, metric in metrics.items()}


def pixel_metrics(maps_NHW: Tensor, masks_NHW: Tensor) -> dict[str, float]:
    """Return pixel AUROC, pixel AP and AUPRO of raw maps; nothing if no pixel, or every one, is defective."""
    if not masks_NHW.any() or masks_NHW.all():
        return {}
    scaled, masks = unit_interval(maps_NHW), masks_NHW.long()
    return {
        "pixel_AUROC": _compute(AUROC, scaled, masks),
        "pixel_AP": _compute(AUPR, scaled, masks),
        "AUPRO": _compute(AUPRO, maps_NHW, masks_NHW.float()),
    }


def best_f1_threshold(scores_N: Tensor, labels_N: Tensor) -> float:
    """Return the raw score from which Anomalib calls an image defective: the best F1 on validation images."""
    return _compute(F1AdaptiveThreshold, scores_N, labels_N)


def unit_interval(scores: Tensor) -> Tensor:
    """Map float32 scores to [0, 1], float64, keeping their order and ties.

    The ranking metrics of torchmetrics apply a sigmoid to every batch with a score outside [0, 1], which is 1 in
    float32 for all scores above 17: distances would be tied. The bits of a float, read as an integer, keep its order.
    """
    bits = scores.contiguous().view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (ordered + 2**31).double() / 2**32


def small_maps(maps_NHW: Tensor) -> Tensor:
    """Shrink float32 maps to a longest side of :data:`MAP_SIDE`, finite float16; maxima keep thin defects visible."""
    height, width = maps_NHW.shape[-2:]
    scale = min(1.0, MAP_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    pooled = F.adaptive_max_pool2d(maps_NHW[:, None], size)[:, 0]
    limit = torch.finfo(torch.float16).max
    return pooled.clamp(-limit, limit).half()


def explain_worst(
    model: ExDD, datamodule: AnomalibDataModule, found: Predictions, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Explain the highest-scoring normal and the lowest-scoring defective images, by path of the image.

    Explanations are as in the file of a run, see :mod:`.results`.
    """
    signed = torch.where(found.labels == 1, found.scores, -found.scores)
    order = signed.argsort(stable=True)
    chosen = [int(n) for label in (0, 1) for n in order[found.labels[order] == label][:EXPLAINED_IMAGES]]
    model = model.to(device).eval()
    transform = model.pre_processor.transform
    explained = {}
    for number in sorted(chosen):
        item: Any = datamodule.test_data[number]
        image = torch.Tensor(transform(item.image) if transform else item.image).to(device)
        explanation = explain_image(model.model, image, str(item.image_path), 1, model.decisions)
        patch, (height, width) = explanation.patches[0], explanation.image_size
        entry: dict[str, Any] = {"row": patch.row / height, "column": patch.column / width}
        for name, near in (("normal", patch.normal), ("defect", patch.defect)):
            entry[name] = near and {**asdict(near), "row": near.row / height, "column": near.column / width}
        explained[str(item.image_path)] = {**entry, "reason": explanation.reason and str(explanation.reason)}
    return explained


def measure_speed(model: AnomalibModule, datamodule: AnomalibDataModule, device: torch.device) -> tuple[float, float]:
    """Time the model with its pre-processing on test images in memory, after a warm-up.

    Returns:
        Images a second in batches, and milliseconds of a single image.
    """
    batches: list[Tensor] = []
    for batch in datamodule.test_dataloader():
        batches.append(batch.image)
        if sum(len(images) for images in batches) >= SPEED_IMAGES:
            break
    model = model.to(device).eval()
    keep_freed_memory()
    with torch.inference_mode():
        model(batches[0].to(device))
        seconds = [_seconds(model, images, device) for images in batches]
        singles = [image[None] for images in batches for image in images][: LATENCY_IMAGES + _WARM_UP]
        latencies = [_seconds(model, image, device) for image in singles]
    latencies = latencies[_WARM_UP:] or latencies
    return sum(len(images) for images in batches) / sum(seconds), 1000 * statistics.median(latencies)


def peak_memory_mb() -> float | None:
    """Return the largest resident memory of this process so far; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415  not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _compute(metric_class: Any, scores: Tensor, labels: Tensor) -> float:
    metric = metric_class(fields=["scores", "labels"])
    metric.update(SimpleNamespace(scores=scores, labels=labels))
    return float(metric.compute())


def _seconds(model: AnomalibModule, images_BCHW: Tensor, device: torch.device) -> float:
    images_BCHW = images_BCHW.to(device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    model(images_BCHW)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
