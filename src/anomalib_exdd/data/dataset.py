"""The data set behind all data modules here: a table of samples, read to items that keep their defects and kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem
from anomalib.data.utils import LabelName
from pandas import DataFrame
from torch import Tensor
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as transforms

from anomalib_exdd.images.masks import DefectMask, check_same_size, read_mask
from anomalib_exdd.images.reading import WHITE_LEVEL, read_image

# Items and batches differ from Anomalib's own by plain attributes, not by fields of the dataclass: Anomalib builds
# other classes from the fields (NumPy items, its own batches where a tiled ensemble collates), and these would refuse
# an unknown one. Every model of Anomalib's therefore sees an ordinary batch.


class DefectItem(ImageItem):  # type: ignore[misc]
    """An image with label, mask, and what :func:`with_optional_columns` names."""

    origins: Sequence[str] = ()
    kind: str = ""
    has_boxes: bool = False


class DefectBatch(ImageBatch):  # type: ignore[misc]
    """A batch of images with labels, masks, and what is known of each item; lists are empty if nothing is of any."""

    item_class = DefectItem
    origins: Sequence[Sequence[str]] = ()
    kinds: Sequence[str] = ()
    has_boxes: Sequence[bool] = ()

    @property
    def is_synthetic(self) -> Tensor:
        """Whether each image is synthetic, bool, shape (B,), on the device of the images."""
        images = cast("Tensor", self.image)
        origins = self.origins or [()] * len(images)
        return torch.tensor([bool(paths) for paths in origins], dtype=torch.bool, device=images.device)

    @property
    def items(self) -> list[ImageItem]:
        """The items of the batch, :class:`DefectItem`, each with its own origins, kind and ``has_boxes``."""
        items: list[Any] = super().items
        for name, values in (("origins", self.origins), ("kind", self.kinds), ("has_boxes", self.has_boxes)):
            for item, value in zip(items, values, strict=False):  # no values: each item has the default
                setattr(item, name, value)
        return items

    @classmethod
    def collate(cls, items: Sequence[ImageItem]) -> DefectBatch:
        """Collate items to a batch; those of other classes are real images, of no known kind."""
        batch = cast("DefectBatch", super().collate(list(items)))
        batch.origins = [list(getattr(item, "origins", ())) for item in items]
        batch.kinds = [getattr(item, "kind", "") for item in items]
        batch.has_boxes = [getattr(item, "has_boxes", False) for item in items]
        return batch

    def update(self, in_place: bool = True, **changes: Any) -> DefectBatch:
        """Replace fields, in this batch or in a copy of it; origins, kinds and ``has_boxes`` of the images stay."""
        updated = cast("DefectBatch", super().update(in_place, **changes))
        updated.origins, updated.kinds, updated.has_boxes = self.origins, self.kinds, self.has_boxes
        return updated


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
        samples = samples.copy()
        samples.attrs["task"] = samples.attrs.get("task", task_of(samples))
        self.samples = with_optional_columns(samples)

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
        """Read an image ``[3, H, W]`` (float32, 0..1) with its mask ``[H, W]`` (bool; only for segmentation).

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
        item = DefectItem(
            image=image,
            gt_mask=mask,  # validated into a plain Mask of booleans
            gt_label=torch.tensor(int(sample.label_index)),
            image_path=str(sample.image_path),
            mask_path=str(sample.mask_path),
        )
        item.origins, item.kind, item.has_boxes = list(sample.origins), str(sample.kind), bool(sample.has_boxes)
        return item

    @property
    def collate_fn(self) -> Callable[[list[DefectItem]], DefectBatch]:
        """See :func:`collate`."""
        return collate


def collate(items: list[DefectItem]) -> DefectBatch:
    """Collate items to a batch with images ``[B, 3, H, W]``, of the size of the item with the longest edge.

    Anomalib does the same, but resizes masks by the nearest pixel, which may lose a defect.
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
    if "origins" not in samples:
        samples["origins"] = [()] * len(samples)
    samples["is_synthetic"] = samples["origins"].map(bool).astype(bool)
    for name, default in (("kind", ""), ("has_boxes", False)):
        if name not in samples:
            samples[name] = default
    return samples
