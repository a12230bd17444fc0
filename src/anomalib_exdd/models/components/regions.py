"""Defect regions: the connected parts of a predicted mask, as boxes in pixels of the original image."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


class Region(NamedTuple):
    """A connected part of a predicted mask.

    Attributes:
        box: Left, top, width and height in pixels of the original image: the smallest box that covers the region.
        area: Number of pixels of the original image that the region covers, rounded, at least 1.
        value: Highest value of the anomaly map in the region.
    """

    box: tuple[int, int, int, int]
    area: int
    value: float


def find_regions(mask_HW: NDArray[np.bool_], values_HW: NDArray[np.float32], size: Sequence[int]) -> list[Region]:
    """List the regions of a mask, that with the highest value first.

    Pixels that touch at a side or at a corner belong to the same region. A pixel of the mask covers as much of the
    original image as resizing made it from.

    Args:
        mask_HW: Predicted mask, bool, shape (H, W).
        values_HW: Anomaly map, floating point, shape (H, W).
        size: Height and width of the original image, of which mask and map show the whole.

    Returns:
        The regions; of equal ones the upper first.
    """
    count, labels_HW, statistics, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    if count == 1:  # the background
        return []
    highest = ndimage.maximum(values_HW, labels_HW, range(1, count))
    rows, columns = mask_HW.shape
    height, width = size
    regions = []
    for (left, top, box_width, box_height, area), value in zip(statistics[1:].tolist(), highest, strict=True):
        x, x_end = _outwards(left, left + box_width, width, columns)
        y, y_end = _outwards(top, top + box_height, height, rows)
        covered = max(1, round(area * height * width / (rows * columns)))
        regions.append(Region((x, y, x_end - x, y_end - y), covered, float(value)))
    return sorted(regions, key=lambda region: (-region.value, region.box[1], region.box[0]))


def _outwards(start: int, end: int, length: int, cells: int) -> tuple[int, int]:
    """Return the pixels, of ``length``, that the cells from ``start`` to before ``end``, of ``cells``, touch."""
    return start * length // cells, -(-end * length // cells)
