"""Progress of a run in words: its process writes it to `progress.txt`, and the scheduler shows it."""

import logging
import math
import time
from collections.abc import Mapping
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


def describe(counts: Mapping[str, tuple[int, int | None]], share: float, seconds: float) -> str:
    """Say how far a run is, and when it will have ended.

    Args:
        counts: What is counted -> the present number and its limit, None without one.
        share: Share of the stage that is done, 0 to 1; 0 where it has no limit.
        seconds: Duration of the stage so far.
    """
    words = [f"{name} {number}" + ("" if limit is None else f"/{limit}") for name, (number, limit) in counts.items()]
    if 0 < share < 1:
        words.append(f"{tqdm.format_interval(math.ceil(seconds * (1 - share) / share))} left")
    return ", ".join(words)


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
        """Write the progress of the training."""
        epochs, batches, steps = map(_limit, (trainer.max_epochs, trainer.num_training_batches, trainer.max_steps))
        counts = {"epoch": (trainer.current_epoch + 1, epochs), "batch": (batch_idx + 1, batches)}
        share = (trainer.current_epoch + (batch_idx + 1) / batches) / epochs if epochs and batches else 0.0
        if steps:  # training ends at the limit that is reached first
            counts["step"] = (trainer.global_step, steps)
            share = max(share, trainer.global_step / steps)
        self._write(counts, share)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Write the progress of the test."""
        batches = _limit(trainer.num_test_batches[0])
        self._write({f"{self._stage} batch": (batch_idx + 1, batches)}, (batch_idx + 1) / batches if batches else 0.0)

    def _write(self, counts: Mapping[str, tuple[int, int | None]], share: float) -> None:
        now, is_last = time.monotonic(), share >= 1
        progress = describe(counts, share, now - self._started)
        if is_last or now - self._written >= WRITE_INTERVAL:
            self._written = now
            with suppress(OSError):  # on Windows while it is read; the next one will do
                write_file(self._path, progress)
        if is_last or now - self._logged >= LOG_INTERVAL:
            self._logged = now
            logger.info("%s", progress)


def _limit(number: float | None) -> int | None:
    """Return a limit of Lightning's; None for -1 and infinity."""
    return int(number) if number is not None and 0 < number < math.inf else None
