"""Pre-processors that crop: what they cut off is told, and no training starts from defects that lie there."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Resize, Transform

from anomalib_exdd.images.masks import read_mask
from anomalib_exdd.images.reading import map_files
from anomalib_exdd.models.transforms import crops_of, first_resize, seen_part, steps_of

logger = logging.getLogger(__name__)


class Cropping(Callback):
    """Tells what a pre-processor cuts off, and looks for defects there."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the training and validation images.

        Raises:
            ValueError: If nothing is left of a defect that the model is to learn from, or if images would be resized
                before a crop that is meant to come first.
        """
        transform = _transform_of(pl_module)
        _tell(transform)
        if isinstance(trainer.datamodule, AnomalibDataModule):
            _check_order(transform)
        loaders = [trainer.train_dataloader, *_as_list(trainer.val_dataloaders)]
        if lost := [image for loader in loaders for image in lost_defects(loader, transform)]:
            msg = (
                f"Nothing is left of the defects of {len(lost)} training images after cropping "
                f"({_steps(crops_of(transform))}): {_named(lost)}. Crop less, or take these images out."
            )
            raise ValueError(msg)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn of test images whose defects cannot be seen."""
        transform = _transform_of(pl_module)
        _tell(transform)
        if lost := [
            image for loader in _as_list(trainer.test_dataloaders) for image in lost_defects(loader, transform)
        ]:
            logger.warning(
                "Nothing is left of the defects of %d test images after cropping, but they count as defective: %s.",
                len(lost),
                _named(lost),
            )

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Say what is not predicted."""
        del trainer
        _tell(_transform_of(pl_module))


def lost_defects(loader: Any, transform: Transform | None) -> list[str]:
    """List the defective images of whose defects nothing is left after cropping.

    Args:
        loader: Loader of a data set of Anomalib.
        transform: The pre-processor's transform.

    Returns:
        Paths; none if the data have no masks, or nothing is cropped.
    """
    dataset = getattr(loader, "dataset", None)
    samples = getattr(dataset, "samples", None)
    augmentations = getattr(dataset, "augmentations", None)
    if samples is None or "mask_path" not in samples or not (crops_of(augmentations) or crops_of(transform)):
        return []
    defective = samples[(samples["label_index"] == 1) & (samples["mask_path"].fillna("") != "")]

    def is_lost(mask_path: str) -> bool:
        mask = read_mask(mask_path).numpy()
        # Random augmentations have no certain place, but the crop behind them has.
        part = seen_part([augmentations, transform], mask.shape) or seen_part([transform], mask.shape)
        if part is None:
            return False
        rows, columns = (
            slice(max(0, math.floor(start)), math.ceil(start + length))
            for start, length in ((part.top, part.height), (part.left, part.width))
        )
        return not np.any(mask[rows, columns])

    lost = map_files(is_lost, list(defective["mask_path"]), "Looking for defects that are cut off")
    return [str(path) for path in defective["image_path"][lost]]


def _tell(transform: Transform | None) -> None:
    if crops := crops_of(transform):
        logger.warning(
            "The pre-processor crops images (%s): what it cuts off is not looked at. Pictures show the part that is; "
            "boxes of regions are in pixels of the whole image.",
            _steps(crops),
        )


def _check_order(transform: Transform | None) -> None:
    """Refuse a resize behind another change of the geometry: Anomalib's data modules resize before everything else."""
    if first_resize(transform) is None and any(isinstance(step, Resize) for step in steps_of(transform)):
        msg = (
            f"The pre-processor resizes after another step ({_steps(list(steps_of(transform)))}), but Anomalib's data "
            "modules resize first. Put `Resize` first, or crop the image files themselves."
        )
        raise ValueError(msg)


def _transform_of(module: Any) -> Transform | None:
    return getattr(module.pre_processor, "transform", None)


def _steps(steps: Sequence[Transform]) -> str:
    return ", ".join(map(str, steps))


def _named(paths: Sequence[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths)


def _as_list(loaders: Any) -> list[Any]:
    return [] if loaders is None else list(loaders) if isinstance(loaders, Sequence) else [loaders]
