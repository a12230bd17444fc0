"""What the log says at the end of a test or a prediction: where the results are."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from .pictures import explanations_folder
from .predictions import report

logger = logging.getLogger(__name__)


def report_results(module: Any, stage: str) -> None:
    """Say where the results of a model are; the last step of a prediction, which may end the command with a code.

    Args:
        module: The :class:`anomalib_exdd.models.exdd.ExDD` that has tested or predicted.
        stage: What it has done.

    Raises:
        SystemExit: If the command `predict` met unreadable files; see :func:`.predictions.report`.
    """
    trainer = module.trainer
    if stage not in {TrainerFn.TESTING, TrainerFn.PREDICTING} or not trainer.is_global_zero:
        return
    folder = getattr(module.visualizer, "output_dir", None)
    if folder is not None and Path(folder).is_dir():
        logger.info("Pictures with heat maps: %s", Path(folder).resolve())
        if stage == TrainerFn.PREDICTING and module.settings.explain:
            logger.info("Explanations: %s", explanations_folder(folder).resolve())
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if stage == TrainerFn.TESTING and checkpoint and Path(checkpoint).is_file():
        logger.info("Trained model: %s", Path(checkpoint).resolve())
    if stage == TrainerFn.PREDICTING:
        report(trainer)
