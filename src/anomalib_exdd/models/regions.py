"""Defect regions: the connected parts of a predicted mask, as boxes in pixels of the original image."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.reading import inspect_image

from .transforms import Part, covered_pixels, crops_of, first_resize, seen_part


class Reason(NamedTuple):
    """Why an image or a region is taken for a defect."""

    reason: Literal["known", "unfamiliar"]  # "known" resembles defects of the training images
    kind: str | None = None  # of the defects that it resembles, such as "scratch"; None if not known
    kind_share: float | None = None  # of the deciding patches, those whose nearest defect is of that kind, 0 to 1

    def __str__(self) -> str:
        """Return the reason in words, for pictures."""
        if self.reason == "unfamiliar":
            return self.reason
        if self.kind is None or self.kind_share is None:
            return "resembles known defects"
        return f"resembles {self.kind} ({self.kind_share:.0%})".replace("%", " %")


class Region(NamedTuple):
    """A connected part of a predicted mask."""

    box: tuple[int, int, int, int]  # left, top, width and height in pixels of the original image
    area: int  # pixels of the original image that the region covers, rounded, at least 1
    value: float  # highest of the anomaly map in the region
    reason: str | None = None  # "known" or "unfamiliar", for a model that gives reasons
    kind: str | None = None  # of the defects that it resembles, if it is known


def find_regions(
    mask_HW: NDArray[np.bool_],
    values_HW: NDArray[np.float32],
    size: Sequence[int],
    part: Part | None = None,
    reason_of: Callable[[tuple[int, int, int, int]], Reason] | None = None,
) -> list[Region]:
    """List the regions of a mask, that with the highest value first.

    Pixels that touch at a side or at a corner belong to the same region. A pixel of the mask covers as much of the
    original image as resizing made it from. Regions in the padding of the image are left out.

    Args:
        mask_HW: Predicted mask, bool, shape (H, W).
        values_HW: Anomaly map, floating point, shape (H, W).
        size: Height and width of the original image.
        part: The part of it that mask and map show; by default the whole.
        reason_of: Finds the reason of a box in pixels of the mask: left, top, width and height.
    """
    count, labels_HW, statistics, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    if count == 1:  # the background
        return []
    part = part or Part(Fraction(0), Fraction(0), Fraction(size[0]), Fraction(size[1]))
    highest = ndimage.maximum(values_HW, labels_HW, range(1, count))
    pixel_height, pixel_width = part.height / mask_HW.shape[0], part.width / mask_HW.shape[1]
    regions = []
    for (left, top, width, height, area), value in zip(statistics[1:].tolist(), highest, strict=True):
        x, x_end = covered_pixels(part.left + left * pixel_width, width * pixel_width, size[1])
        y, y_end = covered_pixels(part.top + top * pixel_height, height * pixel_height, size[0])
        if x < x_end and y < y_end:
            box = (x, y, x_end - x, y_end - y)
            covered = min(round(area * pixel_height * pixel_width), box[2] * box[3])
            reason, kind = (None, None) if reason_of is None else reason_of((left, top, width, height))[:2]
            regions.append(Region(box, max(1, covered), float(value), reason, kind))
    return sorted(regions, key=lambda region: (-region.value, region.box[1], region.box[0]))


def locate_regions(
    batch: Any, paths: Sequence[str], transforms: Sequence[Transform | None]
) -> list[list[Region] | None]:
    """List the regions of every image of a post-processed batch, in pixels of the image files.

    None for an image where that cannot be done: without a mask or a file, or after transforms that are not known. The
    batch's ``reasons``, if there are any, give those of the regions.
    """
    masks, maps = batch.pred_mask, batch.anomaly_map
    # Without a threshold, Anomalib's "mask" is the map itself.
    if masks is None or maps is None or masks.dtype != torch.bool:
        return [None] * len(paths)
    reasons = getattr(batch, "reasons", None) or [None] * len(paths)
    sizes = [_size_of(path) for path in paths]
    # Images that differ in size when a batch is made of them are stretched before they are cropped.
    resize = next(filter(None, map(first_resize, transforms)), None)
    to_one_size = resize is not None and isinstance(resize.size, Sequence) and len(resize.size) == 2
    if len(set(sizes)) > 1 and any(map(crops_of, transforms)) and not to_one_size:
        return [None] * len(paths)
    located: list[list[Region] | None] = []
    for mask, values, size, reason in zip(masks, maps, sizes, reasons, strict=True):
        regions = None
        if size is not None and (part := seen_part(transforms, size)) is not None:
            regions = find_regions(_plane(mask), _plane(values), size, part, reason and reason.of_box)
        located.append(regions)
    return located


def _size_of(path: str) -> tuple[int, int] | None:
    try:
        return inspect_image(path)
    except ValueError:  # never a file
        return None


def _plane(values: Tensor) -> Any:
    return np.asarray(values.detach().cpu()).reshape(values.shape[-2:])
