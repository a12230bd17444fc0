"""What the log says at the end of a test or a prediction: where the results are."""

import logging
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from anomalib_exdd.models.components.results import log_results

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
    folder = log_results(module.trainer, module.visualizer, stage)
    if stage != TrainerFn.PREDICTING or not module.trainer.is_global_zero:
        return
    if folder is not None and module.settings.explain:
        logger.info("Explanations: %s", explanations_folder(folder).resolve())
    report(module.trainer)
