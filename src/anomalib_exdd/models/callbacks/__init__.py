"""Callbacks that both models share, and the start of a trainer's run."""

from typing import Any

from lightning.pytorch import Callback

from .checkpoint import FitRecorder
from .cropping import Cropping
from .distributed import ResetMetrics, start_run
from .prediction_row import RawScores
from .predictions import Predictions

__all__ = ["start_run", "with_shared_callbacks"]


def with_shared_callbacks(components: Any) -> list[Callback]:
    """Put the shared callbacks around those of a model's components."""
    raw = RawScores()  # first, because Anomalib's post-processor overwrites the scores
    return [raw, *components, Cropping(), ResetMetrics(), FitRecorder(), Predictions(raw)]
