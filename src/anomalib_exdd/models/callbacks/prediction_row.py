"""What is known of a predicted image: a row of ``predictions.csv``, of the record and of an answer over HTTP."""

import json
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

    def to_json(self) -> str:
        """Return the row as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)


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
    module: Any,
    batch: Any,
    names: Sequence[str],
    transforms: Sequence[Transform | None],
    raw: RawScores,
    decisions: Any,
) -> list[PredictionRow]:
    """Describe the images of a post-processed batch, which went through ``transforms``, one after the other."""
    has_masks = _has_threshold(module.post_processor, "pixel_threshold")
    regions = locate_regions(batch, names, transforms) if has_masks else [None] * len(names)
    return [_row(module, batch, number, name, regions[number], raw, decisions) for number, name in enumerate(names)]


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
        decisions = getattr(module, "decisions", None)
        return prediction_rows(module, batch, [str(path)], [transform], raw, decisions)[0], batch


def _row(
    module: Any, batch: Any, number: int, name: str, regions: list[Region] | None, raw: RawScores, decisions: Any
) -> PredictionRow:
    """Describe image ``number`` of a post-processed batch."""
    raw_score = _finite(raw.scores[number])
    is_probability = decisions is not None or getattr(module, "scores_are_probabilities", False)
    probability = raw_score if is_probability else None
    threshold, label = None, None
    if _has_threshold(module.post_processor, "image_threshold"):
        normalized = getattr(module.post_processor, "normalized_image_threshold", None)
        threshold = None if normalized is None else _finite(float(normalized))
    # Without a threshold, Anomalib's "label" is the score itself.
    if threshold is not None and batch.pred_label is not None and batch.pred_label.dtype == torch.bool:
        label = "defective" if bool(batch.pred_label[number]) else "normal"
    reason = batch.reasons[number].image if getattr(batch, "reasons", None) is not None else None
    distances = getattr(batch, "normal_distance", None)
    return PredictionRow(
        path=name,
        score=_finite(float(torch.as_tensor(batch.pred_score).flatten()[number])),
        raw_score=raw_score,
        probability=probability,
        decision=decisions.name(probability) if decisions is not None and probability is not None else None,
        label=label,
        threshold=None if label is None else threshold,
        accept_threshold=getattr(decisions, "accept", None),
        reject_threshold=getattr(decisions, "reject", None),
        num_regions=None if regions is None else len(regions),
        regions=regions,
        seconds=round(raw.seconds / len(raw.scores), 6),
        **({} if reason is None else reason._asdict()),
        normal_distance=None if distances is None else _finite(float(distances[number])),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _has_threshold(post_processor: Any, name: str) -> bool:
    """Tell whether a threshold was found; without one, Anomalib takes 0.5 of the raw scores."""
    threshold = getattr(post_processor, name, None)
    return threshold is None or not math.isnan(float(threshold))
