"""Where a test or a prediction has left its results."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from .predictions import report

logger = logging.getLogger(__name__)


def pictures_folder(visualizer: Any) -> Path | None:
    """Return where a visualizer has put its pictures; None if there are none."""
    pictures = getattr(visualizer, "output_dir", None)
    return Path(pictures) if pictures is not None and Path(pictures).is_dir() else None


def report_results(trainer: Any, visualizer: Any, stage: str) -> None:
    """Say once where the results are; the last step of a prediction, which may end the command with a code.

    Args:
        trainer: Trainer that has finished.
        visualizer: The model's visualizer, if it has one.
        stage: What the trainer did.

    Raises:
        SystemExit: If the command `predict` met unreadable files; see :func:`.predictions.report`.
    """
    if stage not in {TrainerFn.TESTING, TrainerFn.PREDICTING} or not trainer.is_global_zero:
        return
    folder = pictures_folder(visualizer)
    if folder is not None:
        logger.info("Pictures with heat maps: %s", folder.resolve())
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if stage == TrainerFn.TESTING and checkpoint and Path(checkpoint).is_file():
        logger.info("Trained model: %s", Path(checkpoint).resolve())
    if stage == TrainerFn.PREDICTING:
        report(trainer)
