"""How far a run is: its process writes that down, and the one that waits for it reads it."""

import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from anomalib_exdd.comparison.results import write_json

PROGRESS_NAME = "progress.json"
_WRITE_EVERY = 0.5  # seconds
_LOG_EVERY = 30.0
_MINUTE, _HOUR = 60, 3600

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        stage: What it does: `training`, or what its images are for.
        epoch: Number of the epoch, from 1.
        epochs: Number of epochs; None if it is not known.
        batch: Number of batches done in this epoch.
        batches: Number of batches of an epoch; None if it is not known.
        step: Number of optimizer steps done.
        steps: Number of steps after which training ends; None if it does not end by them.
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
        """Share of the stage that is done, 0 to 1; 0 if nothing says when it ends."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(self.step / self.steps)
        if self.epochs is not None and self.batches is not None:
            shares.append((self.epoch - 1 + self.batch / self.batches) / self.epochs)
        return min(1.0, max(shares))  # training ends by whichever is reached first

    def __str__(self) -> str:
        """Say it in a few words, with the time that the stage still takes."""
        if self.stage == "training":
            said = [f"epoch {_of(self.epoch, self.epochs)}", f"batch {_of(self.batch, self.batches)}"]
        else:
            said = [f"{self.stage} batch {_of(self.batch, self.batches)}"]
        if self.steps is not None:
            said.append(f"step {self.step}/{self.steps}")
        left = seconds_left(self.seconds, self.share)
        if left is not None:
            said.append(f"{duration(left)} left")
        return ", ".join(said)


def seconds_left(seconds: float, share: float) -> float | None:
    """Estimate the seconds that something still takes, if it goes on as before.

    Args:
        seconds: Seconds that it took so far.
        share: Share of it that is done, 0 to 1.

    Returns:
        The estimate; None at the start and at the end.
    """
    return seconds * (1 - share) / share if 0 < share < 1 else None


def duration(seconds: float) -> str:
    """Write a duration in two units at most: 40 s, 12 min, 3 h 5 min."""
    rounded = math.ceil(seconds)
    if rounded < 2 * _MINUTE:
        return f"{rounded} s"
    if rounded < 2 * _HOUR:
        return f"{round(seconds / _MINUTE)} min"
    hours, minutes = divmod(round(seconds / _MINUTE), 60)
    return f"{hours} h {minutes} min"


def read_progress(folder: Path) -> Progress | None:
    """Read how far the run of a folder is; None before its first batch."""
    try:
        return Progress(**json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return None


class ProgressWriter(Callback):
    """Writes down how far a training or a test is, twice a second at most, and into the log every half a minute.

    Args:
        folder: Folder of the run.
        stage: What the images of a test are for.
    """

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
        """Tell how far the training is."""
        del pl_module, outputs, batch, args
        self._tell(
            Progress(
                stage="training",
                epoch=trainer.current_epoch + 1,
                epochs=_known(trainer.max_epochs),
                batch=batch_idx + 1,
                batches=_known(trainer.num_training_batches),
                step=trainer.global_step,
                steps=_known(trainer.max_steps),
                seconds=time.monotonic() - self._started,
            )
        )

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Tell how far the test is."""
        del pl_module, outputs, batch, args
        (batches,) = trainer.num_test_batches
        seconds = time.monotonic() - self._started
        self._tell(Progress(self._stage, 1, 1, batch_idx + 1, _known(batches), 0, None, seconds))

    def _tell(self, progress: Progress) -> None:
        now, is_last = time.monotonic(), progress.share == 1
        if is_last or now - self._written >= _WRITE_EVERY:
            self._written = now
            with suppress(OSError):  # such as on Windows, while it is being read: the next one will do
                write_json(asdict(progress), self._folder / PROGRESS_NAME)
        if is_last or now - self._logged >= _LOG_EVERY:
            self._logged = now
            logger.info("%s", progress)


def _known(number: float | None) -> int | None:
    """Return a number of Lightning's; None for those that stand for no limit: -1 and infinity."""
    return int(number) if number is not None and 0 < number < math.inf else None


def _of(number: int, most: int | None) -> str:
    return f"{number}/{most}" if most is not None else str(number)
