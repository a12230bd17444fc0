"""Training in several processes: what Lightning's engine needs beside banks that are built together."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_ANCHOR = "gradient_anchor"


class DistributedFit(nn.Module):
    """Lets a module without trainable parameters be fitted by Lightning's DDP.

    DDP refuses to wrap a module in which nothing requires a gradient. While several processes fit, the module therefore
    has one parameter that nothing depends on; it is in no checkpoint.
    """

    trainer: Any

    def setup(self, stage: str) -> None:
        """Prepare for several processes.

        Raises:
            ValueError: If the strategy would give a process parts of the model only.
        """
        strategy = self.trainer.strategy
        # DeepSpeed is derived from DDP, and splits the model all the same.
        whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        if not whole:
            msg = (
                f"ExDD cannot work with the strategy {type(strategy).__name__}: every process needs the whole model "
                "and both banks. Use `--trainer.devices 1`, or `--trainer.strategy ddp` for several devices or "
                "machines."
            )
            raise ValueError(msg)
        if self.trainer.world_size == 1:
            return
        if not self.trainer.is_global_zero:  # what holds for all of them is said once
            logging.getLogger("anomalib_exdd").setLevel(logging.ERROR)
        _share_results_folder(self.trainer)
        if stage == TrainerFn.FITTING:
            self.register_parameter(_ANCHOR, nn.Parameter(torch.zeros((), device=cast("Any", self).device)))

    def loss(self) -> Tensor:
        """Return the loss that Lightning wants of every step, with a gradient; there is nothing to optimise."""
        anchor: Tensor | None = self._parameters.get(_ANCHOR)
        if anchor is not None:
            return anchor * 0
        return torch.zeros((), requires_grad=True, device=cast("Any", self).device)

    def teardown(self, stage: str) -> None:
        """Be a module without trainable parameters again."""
        del stage
        self._parameters.pop(_ANCHOR, None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the anchor out."""
        cast("Any", super()).on_save_checkpoint(checkpoint)
        checkpoint.get("state_dict", {}).pop(_ANCHOR, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept checkpoints without the anchor, which are all of them."""
        cast("Any", super()).on_load_checkpoint(checkpoint)
        if _ANCHOR in self._parameters:
            checkpoint["state_dict"][_ANCHOR] = self._parameters[_ANCHOR]

    def on_test_start(self) -> None:
        """Warn where Lightning counts images twice, to give every process equally many."""
        cast("Any", super()).on_test_start()
        size = self.trainer.world_size
        loaders = self.trainer.test_dataloaders
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            repeats = not isinstance(getattr(loader, "sampler", None), UnrepeatedDistributedSampler)
            if repeats and len(loader.dataset) % size:
                logger.warning(
                    "%d images cannot be split evenly between %d processes: some count twice in the metrics. Test with "
                    "`--trainer.devices 1`, or with this package's data modules, which split them exactly.",
                    len(loader.dataset),
                    size,
                )


def _share_results_folder(trainer: Any) -> None:
    """Let all processes write into the first one's folder.

    Anomalib's engine makes a new version of the results' folder in every process, and the last of them the latest.
    """
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
