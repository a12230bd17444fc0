"""Progress of a run: its process writes it to `progress.json`, and the scheduler reads it."""

import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from .results import write_json

PROGRESS_NAME = "progress.json"
WRITE_INTERVAL = 0.5
"""Seconds between two states of the file."""
LOG_INTERVAL = 30.0
"""Seconds between two lines of the log."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a run in its present stage; None where Lightning knows no limit.

    Attributes:
        stage: `training`, or what tested images are for.
        epoch: Number of the epoch, from 1.
        batch: Number of batches done in this epoch.
        step: Number of optimizer steps done.
        seconds: Seconds since the stage began.
    """

    stage: str
    epoch: int
    epochs: int | None
    batch: int
    batches: int | None
    step: int
    steps: int | None
    seconds: float

    @property
    def share(self) -> float:
        """Share of the stage that is done, 0 to 1; 0 without a limit."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(self.step / self.steps)
        if self.epochs is not None and self.batches is not None:
            shares.append((self.epoch - 1 + self.batch / self.batches) / self.epochs)
        return min(1.0, max(shares))  # training ends at the limit that is reached first

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end of the stage; None at its start and end."""
        return self.seconds * (1 - self.share) / self.share if 0 < self.share < 1 else None

    def __str__(self) -> str:
        """Return the progress in a few words."""
        numbers = [("epoch", self.epoch, self.epochs)] if self.stage == "training" else []
        numbers.append(("batch" if numbers else f"{self.stage} batch", self.batch, self.batches))
        if self.steps is not None:
            numbers.append(("step", self.step, self.steps))
        words = [f"{name} {number}" + ("" if limit is None else f"/{limit}") for name, number, limit in numbers]
        if self.seconds_left is not None:
            words.append(f"{tqdm.format_interval(math.ceil(self.seconds_left))} left")
        return ", ".join(words)


def read_progress(folder: Path) -> Progress | None:
    """Read the progress of a run; None before its first batch."""
    try:
        return Progress(**json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return None


class ProgressWriter(Callback):
    """Writes the progress of a training or test into a run's folder, and now and then into the log."""

    def __init__(self, folder: Path, stage: str = "test") -> None:
        self._folder = folder
        self._stage = stage
        self._started = self._written = self._logged = -math.inf

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._started = time.monotonic()

    on_test_start = on_train_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Write the progress of the training."""
        del pl_module, outputs, batch, args
        epoch = trainer.current_epoch + 1
        limits = [_limit(each) for each in (trainer.max_epochs, trainer.num_training_batches, trainer.max_steps)]
        numbers = epoch, limits[0], batch_idx + 1, limits[1], trainer.global_step, limits[2]
        self._write(Progress("training", *numbers, time.monotonic() - self._started))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Write the progress of the test."""
        del pl_module, outputs, batch, args
        numbers = 1, 1, batch_idx + 1, _limit(trainer.num_test_batches[0]), 0, None
        self._write(Progress(self._stage, *numbers, time.monotonic() - self._started))

    def _write(self, progress: Progress) -> None:
        now, is_last = time.monotonic(), progress.share == 1
        if is_last or now - self._written >= WRITE_INTERVAL:
            self._written = now
            with suppress(OSError):  # on Windows while it is read; the next one will do
                write_json(asdict(progress), self._folder / PROGRESS_NAME)
        if is_last or now - self._logged >= LOG_INTERVAL:
            self._logged = now
            logger.info("%s", progress)


def _limit(number: float | None) -> int | None:
    """Return a limit of Lightning's; None for -1 and infinity."""
    return int(number) if number is not None and 0 < number < math.inf else None
