"""Progress of a run in words: its process writes it to `progress.txt`, and the scheduler shows it."""

import logging
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from anomalib_exdd.utils.files import write_file

PROGRESS_NAME = "progress.txt"
WRITE_INTERVAL = 0.5
"""Seconds between two states of the file."""
LOG_INTERVAL = 30.0
"""Seconds between two lines of the log."""

logger = logging.getLogger(__name__)


def read_progress(folder: Path) -> str:
    """Read the progress of a run; empty before its first batch."""
    path = folder / PROGRESS_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else ""


class ProgressWriter(Callback):
    """Writes the progress of a training or test into a run's folder, and now and then into the log.

    Args:
        folder: Folder of the run.
        stage: What tested images are for.
    """

    def __init__(self, folder: Path, stage: str = "test") -> None:
        self._path = folder / PROGRESS_NAME
        self._stage = stage
        self._started = self._written = self._logged = -math.inf

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    on_test_start = on_train_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the progress of the training, which ends at the limit that is reached first."""
        epochs, batches, steps = trainer.max_epochs or -1, trainer.num_training_batches, trainer.max_steps
        words, share = f"epoch {trainer.current_epoch + 1}", 0.0
        if epochs > 0:  # -1: no limit
            words += f"/{epochs}"
            share = (trainer.current_epoch + (batch_idx + 1) / batches) / epochs
        words += f", batch {batch_idx + 1}/{batches}"
        if steps > 0:
            words += f", step {trainer.global_step}/{steps}"
            share = max(share, trainer.global_step / steps)
        self._write(words, share)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Write the progress of the test."""
        batches = trainer.num_test_batches[0]
        self._write(f"{self._stage} batch {batch_idx + 1}/{batches}", (batch_idx + 1) / batches)

    def _write(self, words: str, share: float) -> None:
        """Write the words and the time that is left, given the share of the stage that is done, 0 to 1."""
        now, is_last = time.monotonic(), share >= 1
        if 0 < share < 1:
            words += f", {tqdm.format_interval(math.ceil((now - self._started) * (1 - share) / share))} left"
        if is_last or now - self._written >= WRITE_INTERVAL:
            self._written = now
            with suppress(OSError):  # on Windows while it is read; the next one will do
                write_file(self._path, words)
        if is_last or now - self._logged >= LOG_INTERVAL:
            self._logged = now
            logger.info("%s", words)
