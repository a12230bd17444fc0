"""Pre-processors that crop: a warning, and a check that defects are not cut off."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torchvision.transforms.v2 import Resize, Transform

from anomalib_exdd.images.masks import read_mask
from anomalib_exdd.images.reading import map_files
from anomalib_exdd.models.transforms import covered_pixels, crops_of, first_resize, seen_part, steps_of

logger = logging.getLogger(__name__)


class Cropping(Callback):
    """Warns that a pre-processor crops, and refuses training images whose defects are cut off."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the transform, and the training and validation images."""
        transform = getattr(pl_module.pre_processor, "transform", None)
        steps, crops = list(steps_of(transform)), _joined(crops_of(transform))
        if crops:
            logger.warning("The pre-processor crops images (%s): what it cuts off is not looked at.", crops)
        # Anomalib's data modules resize before everything else.
        resizes_later = first_resize(transform) is None and any(isinstance(step, Resize) for step in steps)
        if isinstance(trainer.datamodule, AnomalibDataModule) and resizes_later:
            msg = f"Put `Resize` first in the pre-processor ({_joined(steps)}): Anomalib's data modules resize first."
            raise ValueError(msg)
        if lost := _lost_defects([trainer.train_dataloader, trainer.val_dataloaders], transform):
            msg = (
                f"Nothing is left of the defects of {len(lost)} training images after cropping ({crops}): "
                f"{_joined(lost)}. Crop less, or take these images out."
            )
            raise ValueError(msg)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn of test images whose defects cannot be seen."""
        if lost := _lost_defects(trainer.test_dataloaders, getattr(pl_module.pre_processor, "transform", None)):
            message = "Nothing is left of the defects of %d test images after cropping; they count as defective: %s."
            logger.warning(message, len(lost), _joined(lost))


def _lost_defects(loaders: Any, transform: Transform | None) -> list[str]:
    """List the defective images of loaders of whose defects nothing is left after cropping; none without masks."""
    lost = []
    for loader in CombinedLoader(loaders).flattened:
        dataset = getattr(loader, "dataset", None)
        samples, augmentations = getattr(dataset, "samples", None), getattr(dataset, "augmentations", None)
        if samples is None or "mask_path" not in samples or not (crops_of(augmentations) or crops_of(transform)):
            continue
        defective = samples[(samples["label_index"] == 1) & (samples["mask_path"].fillna("") != "")]
        is_lost = partial(_is_cut_off, augmentations=augmentations, transform=transform)
        found = map_files(is_lost, list(defective["mask_path"]), "Looking for defects that are cut off")
        lost += [f"`{path}`" for path in defective["image_path"][found]]
    return lost


def _is_cut_off(mask_path: str, augmentations: Transform | None, transform: Transform | None) -> bool:
    mask = read_mask(mask_path).numpy()
    # Random augmentations have no certain place, but the crop behind them has.
    part = seen_part([augmentations, transform], mask.shape) or seen_part([transform], mask.shape)
    if part is None:
        return False
    rows = slice(*covered_pixels(part.top, part.height, mask.shape[0]))
    columns = slice(*covered_pixels(part.left, part.width, mask.shape[1]))
    return not np.any(mask[rows, columns])


def _joined(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
