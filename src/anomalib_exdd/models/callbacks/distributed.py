"""Several processes under Lightning's engine: one folder of results, and every image counted once."""

import logging
from pathlib import Path
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torchmetrics import Metric

logger = logging.getLogger(__name__)


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


class CountImagesOnce(Callback):
    """Resets all metrics of a model before it validates or tests, and warns where images are repeated."""

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn where Lightning repeats test images, to give every process equally many."""
        size = trainer.world_size
        if size == 1:
            return
        loaders = trainer.test_dataloaders
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            repeats = not isinstance(getattr(loader, "sampler", None), UnrepeatedDistributedSampler)
            if repeats and len(loader.dataset) % size:
                message = (
                    "%d images for %d processes: some count twice in the metrics. Test with `--trainer.devices 1`."
                )
                logger.warning(message, len(loader.dataset), size)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Reset the metrics, which an interrupted epoch leaves as they were."""
        for part in pl_module.modules():
            if isinstance(part, Metric):
                part.reset()

    on_test_epoch_start = on_validation_epoch_start


def check_strategy(trainer: Any, model: str) -> None:
    """Raise a ValueError for strategies that give a process parts of the model only."""
    strategy = trainer.strategy
    # DeepSpeed is derived from DDP, and splits the model all the same.
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return
    name = type(strategy).__name__
    msg = f"{model} cannot work with the strategy {name}, which splits the model: use `--trainer.strategy ddp`."
    raise ValueError(msg)


def check_post_processor(trainer: Any, own: Any) -> None:
    """Raise a ValueError if the trainer has the post-processor of another model, which would change the scores."""
    others = [each for each in trainer.callbacks if isinstance(each, PostProcessor) and each is not own]
    if own is not None and others:
        name = type(others[0]).__name__
        msg = f"The trainer has the {name} of another model: use a new Engine for each kind of model."
        raise ValueError(msg)


def join_processes(trainer: Any) -> None:
    """Let all processes write into the first one's folder, and only the first one log.

    Anomalib's engine makes a new version of the results' folder in every process, and the last of them the latest.
    """
    if trainer.world_size == 1:
        return
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
