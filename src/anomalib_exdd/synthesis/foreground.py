"""Where the part is: defects belong on it, not on the table behind it."""

import cv2
import numpy as np
from numpy.typing import NDArray

from .base import Mask, Pixels

FLAT = 4.0  # standard deviation in a window of 7 x 7, in grey levels, above which a place is no flat background
SPREAD = 12.0  # grey levels that 95 % of a background's pixels stay within, around its color
STEP = 30.0  # grey levels, at least, between a background and the part beside it
BORDER_SHARE = 0.1  # of the image's border, at least, that a background touches
BACKGROUND_SHARE = (0.02, 0.9)  # of the image: outside of it, the background is doubted
_WINDOW = 7  # pixels


def foreground(image: Pixels) -> Mask:
    """Find the part in an image, to keep defects on it.

    Many surfaces fill their image. A background is therefore believed only if it is clear: it touches the border over
    a tenth of its length, is flat, has one color, ends in a step in brightness or color, and leaves a tenth of the
    image to the part. In every other case the whole image is the part: a defect drawn on a background is a lesser
    evil than a region of the part that never gets one. Flat regions inside the part stay part of it.

    Args:
        image: `[H, W, 3]`, RGB, uint8.

    Returns:
        `[H, W]`, bool, True on the part; never all False.
    """
    everything = np.ones(image.shape[:2], dtype=np.bool_)
    if min(image.shape[:2]) <= 2 * _WINDOW:
        return everything
    levels = np.asarray(cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1.0), dtype=np.float32)
    flat = _local_deviation(levels) < FLAT
    count, labels = cv2.connectedComponents(flat.astype(np.uint8), connectivity=4)
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    touching = np.bincount(border, minlength=count) / len(border)
    background = np.zeros_like(everything)
    for label in range(1, count):
        if touching[label] >= BORDER_SHARE:
            background |= _background(levels, np.asarray(labels == label))
    part = _without_crumbs(~background)
    low, high = BACKGROUND_SHARE
    return part if low <= 1 - float(part.mean()) <= high else everything


def _local_deviation(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Standard deviation around each pixel, the greatest of the channels."""
    size = (_WINDOW, _WINDOW)
    shifted = levels - levels.mean(axis=(0, 1), keepdims=True)  # squares of small numbers lose no digits
    mean = cv2.boxFilter(shifted, -1, size, borderType=cv2.BORDER_REFLECT_101)
    square = cv2.boxFilter(shifted * shifted, -1, size, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(np.sqrt(np.maximum(square - mean * mean, 0)).max(axis=2))


def _background(levels: NDArray[np.float32], region: Mask) -> Mask:
    """Judge a flat region at the border: the background that it belongs to, or nothing."""
    color = np.median(levels[region], axis=0)
    distance = np.abs(levels - color).max(axis=2)
    if np.quantile(distance[region], 0.95) > SPREAD:
        return np.zeros_like(region)
    # Windows that see the part's blurred edge are not flat: the background ends that much further on.
    background = np.asarray(region | (_dilated(region, _WINDOW) & (distance <= SPREAD)))
    beside = np.asarray(_dilated(background, _WINDOW) & ~background)
    if not beside.any() or np.median(distance[beside]) < STEP:
        return np.zeros_like(region)
    return background


def _dilated(region: Mask, radius: int) -> Mask:
    square = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    return np.asarray(cv2.dilate(region.astype(np.uint8), square).astype(np.bool_))


def _without_crumbs(part: Mask) -> Mask:
    """Keep the pieces that measure at least a twentieth of the largest one: others are dirt on the background."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(part.astype(np.uint8), connectivity=4)
    if count < 2:
        return part
    areas = stats[:, cv2.CC_STAT_AREA]
    keep = areas >= 0.05 * areas[1:].max()
    keep[0] = False
    return np.asarray(keep[labels])
