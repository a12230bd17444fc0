"""What a run measures of a trained model: its predictions, its speed and its memory."""

import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from torch import Tensor

from anomalib_exdd.comparison.results import NearestPatches
from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.exdd.explanation import TrainingPatch, explain_image

from .allocation import usual_threshold

SPEED_IMAGES = 128
"""Test images that throughput is measured with."""
LATENCY_IMAGES = 30
"""Single images whose median time is the latency."""
EXPLAINED_IMAGES = 100
"""Normal, and defective, test images that are explained."""
_WARM_UP = 3


class Speed(NamedTuple):
    """Images a second in batches, and milliseconds of a single image."""

    images_per_second: float
    latency_ms: float


class Predictions(Callback):
    """Collects raw scores, and where wanted maps, while Lightning tests a model.

    Args:
        with_maps: Keep maps and masks.
    """

    def __init__(self, *, with_maps: bool = False) -> None:
        self.with_maps = with_maps
        self.paths: list[str] = []
        self.mask_paths: list[str] = []
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._maps: list[Tensor] = []
        self._masks: list[Tensor] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kw: Any) -> None:
        """Keep what the model says of a batch."""
        del trainer, pl_module, outputs, args, kw
        images = len(batch.image)
        scores, maps = batch.pred_score, batch.anomaly_map
        if scores is None:
            scores = maps.flatten(1).amax(dim=1)  # as Anomalib's post-processor does
        self._scores.append(scores.detach().float().reshape(images).cpu())
        self._labels.append(batch.gt_label.reshape(images).long().cpu())
        self.paths += [str(path) for path in batch.image_path]
        self.mask_paths += [str(path or "") for path in batch.mask_path or [""] * images]
        if self.with_maps and maps is not None:
            self._maps.append(maps.detach().float().reshape(images, *maps.shape[-2:]).cpu())
            if batch.gt_mask is not None:
                self._masks.append(batch.gt_mask.reshape(images, *batch.gt_mask.shape[-2:]).bool().cpu())

    @property
    def scores(self) -> Tensor:
        """Image scores, float32, shape (N,)."""
        return torch.cat(self._scores)

    @property
    def labels(self) -> Tensor:
        """1 for defective images, int64, shape (N,)."""
        return torch.cat(self._labels)

    @property
    def maps(self) -> Tensor | None:
        """Anomaly maps, float32, shape (N, H, W)."""
        return torch.cat(self._maps) if self._maps else None

    @property
    def masks(self) -> Tensor | None:
        """Masks, bool, shape (N, H, W); None if not every image has one."""
        return torch.cat(self._masks) if self._masks and len(self._masks) == len(self._scores) else None

    def check(self) -> None:
        """Refuse scores that rank nothing.

        Raises:
            ValueError: If scores or maps are not finite.
        """
        for name, values in (("image scores", self._scores), ("anomaly maps", self._maps)):
            if not all(bool(torch.isfinite(value).all()) for value in values):
                msg = f"Some {name} of the model are not finite, as after a training that diverged."
                raise ValueError(msg)


def explain_worst(
    model: ExDD, datamodule: AnomalibDataModule, found: Predictions, device: torch.device
) -> dict[str, NearestPatches]:
    """Explain the images that a report shows first: the highest of the normal and the lowest of the defective ones.

    Args:
        model: Trained model.
        datamodule: Data module that was set up with the model.
        found: Predictions of its test images.
        device: Where the model runs.

    Returns:
        By path of the image; 100 images of either label, or all if there are fewer.
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
        explained[str(item.image_path)] = nearest_patches(model, image, str(item.image_path))
    return explained


def nearest_patches(model: ExDD, image_CHW: Tensor, path: str) -> NearestPatches:
    """Find an image's highest patch and the training patches nearest to it, positions as shares of the image.

    Args:
        model: Trained model.
        image_CHW: Pre-processed image, float, shape (3, H, W).
        path: Its path.
    """
    explanation = explain_image(model.model, image_CHW, path, 1, model.decisions)
    height, width = explanation.image_size
    patch = explanation.patches[0]

    def shares(found: TrainingPatch) -> dict[str, Any]:
        return {
            "source": found.source,
            "row": found.row / height,
            "column": found.column / width,
            "distance": found.distance,
        }

    defect = None if patch.defect is None else shares(patch.defect)
    reason = None if explanation.reason is None else str(explanation.reason)
    return NearestPatches(patch.row / height, patch.column / width, shares(patch.normal), defect, reason)


def measure_speed(model: AnomalibModule, datamodule: AnomalibDataModule, device: torch.device) -> Speed:
    """Time the model with its pre-processing on test images that are in memory, after a warm-up.

    Args:
        model: Trained model.
        datamodule: Data module that was set up with the model.
        device: Where it runs.
    """
    batches: list[Tensor] = []
    for batch in datamodule.test_dataloader():
        batches.append(batch.image)
        if sum(len(images) for images in batches) >= SPEED_IMAGES:
            break
    model = model.to(device).eval()
    with torch.inference_mode(), usual_threshold():
        model(batches[0].to(device))
        seconds = [_seconds(model, images, device) for images in batches]
        singles = [image[None] for images in batches for image in images][: LATENCY_IMAGES + _WARM_UP]
        latencies = [_seconds(model, image, device) for image in singles]
    latencies = latencies[_WARM_UP:] or latencies
    images = sum(len(images) for images in batches)
    return Speed(images / sum(seconds), 1000 * statistics.median(latencies))


def peak_memory_mb() -> float | None:
    """Return the largest resident memory that this process had so far, MB; None on Windows, which does not tell."""
    try:
        import resource  # noqa: PLC0415  there is none on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def peak_gpu_memory_mb(device: torch.device) -> float | None:
    """Return the largest memory allocated on a GPU so far, MB; None without one."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def _seconds(model: AnomalibModule, images_BCHW: Tensor, device: torch.device) -> float:
    images_BCHW = images_BCHW.to(device)
    _wait(device)
    start = time.perf_counter()
    model(images_BCHW)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
