"""Callbacks that both models share, and the start of a trainer's run."""

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from .checkpoint import FitRecorder
from .cropping import Cropping
from .distributed import CountImagesOnce, check_post_processor, check_strategy, join_processes
from .prediction_row import RawScores
from .predictions import Predictions


def with_shared_callbacks(components: Any) -> list[Callback]:
    """Put the shared callbacks around those of a model's components."""
    raw = RawScores()  # first, because Anomalib's post-processor overwrites the scores
    return [raw, *components, Cropping(), CountImagesOnce(), FitRecorder(), Predictions(raw)]


def start_run(model: Any, stage: str) -> None:
    """Check and prepare a model's trainer; called from the model's ``setup``."""
    trainer = model.trainer
    check_strategy(trainer, model.name)
    check_post_processor(trainer, model.post_processor)
    join_processes(trainer)
    if stage == TrainerFn.FITTING:
        model.checkpoint_state.fitting_from = model.checkpoint_state.fitted_from = None
        # There is nothing to check before training: Lightning's own trainer, unlike the engine, would try.
        trainer.num_sanity_val_steps = 0
