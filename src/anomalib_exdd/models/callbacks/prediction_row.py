"""What is known of a predicted image: a row of ``predictions.csv``, of the record and of an answer over HTTP."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.predict_loader import PredictLoader
from anomalib_exdd.models.regions import Region, locate_regions
from anomalib_exdd.models.transforms import first_resize


@dataclass(frozen=True)
class PredictionRow:
    """What is known of an image; what does not apply, or is not known, is None."""

    path: str  # of the image, or the name of its picture if it has none
    score: float | None = None  # normalised by Anomalib, 0 to 1
    raw_score: float | None = None  # before that
    probability: float | None = None  # that the image is defective, where images are scored by it
    decision: str | None = None  # by the probability: "accept", "review" or "reject"
    label: str | None = None  # by the score: "normal" or "defective"
    threshold: float | None = None  # of the score; higher ones are labelled defective
    accept_threshold: float | None = None  # images with a lower probability are accepted
    reject_threshold: float | None = None  # images with at least this probability are rejected
    num_regions: int | None = None
    regions: list[Region] | None = None  # None where they cannot be located in the original image
    seconds: float | None = None  # of its batch, from resizing to the score, divided by the batch's images
    error: str | None = None  # why there is no prediction
    reason: str | None = None  # why the image is not accepted, its kind and share: see `Reason`
    kind: str | None = None
    kind_share: float | None = None
    normal_distance: float | None = None  # of usual patches to normal ones: see `normal_distance`

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain numbers and texts, for JSON."""
        regions = None if self.regions is None else [region._asdict() for region in self.regions]
        return vars(self) | {"regions": regions}


class RawScores(Callback):
    """Keeps what the post-processor, which comes next, overwrites: the model's own scores, and the time they took."""

    scores: list[float]  # of the batch, shape (B,)
    seconds: float  # of the batch, from its arrival on the device to its scores
    _start: float

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        """Keep the scores, and stop the clock."""
        self.scores = torch.as_tensor(outputs.pred_score).flatten().tolist()  # waits for the GPU
        self.seconds = time.perf_counter() - self._start


def prediction_rows(
    module: Any, batch: Any, names: Sequence[str], transforms: Sequence[Transform | None], raw: RawScores
) -> list[PredictionRow]:
    """Describe the images of a post-processed batch, which went through ``transforms``, one after the other."""
    post_processor, decisions = module.post_processor, getattr(module, "decisions", None)
    is_probability = decisions is not None or getattr(module, "scores_are_probabilities", False)
    # Without a threshold, Anomalib takes 0.5 of the raw scores, or its "label" is the score itself.
    threshold = None
    if _has_threshold(post_processor, "image_threshold") and getattr(batch.pred_label, "dtype", None) == torch.bool:
        threshold = _finite(getattr(post_processor, "normalized_image_threshold", math.nan))
    regions: list[list[Region] | None] = [None] * len(names)
    if _has_threshold(post_processor, "pixel_threshold"):
        regions = locate_regions(batch, names, transforms)
    scores = torch.as_tensor(batch.pred_score).flatten()
    distances, reasons = getattr(batch, "normal_distance", None), getattr(batch, "reasons", None)
    rows = []
    for number, (name, found) in enumerate(zip(names, regions, strict=True)):
        raw_score = _finite(raw.scores[number])
        probability = raw_score if is_probability else None
        reason = None if reasons is None else reasons[number].image
        row = PredictionRow(
            path=name,
            score=_finite(scores[number]),
            raw_score=raw_score,
            probability=probability,
            decision=None if decisions is None or probability is None else decisions.name(probability),
            label=None if threshold is None else "defective" if batch.pred_label[number] else "normal",
            threshold=threshold,
            accept_threshold=getattr(decisions, "accept", None),
            reject_threshold=getattr(decisions, "reject", None),
            num_regions=None if found is None else len(found),
            regions=found,
            seconds=round(raw.seconds / len(names), 6),
            **({} if reason is None else reason._asdict()),
            normal_distance=None if distances is None else _finite(distances[number]),
        )
        rows.append(row)
    return rows


def predict_file(module: Any, path: Path) -> tuple[PredictionRow, Any]:
    """Predict one file as `anomalib predict` does, without a trainer: its row, and the post-processed batch.

    There is no batch if the file cannot be read.
    """
    transform = getattr(module.pre_processor, "transform", None)
    loader = PredictLoader([path])
    loader.resize, loader.white_level = first_resize(transform), module.white_level
    batch: Any = next(iter(loader), None)
    if batch is None:
        (unreadable,) = loader.take_unreadable()
        return PredictionRow(unreadable.path, error=unreadable.reason), None
    raw = RawScores()
    with torch.inference_mode():
        batch = move_data_to_device(batch, module.device)
        raw.on_predict_batch_start()
        if module.pre_processor:
            module.pre_processor.on_predict_batch_start(None, module, batch, 0)
        batch = module.predict_step(batch)
        raw.on_predict_batch_end(None, module, batch)
        if module.post_processor:
            module.post_processor.on_predict_batch_end(None, module, batch)
        return prediction_rows(module, batch, [str(path)], [transform], raw)[0], batch


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _has_threshold(post_processor: Any, name: str) -> bool:
    return not math.isnan(getattr(post_processor, name, 0))
