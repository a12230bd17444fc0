"""Defect regions: the connected parts of a predicted mask, as boxes in pixels of the original image."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .transforms import Part


class Reason(NamedTuple):
    """Why an image or a region is taken for a defect.

    Attributes:
        reason: "known" if it resembles defects of the training images, "unfamiliar" if it resembles neither these nor
            normal images.
        kind: Kind of the defects that it resembles, such as "scratch"; None for an unfamiliar one, and if the kind of
            these defects is not known.
        kind_share: Share of the deciding patches whose nearest defect is of that kind, 0 to 1.
    """

    reason: Literal["known", "unfamiliar"]
    kind: str | None = None
    kind_share: float | None = None

    def __str__(self) -> str:
        """Return the reason in words, for pictures."""
        if self.reason == "unfamiliar":
            return self.reason
        if self.kind is None or self.kind_share is None:
            return "resembles known defects"
        return f"resembles {self.kind} ({self.kind_share:.0%})".replace("%", " %")


class Region(NamedTuple):
    """A connected part of a predicted mask.

    Attributes:
        box: Left, top, width and height in pixels of the original image: the smallest box that covers the region.
        area: Number of pixels of the original image that the region covers, rounded, at least 1.
        value: Highest value of the anomaly map in the region.
        reason: "known" or "unfamiliar", for a model that gives reasons; see :class:`.Reason`.
        kind: Kind of the defects that it resembles, if it is known.
    """

    box: tuple[int, int, int, int]
    area: int
    value: float
    reason: str | None = None
    kind: str | None = None


def find_regions(
    mask_HW: NDArray[np.bool_],
    values_HW: NDArray[np.float32],
    size: Sequence[int],
    part: Part | None = None,
    reason_of: Callable[[tuple[int, int, int, int]], Reason] | None = None,
) -> list[Region]:
    """List the regions of a mask, that with the highest value first.

    Pixels that touch at a side or at a corner belong to the same region. A pixel of the mask covers as much of the
    original image as resizing made it from.

    Args:
        mask_HW: Predicted mask, bool, shape (H, W).
        values_HW: Anomaly map, floating point, shape (H, W).
        size: Height and width of the original image.
        part: The part of it that mask and map show; by default the whole.
        reason_of: Finds the reason of a box in pixels of the mask: left, top, width and height.

    Returns:
        The regions; of equal ones the upper first. What lies where the image was padded is left out.
    """
    count, labels_HW, statistics, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    if count == 1:  # the background
        return []
    part = part or Part(Fraction(0), Fraction(0), Fraction(size[0]), Fraction(size[1]))
    highest = ndimage.maximum(values_HW, labels_HW, range(1, count))
    pixel_height, pixel_width = part.height / mask_HW.shape[0], part.width / mask_HW.shape[1]
    regions = []
    for (left, top, width, height, area), value in zip(statistics[1:].tolist(), highest, strict=True):
        x, x_end = _outwards(part.left + left * pixel_width, width * pixel_width, size[1])
        y, y_end = _outwards(part.top + top * pixel_height, height * pixel_height, size[0])
        if x < x_end and y < y_end:
            box = (x, y, x_end - x, y_end - y)
            covered = min(round(area * pixel_height * pixel_width), box[2] * box[3])
            found = None if reason_of is None else reason_of((left, top, width, height))
            reason, kind = (None, None) if found is None else found[:2]
            regions.append(Region(box, max(1, covered), float(value), reason, kind))
    return sorted(regions, key=lambda region: (-region.value, region.box[1], region.box[0]))


def _outwards(start: Fraction, length: Fraction, most: int) -> tuple[int, int]:
    """Return the pixels, of ``most``, that a stretch of an axis touches: the first, and that behind the last."""
    return max(0, math.floor(start)), min(most, math.ceil(start + length))
