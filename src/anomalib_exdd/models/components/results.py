"""Where a test or a prediction has left its results."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

logger = logging.getLogger(__name__)


def log_results(trainer: Any, visualizer: Any, stage: str) -> Path | None:
    """Say once where the pictures and the trained model are.

    Args:
        trainer: Trainer that has finished.
        visualizer: The model's visualizer, if it has one.
        stage: What the trainer did.

    Returns:
        Folder of the pictures; None if there is none, or nothing was to be said.
    """
    if stage not in {TrainerFn.TESTING, TrainerFn.PREDICTING} or not trainer.is_global_zero:
        return None
    pictures = getattr(visualizer, "output_dir", None)
    folder = Path(pictures) if pictures is not None and Path(pictures).is_dir() else None
    if folder is not None:
        logger.info("Pictures with heat maps: %s", folder.resolve())
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if stage == TrainerFn.TESTING and checkpoint and Path(checkpoint).is_file():
        logger.info("Trained model: %s", Path(checkpoint).resolve())
    return folder
