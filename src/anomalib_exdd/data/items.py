"""Items and batches that know the kinds of defects, which images are synthetic, and what these were made from.

Both differ from Anomalib's own by plain attributes, not by fields of the dataclass: Anomalib builds other classes
from the fields (NumPy items, its own batches where a tiled ensemble collates), and these would refuse an unknown one.
Every model of Anomalib's therefore sees an ordinary batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from anomalib.data import ImageBatch, ImageItem
from torch import Tensor


class DefectItem(ImageItem):  # type: ignore[misc]
    """An image with label and mask, and where it comes from.

    Attributes:
        origins: Paths of the images that a synthetic image was made from, and never empty for one; empty for a real
            image.
        kind: Kind of the defect, such as "scratch"; empty if it is unknown, and for a normal image.
    """

    origins: Sequence[str] = ()
    kind: str = ""


class DefectBatch(ImageBatch):  # type: ignore[misc]
    """A batch of images with labels and masks, and where they come from.

    Attributes:
        origins: For each image the paths of those that it was made from, as in :class:`DefectItem`; an empty list if
            all images are real.
        kinds: For each image the kind of its defect, as in :class:`DefectItem`; an empty list if none is known.
    """

    item_class = DefectItem
    origins: Sequence[Sequence[str]] = ()
    kinds: Sequence[str] = ()

    @property
    def is_synthetic(self) -> Tensor:
        """Whether each image is synthetic, bool, shape (B,), on the device of the images."""
        images = cast("Tensor", self.image)
        origins = self.origins or [()] * len(images)
        return torch.tensor([bool(paths) for paths in origins], dtype=torch.bool, device=images.device)

    @property
    def items(self) -> list[ImageItem]:
        """The items of the batch, :class:`DefectItem`, each with its own origins and kind."""
        items = super().items
        origins, kinds = self.origins or [()] * len(items), self.kinds or [""] * len(items)
        for item, paths, kind in zip(cast("list[DefectItem]", items), origins, kinds, strict=True):
            item.origins, item.kind = paths, kind
        return items

    @classmethod
    def collate(cls, items: Sequence[ImageItem]) -> DefectBatch:
        """Collate items to a batch; those that know nothing of origins are real images, of no known kind."""
        batch = cast("DefectBatch", super().collate(list(items)))
        batch.origins = [list(getattr(item, "origins", ())) for item in items]
        batch.kinds = [getattr(item, "kind", "") for item in items]
        return batch

    def update(self, in_place: bool = True, **changes: Any) -> DefectBatch:
        """Replace fields, in this batch or in a copy of it; the images' origins and kinds stay."""
        updated = cast("DefectBatch", super().update(in_place, **changes))
        updated.origins, updated.kinds = self.origins, self.kinds
        return updated
