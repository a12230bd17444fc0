"""Which epoch is kept: the one with the best average precision on validation images, never on test images."""

import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAveragePrecision

from anomalib_exdd.utils.files import write_atomically

logger = logging.getLogger(__name__)

SELECTION = "val_selection"
"""Name of the logged value by which epochs are compared; the higher, the better."""

_LOSS_SHARE = 1e-4  # of the selection: less than any change of average precision that a few images can make


class ValidationRecord(nn.Module):
    """Average precision and loss of an epoch's validation images; :class:`.ResetMetrics` resets it."""

    def __init__(self) -> None:
        super().__init__()
        self.average_precision = BinaryAveragePrecision()
        self.loss, self.defective = MeanMetric(), MeanMetric()

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add the logits and labels of a batch, and its mean loss."""
        self.average_precision.update(logits.float(), labels.int())
        self.loss.update(loss, weight=len(labels))
        self.defective.update(labels.float())

    def compute(self, epoch: int) -> dict[str, Tensor]:
        """Return the values to log, of all processes together.

        The selection is the average precision; the loss decides between equal ones. Images of one kind cannot rank
        epochs: then it is the number of the epoch, so that the last one is kept and training never stops early.
        """
        loss = self.loss.compute()
        if not 0 < self.defective.compute() < 1:
            return {SELECTION: torch.tensor(float(epoch), device=loss.device)}
        precision = self.average_precision.compute()
        return {"val_AP": precision, "val_loss": loss, SELECTION: precision - _LOSS_SHARE * loss / (1 + loss)}


class EpochSelection(Checkpoint):
    """Keeps the best epoch, restores it at the end, and keeps the last one, from which an interrupted training goes on.

    Lightning's own ``save_last`` is written only in epochs that improve on the best.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make Lightning's callback keep the epoch of the best selection, unless it monitors a value already."""
        keeper = checkpoint_keeper(trainer)
        # Here, because Lightning looks for its state, named by what it monitors, in a checkpoint to resume from.
        if stage == TrainerFn.FITTING and keeper is not None and keeper.monitor is None:
            keeper.monitor, keeper.mode, keeper.kth_value = SELECTION, "max", torch.tensor(-torch.inf)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the epoch as ``last.ckpt``; the file of the epoch before stays until it is complete."""
        keeper = checkpoint_keeper(trainer)
        if keeper is None or keeper.dirpath is None or trainer.fast_dev_run:
            return
        last = Path(keeper.dirpath) / "last.ckpt"
        # All processes have to call, and the first one writes.
        with write_atomically(last) if trainer.is_global_zero else nullcontext(last) as partial:
            trainer.save_checkpoint(partial, weights_only=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the weights and the threshold of the best epoch: the engine tests the model as it is."""
        keeper: Any = checkpoint_keeper(trainer)
        if keeper is None or keeper.monitor != SELECTION or not Path(keeper.best_model_path).is_file():
            return
        best, folder = Path(keeper.best_model_path), Path(keeper.dirpath)
        content = torch.load(best, map_location=pl_module.device, weights_only=True)
        pl_module.load_state_dict(content["state_dict"])
        logger.info("Epoch %d is kept, of %d.", content["epoch"] + 1, trainer.current_epoch)
        if best.parent.resolve() != folder.resolve():  # it was trained before an interruption
            own = folder / f"{keeper.filename}.ckpt"
            folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(own) as partial:  # every process of a distributed training does it
                shutil.copyfile(best, partial)
            keeper.best_model_path = str(own)


def checkpoint_keeper(trainer: Any) -> ModelCheckpoint | None:
    """Return the callback that keeps the trainer's checkpoints, if it has one."""
    return next((each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)), None)
