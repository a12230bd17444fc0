"""Where the inspected part is: defects belong on it, not on the table behind it."""

import cv2
import numpy as np
from scipy import ndimage

from .base import Levels, Mask, Pixels

FLAT = 4.0  # grey levels: a place with less standard deviation around it is flat
SPREAD = 12.0  # grey levels that 95 % of a background's pixels stay within, around its colour
STEP = 30.0  # grey levels, at least, between a background and the part beside it
BORDER_SHARE = 0.1  # of the image's border, at least, that a background touches
BACKGROUND_SHARE = (0.02, 0.9)  # of the image: anything else is no background
LEAST_PIECE = 0.05  # of the part's largest piece: smaller ones are dirt on the background
WINDOW = 7  # pixels


def foreground(image: Pixels) -> Mask:
    """Find the part in an image, `[H, W, 3]`, RGB, uint8.

    Many surfaces fill their image. A region is a background only if it touches the border over a tenth of its length,
    is flat, has one colour, ends in a step in brightness or colour, and leaves a tenth of the image to the part.
    Otherwise the whole image is the part: a defect on a background does less harm than a region of the part without
    any. Flat regions inside the part belong to it.

    Returns:
        `[H, W]`, bool, True on the part; never all False.
    """
    everything = np.ones(image.shape[:2], dtype=np.bool_)
    if min(image.shape[:2]) <= 2 * WINDOW:
        return everything
    levels = np.asarray(cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1.0), dtype=np.float32)
    shifted = levels - levels.mean(axis=(0, 1), keepdims=True)  # squares of small numbers lose no digits
    mean, square = (
        cv2.boxFilter(values, -1, (WINDOW, WINDOW), borderType=cv2.BORDER_REFLECT_101)
        for values in (shifted, shifted * shifted)
    )
    flat = np.sqrt(np.maximum(square - mean * mean, 0)).max(axis=2) < FLAT
    count, labels = cv2.connectedComponents(flat.astype(np.uint8), connectivity=4)
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    touching = np.bincount(border, minlength=count) / len(border)
    background = np.zeros_like(everything)
    for label in range(1, count):
        if touching[label] >= BORDER_SHARE:
            background |= _background(levels, np.asarray(labels == label))
    pieces, _ = ndimage.label(~background)
    areas = np.bincount(pieces.ravel())
    areas[0] = 0  # the background
    part = (areas >= LEAST_PIECE * areas.max())[pieces]
    low, high = BACKGROUND_SHARE
    return part if low <= 1 - float(part.mean()) <= high else everything


def _background(levels: Levels, region: Mask) -> Mask:
    """The background that a flat region at the border belongs to; empty if it is none."""
    nothing = np.zeros_like(region)
    distance = np.abs(levels - np.median(levels[region], axis=0)).max(axis=2)
    if np.quantile(distance[region], 0.95) > SPREAD:
        return nothing
    # Windows that see the part's blurred edge are not flat: the background ends that much further on.
    background = np.asarray(region | (_dilated(region) & (distance <= SPREAD)))
    beside = _dilated(background) & ~background
    return background if beside.any() and np.median(distance[beside]) >= STEP else nothing


def _dilated(region: Mask) -> Mask:
    square = np.ones((2 * WINDOW + 1, 2 * WINDOW + 1), np.uint8)
    return np.asarray(cv2.dilate(region.astype(np.uint8), square).astype(np.bool_))
