"""Which epoch is kept: the one with the best average precision on validation images, never on test images.

Shape suffix: B images.
"""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAveragePrecision

from anomalib_exdd.utils.files import write_atomically

from .loss import LabelLoss

SELECTION = "val_selection"
"""Name of the logged value by which epochs are compared; the higher, the better."""

_LOSS_SHARE = 1e-4  # of the selection: less than any change of average precision that a few images can make


class ValidationRecord(nn.Module):
    """Average precision and loss of an epoch's validation images."""

    def __init__(self, loss: LabelLoss) -> None:
        super().__init__()
        self._loss_function = (loss,)  # a tuple: the loss is the model's own submodule
        self.average_precision = BinaryAveragePrecision()
        self.loss = MeanMetric()
        self.defective = MeanMetric()

    def update(self, logits_B: Tensor, labels_B: Tensor) -> None:
        """Add a batch."""
        self.average_precision.update(logits_B.float(), labels_B.int())
        self.loss.update(self._loss_function[0](logits_B, labels_B), weight=len(labels_B))
        self.defective.update(labels_B.float())

    def compute(self, epoch: int) -> dict[str, Tensor]:
        """Return the values to log, of all processes together, and reset the metrics.

        The selection is the average precision; the loss decides between equal ones. Images of one kind cannot rank
        epochs: then it is the number of the epoch, so that the last one is kept and training never stops early.
        """
        share, loss = self.defective.compute(), self.loss.compute()
        values = {SELECTION: torch.tensor(float(epoch), device=loss.device)}
        if 0 < share < 1:
            precision = self.average_precision.compute()
            values = {"val_AP": precision, "val_loss": loss, SELECTION: precision - _LOSS_SHARE * loss / (1 + loss)}
        for metric in (self.average_precision, self.loss, self.defective):
            metric.reset()
        return values


class ResumePoint(Checkpoint):
    """Keeps ``last.ckpt`` beside the best checkpoint, from which an interrupted training goes on.

    Lightning's own ``save_last`` is written only in epochs that improve on the best.
    """

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the epoch; the file of the epoch before stays until it is complete."""
        keeper = checkpoint_keeper(trainer)
        if keeper is None or keeper.dirpath is None or trainer.fast_dev_run:
            return
        last = Path(keeper.dirpath) / "last.ckpt"
        # All processes have to call, and the first one writes.
        with write_atomically(last) if trainer.is_global_zero else nullcontext(last) as partial:
            trainer.save_checkpoint(partial, weights_only=False)


def checkpoint_keeper(trainer: Any) -> ModelCheckpoint | None:
    """Return the callback that keeps the trainer's checkpoints, if it has one."""
    return next((each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)), None)


def keep_best(keeper: Any) -> None:
    """Make the checkpoint callback keep the epoch of the best selection, unless it monitors a value already."""
    if isinstance(keeper, ModelCheckpoint) and keeper.monitor is None:
        keeper.monitor, keeper.mode, keeper.kth_value = SELECTION, "max", torch.tensor(-torch.inf)


def check_monitors(trainer: Any) -> None:
    """Raise a ValueError if a callback waits for a validation, where there are no validation images."""
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor != SELECTION and str(monitor).startswith("val_"):
            name = type(callback).__name__
            msg = f"{name} monitors `{monitor}`, but there are no validation images: give `--data.val_split_ratio 0.2`."
            raise ValueError(msg)


def carry_over_best(checkpoint: dict[str, Any], keeper: Any) -> None:
    """Let a resumed training know the best epoch of the interrupted one, whose folder is another."""
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("monitor") == SELECTION and keeper is not None:
            state["dirpath"] = keeper.dirpath  # Lightning forgets the scores of another folder
            state["last_model_path"] = ""


def best_checkpoint(keeper: Any) -> Path | None:
    """Return the checkpoint of the best epoch; if that was before an interruption, it is copied into this folder."""
    if getattr(keeper, "monitor", None) != SELECTION or not Path(keeper.best_model_path).is_file():
        return None
    best = Path(keeper.best_model_path)
    own = Path(keeper.dirpath) / best.name
    if best.resolve() != own.resolve():
        own = own.with_name(f"{keeper.filename}.ckpt")
        own.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(own) as partial:  # every process of a distributed training does it
            shutil.copyfile(best, partial)
        keeper.best_model_path = str(own)
    return own
