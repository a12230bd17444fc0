"""The data set behind all data modules here: one table of samples, read with masks that keep their defects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset
from anomalib.data.utils import LabelName
from pandas import DataFrame
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as transforms

from anomalib_exdd.images.masks import DefectMask
from anomalib_exdd.images.reading import WHITE_LEVEL, check_same_size, read_image, read_mask

from .items import DefectBatch, DefectItem


class DefectDataset(AnomalibDataset):  # type: ignore[misc]
    """Images with labels and, where they are known, masks of their defects.

    The task is ``segmentation`` if every defective image has a mask: items then carry a mask, all zero for normal
    images. Otherwise it is ``classification``: items carry the image label only, and pixel metrics do not apply.

    Args:
        samples: Table with the columns ``image_path``, ``mask_path`` (empty where there is none), ``label_index``
            (0 normal, 1 defective) and ``split``. ``attrs["task"]`` overrides the task found from the masks: a
            defective image without one then has an all-zero mask. Further columns may say more, see :func:`completed`.
        name: Name of the data set.
        augmentations: Transforms applied to image and mask together.
        white_level: The number that is white in images of more than 8 bits.
    """

    def __init__(
        self,
        samples: DataFrame,
        name: str = "Defect",
        augmentations: Transform | None = None,
        white_level: int = WHITE_LEVEL,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self._name = name
        self.white_level = white_level
        samples = samples.copy()
        samples.attrs["task"] = samples.attrs.get("task", task_of(samples))
        self.samples = completed(samples)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._name

    @property
    def task(self) -> TaskType:
        """``segmentation`` if every defective image has a mask, else ``classification``."""
        # Concatenating a table with masks and one without drops pandas' attrs; the samples still know.
        return TaskType(self.samples.attrs.get("task", task_of(self.samples)))

    def __getitem__(self, index: int) -> DefectItem:
        """Read one image, its mask and its label, and apply the augmentations to image and mask together.

        Args:
            index: Row of ``samples``.

        Returns:
            Item with the image ``[3, H, W]`` (float32, 0..1), the mask ``[H, W]`` (bool; only for segmentation), the
            label, the kind of its defect and, if it is synthetic, what it was made from.

        Raises:
            ValueError: If the image or the mask cannot be decoded, or if they differ in size.
        """
        sample = self.samples.iloc[index]
        image = read_image(sample.image_path, self.white_level)
        mask: DefectMask | None = None
        if self.task == TaskType.SEGMENTATION:
            mask = _read_sample_mask(sample, image)
            if self.augmentations:
                image, mask = self.augmentations(image, mask)
        elif self.augmentations:
            image = self.augmentations(image)
        item = DefectItem(
            image=image,
            gt_mask=mask,  # validated into a plain Mask of booleans
            gt_label=torch.tensor(int(sample.label_index)),
            image_path=str(sample.image_path),
            mask_path=str(sample.mask_path),
        )
        item.origins = list(getattr(sample, "origins", ()))
        item.kind = str(getattr(sample, "kind", ""))
        return item

    @property
    def collate_fn(self) -> Callable[[list[DefectItem]], DefectBatch]:
        """Collate items to a batch; images of different sizes are resized to the one with the longest edge."""
        return collate


def collate(items: list[DefectItem]) -> DefectBatch:
    """Collate items to a batch, without losing a defect where sizes differ.

    Anomalib resizes items of different sizes to that with the longest edge, and masks by the nearest pixel. Usually the
    model's own resize has made all sizes equal before; here it is done for those who use the data alone.

    Args:
        items: Items of a :class:`DefectDataset`.

    Returns:
        The batch, with images ``[B, 3, H, W]``.
    """
    sizes = [tuple(torch.as_tensor(item.image).shape[-2:]) for item in items]
    if len(set(sizes)) > 1:
        size = list(max(sizes, key=max))
        for item in items:
            item.image = transforms.resize(item.image, size)
            if item.gt_mask is not None:
                item.gt_mask = transforms.resize(DefectMask(item.gt_mask), size)
    return DefectBatch.collate(items)


def task_of(samples: DataFrame) -> str:
    """Say which task a table of samples allows.

    Args:
        samples: Table with the columns ``label_index`` and ``mask_path``.

    Returns:
        ``segmentation`` if every defective image has a mask, else ``classification``.
    """
    defective = samples[samples["label_index"] == LabelName.ABNORMAL]
    return str(TaskType.SEGMENTATION.value if (defective["mask_path"] != "").all() else TaskType.CLASSIFICATION.value)


def completed(samples: DataFrame) -> DataFrame:
    """Complete a table by the columns that not every data set has.

    Args:
        samples: Table of samples. Its column ``origins``, if it has one, holds for each row the paths of the images
            that a synthetic image was made from (at least one), and nothing for a real image. Its column ``kind``, if
            it has one, holds the kind of the defect (str), and nothing where it is unknown and for normal images.

    Returns:
        Copy of the table with the columns ``origins`` (tuples; empty ones where the table has none), ``is_synthetic``
        (bool) and ``kind`` (empty where the table has none).
    """
    samples = samples.copy()
    if "origins" not in samples:
        samples["origins"] = [()] * len(samples)
    samples["is_synthetic"] = samples["origins"].map(bool).astype(bool)
    if "kind" not in samples:
        samples["kind"] = ""
    return samples


def _read_sample_mask(sample: Any, image: torch.Tensor) -> DefectMask:
    if sample.label_index == LabelName.NORMAL or not sample.mask_path:
        return DefectMask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
    mask = read_mask(sample.mask_path)
    check_same_size(sample.image_path, image.shape[-2:], sample.mask_path, mask.shape)
    return mask
