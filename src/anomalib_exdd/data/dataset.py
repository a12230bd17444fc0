"""The data set behind all data modules here: a table of samples, read to items that keep their defects and kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem
from anomalib.data.utils import LabelName
from pandas import DataFrame
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as transforms

from anomalib_exdd.images.masks import DefectMask, check_same_size, read_mask
from anomalib_exdd.images.reading import WHITE_LEVEL, read_image

# What else is known of items and batches is in plain attributes, not in fields of the dataclass: Anomalib builds other
# classes from the fields (NumPy items, its own batches where a tiled ensemble collates), and these would refuse an
# unknown one. Every model of Anomalib's therefore sees an ordinary batch.


class DefectBatch(ImageBatch):  # type: ignore[misc]
    """A batch of images with labels, masks, and for each image what :func:`with_optional_columns` names."""

    origins: Sequence[Sequence[str]] = ()
    kinds: Sequence[str] = ()
    has_boxes: Sequence[bool] = ()

    @classmethod
    def collate(cls, items: Sequence[ImageItem]) -> DefectBatch:
        """Collate items to a batch with images ``[B, 3, H, W]``, of the size of the item with the longest edge.

        Anomalib does the same, but resizes masks by the nearest pixel, which may lose a defect. Items of other classes
        are real images, of no known kind.
        """
        size = list(max((torch.as_tensor(item.image).shape[-2:] for item in items), key=max))
        for item in items:
            item.image = transforms.resize(item.image, size)
            if item.gt_mask is not None:
                item.gt_mask = transforms.resize(DefectMask(item.gt_mask), size)
        batch = cast("DefectBatch", super().collate(list(items)))
        batch.origins = [list(getattr(item, "origins", ())) for item in items]
        batch.kinds = [getattr(item, "kind", "") for item in items]
        batch.has_boxes = [getattr(item, "has_boxes", False) for item in items]
        return batch


class DefectDataset(AnomalibDataset):  # type: ignore[misc]
    """Images with labels and, where they are known, masks of their defects.

    The task is ``segmentation`` if every defective image has a mask: items then carry a mask, all zero for normal
    images. Otherwise it is ``classification``: items carry the image label only, and pixel metrics do not apply.

    Args:
        samples: Table with the columns ``image_path``, ``mask_path`` (empty where there is none), ``label_index``
            (0 normal, 1 defective) and ``split``, and optionally those that :func:`with_optional_columns` adds.
            ``attrs["task"]`` overrides the task found from the masks: a defective image without one then has an
            all-zero mask.
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
        samples = with_optional_columns(samples)
        samples.attrs.setdefault("task", task_of(samples))
        self.samples = samples

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._name

    @property
    def task(self) -> TaskType:
        """``segmentation`` if every defective image has a mask, else ``classification``."""
        # Concatenating a table with masks and one without drops pandas' attrs; the samples still know.
        return TaskType(self.samples.attrs.get("task", task_of(self.samples)))

    def __getitem__(self, index: int) -> ImageItem:
        """Read an image ``[3, H, W]`` (float32, 0..1) with its mask ``[H, W]`` (bool; only for segmentation).

        What :func:`with_optional_columns` names (``origins``, ``kind``, ``has_boxes``) are attributes of the item.

        Raises:
            ValueError: If the image or the mask cannot be decoded, or if they differ in size.
        """
        sample = self.samples.iloc[index]
        image, mask = read_image(sample.image_path, self.white_level), None
        if self.task == TaskType.SEGMENTATION:
            mask = DefectMask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
            if sample.label_index == LabelName.ABNORMAL and sample.mask_path:
                mask = read_mask(sample.mask_path)
                check_same_size(sample.image_path, image.shape[-2:], sample.mask_path, mask.shape)
        if self.augmentations:
            image, mask = (self.augmentations(image), None) if mask is None else self.augmentations(image, mask)
        item: Any = ImageItem(
            image=image,
            gt_mask=mask,  # validated into a plain Mask of booleans
            gt_label=torch.tensor(int(sample.label_index)),
            image_path=str(sample.image_path),
            mask_path=str(sample.mask_path),
        )
        item.origins, item.kind, item.has_boxes = list(sample.origins), str(sample.kind), bool(sample.has_boxes)
        return item

    @property
    def collate_fn(self) -> Callable[[Sequence[ImageItem]], DefectBatch]:
        """See :meth:`DefectBatch.collate`."""
        return DefectBatch.collate


def task_of(samples: DataFrame) -> str:
    """Return ``segmentation`` if every defective image of a table has a mask, else ``classification``."""
    defective = samples[samples["label_index"] == LabelName.ABNORMAL]
    return str(TaskType.SEGMENTATION.value if (defective["mask_path"] != "").all() else TaskType.CLASSIFICATION.value)


def with_optional_columns(samples: DataFrame) -> DataFrame:
    """Return a copy of a table of samples with the columns that not every data set has.

    - ``origins``: for a synthetic image the paths of the images that it was made from, at least one; else empty.
    - ``is_synthetic``: whether there are origins.
    - ``kind``: kind of the defect; empty where it is unknown and for normal images.
    - ``has_boxes``: whether the mask has boxes around defects instead of their outlines.
    """
    samples = samples.copy()
    for name, default in (("origins", ()), ("kind", ""), ("has_boxes", False)):
        if name not in samples:
            samples[name] = [default] * len(samples)
    samples["is_synthetic"] = samples["origins"].map(bool).astype(bool)
    return samples
