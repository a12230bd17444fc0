"""The start of a trainer's run: which trainers a model can work with, and one folder of results for all processes."""

import logging
from pathlib import Path
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric


class GradientAnchor(nn.Module):
    """A parameter that nothing depends on, for models that are fitted without gradients; it is in no checkpoint.

    Lightning wants a loss with a gradient, and DDP refuses to wrap a module in which nothing requires one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """Return a loss of zero."""
        return self.value * 0

    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class ResetMetrics(Callback):
    """Resets all metrics of a model before it validates or tests: an interrupted epoch leaves them as they were."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the metrics."""
        for part in pl_module.modules():
            if isinstance(part, Metric):
                part.reset()

    on_test_epoch_start = on_validation_epoch_start


def start_run(model: Any, stage: str) -> None:
    """Check and prepare a model's trainer; called from the model's ``setup``.

    Raises:
        ValueError: If the strategy gives a process parts of the model only, or if the trainer has the post-processor of
            another model, which would change the scores.
    """
    trainer, own = model.trainer, model.post_processor
    is_whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    # DeepSpeed is derived from DDP, and splits the model all the same.
    if not is_whole or isinstance(trainer.strategy, DeepSpeedStrategy):
        name = type(trainer.strategy).__name__
        msg = f"{model.name} cannot work with the strategy {name}, which splits it: use `--trainer.strategy ddp`."
        raise ValueError(msg)
    others = [each for each in trainer.callbacks if isinstance(each, PostProcessor) and each is not own]
    if own is not None and others:
        name = type(others[0]).__name__
        msg = f"The trainer has the {name} of another model: use a new Engine for each kind of model."
        raise ValueError(msg)
    if trainer.world_size > 1:
        _join_processes(trainer)
    if stage == TrainerFn.FITTING:
        model.checkpoint_state.fitting_from = model.checkpoint_state.fitted_from = None
        # There is nothing to check before training: Lightning's own trainer, unlike the engine, would try.
        trainer.num_sanity_val_steps = 0


def _join_processes(trainer: Any) -> None:
    """Let all processes write into the first one's folder, and only the first one log.

    Anomalib's engine makes a new version of the results' folder in every process, and the last of them the latest.
    """
    if not trainer.is_global_zero:
        logging.getLogger("anomalib_exdd").setLevel(logging.ERROR)
    own = Path(trainer.default_root_dir)
    shared = Path(trainer.strategy.broadcast(str(own)))
    if own != shared:
        trainer._default_root_dir = str(shared)  # noqa: SLF001  Lightning has no other way to change it
        if own.is_dir() and not any(own.iterdir()):
            own.rmdir()
    latest = shared.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink() and latest.resolve() != shared.resolve():
        latest.unlink()
        latest.symlink_to(shared)
