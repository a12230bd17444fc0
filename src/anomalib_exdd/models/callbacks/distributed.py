"""Several processes under Lightning's engine: one folder of results, and every image counted once."""

import logging
from pathlib import Path
from typing import Any

from anomalib.post_processing import PostProcessor
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

logger = logging.getLogger(__name__)


def check_strategy(trainer: Any, model: str) -> None:
    """Refuse strategies that give a process parts of the model only.

    Args:
        trainer: Trainer that begins.
        model: Name of the model.

    Raises:
        ValueError: If its strategy is one of them.
    """
    strategy = trainer.strategy
    # DeepSpeed is derived from DDP, and splits the model all the same.
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return
    msg = (
        f"{model} cannot work with the strategy {type(strategy).__name__}: every process needs the whole model. Use "
        "`--trainer.devices 1`, or `--trainer.strategy ddp` for several devices or machines."
    )
    raise ValueError(msg)


def check_post_processor(trainer: Any, own: Any) -> None:
    """Refuse a trainer that has worked for a model of another kind: its post-processor would change the scores.

    Args:
        trainer: Trainer that begins.
        own: The model's post-processor, if it has one.

    Raises:
        ValueError: If the trainer has another one as well.
    """
    others = [each for each in trainer.callbacks if isinstance(each, PostProcessor) and each is not own]
    if own is not None and others:
        msg = (
            f"The trainer has the {type(others[0]).__name__} of another model, which would change this model's scores. "
            "Use a new Engine for each kind of model."
        )
        raise ValueError(msg)


def join_processes(trainer: Any) -> None:
    """Let all processes write into the first one's folder, and only the first one talk.

    Anomalib's engine makes a new version of the results' folder in every process, and the last of them the latest.
    """
    if trainer.world_size == 1:
        return
    if not trainer.is_global_zero:  # what holds for all of them is said once
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


def warn_of_repeats(trainer: Any) -> None:
    """Warn where Lightning counts test images twice, to give every process equally many."""
    size = trainer.world_size
    if size == 1:
        return
    loaders = trainer.test_dataloaders
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        repeats = not isinstance(getattr(loader, "sampler", None), UnrepeatedDistributedSampler)
        if repeats and len(loader.dataset) % size:
            logger.warning(
                "%d images cannot be split evenly between %d processes: some count twice in the metrics. Test with "
                "`--trainer.devices 1`, or with this package's data modules, which split them exactly.",
                len(loader.dataset),
                size,
            )
