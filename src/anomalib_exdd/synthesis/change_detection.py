"""What a synthesizer really changed: whether a defect is visible at all, and which pixels it covers.

Diffusion redraws everything inside its mask, most of it as the same surface: the mask that it was given is too large.
A threshold on the difference alone finds the redrawn texture too. A defect stands out from the surface around it,
compared with how much that surface varies itself:

    z = |G1(generated) - G8(original)| / local standard deviation of the original

where G1 and G8 are Gaussian filters of 1 and 8 pixels. Otsu's threshold of z gave the best masks of five variants on
real textures, rough ones and smooth ones.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from .base import Levels, Mask, Pixels

MaskMode = Literal["input", "difference", "intersection"]
"""`input`: the mask that the synthesizer was given. `difference`: what changed, a little beyond that mask too.
`intersection`: what changed inside that mask."""

FINE, COARSE = 1.0, 8.0  # widths of the Gaussian filters, in pixels
LEAST_DEVIATION = 1.0  # of the original around a pixel, in grey levels: rounding alone makes .3
LEAST_DIFFERENCE = 2.0  # grey levels, smoothed: less is no change, however smooth the surface
BEYOND = 8  # pixels that `difference` looks beyond the mask
CLOSING_RADIUS = 2  # pixels
LEAST_PIECE = 12  # pixels: smaller pieces are grain
LEAST_SHARE = 0.03  # of the given mask: if less is found, the given mask is kept


@dataclass(frozen=True)
class Change:
    """How much changed inside a mask, and outside it."""

    # 95th percentile of the smoothed absolute difference, in grey levels: redrawn texture reaches about its own grain.
    visible: float
    contrast: float  # 95th percentile of z, in standard deviations of the surface
    changed_share: float  # of the mask's pixels, those that differ by two grey levels or more, smoothed
    background_psnr: float  # peak signal-to-noise ratio outside, in dB; infinite if nothing changed there
    background_difference: float  # the greatest change outside, in grey levels


def measure_change(original: Pixels, generated: Pixels, mask: Mask) -> Change:
    """Measure what changed between two images, `[H, W, 3]`, uint8, in and outside a mask, `[H, W]`, bool, not empty."""
    difference = _smoothed_difference(original, generated)
    outside = np.abs(generated[~mask].astype(np.float64) - original[~mask])
    error = float(np.mean(outside**2)) if outside.size else 0.0
    return Change(
        visible=float(np.quantile(difference[mask], 0.95)),
        contrast=float(np.quantile(_prominence(original, generated)[mask], 0.95)),
        changed_share=float(np.mean(difference[mask] >= LEAST_DIFFERENCE)),
        background_psnr=float(10 * np.log10(255**2 / error)) if error else float("inf"),
        background_difference=float(outside.max()) if outside.size else 0.0,
    )


def changed_mask(original: Pixels, generated: Pixels, mask: Mask, mode: MaskMode) -> Mask:
    """Find the mask, `[H, W]`, bool, of a synthetic defect that was to be drawn into another mask, which is not empty.

    Otsu's method finds two classes even where nothing changed: check with `measure_change` first. Where hardly
    anything is found, the given mask is returned; the result is never empty. Images are `[H, W, 3]`, uint8.
    """
    if mode == "input":
        return mask.copy()
    prominence = _prominence(original, generated)
    # A pixel that did not change cannot be part of a new defect, however much the surface itself stands out there.
    changed = (prominence > _otsu(prominence[mask])) & (_smoothed_difference(original, generated) >= LEAST_DIFFERENCE)
    allowed = mask if mode == "intersection" else cv2.dilate(mask.astype(np.uint8), _disc(BEYOND)) > 0
    # Close gaps of some pixels and drop the smallest pieces.
    closed = cv2.morphologyEx((changed & allowed).astype(np.uint8), cv2.MORPH_CLOSE, _disc(CLOSING_RADIUS))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= LEAST_PIECE
    keep[0] = False  # what did not change
    found = keep[labels] & allowed
    enough = np.count_nonzero(found) >= LEAST_SHARE * np.count_nonzero(mask)
    return np.asarray(found) if enough else mask.copy()


def _smoothed_difference(original: Pixels, generated: Pixels) -> Levels:
    """Absolute difference `[H, W]`, the mean of the channels, in grey levels."""
    difference = np.abs(generated.astype(np.float32) - original).mean(axis=2)
    return np.asarray(cv2.GaussianBlur(difference, (0, 0), FINE), dtype=np.float32)


def _prominence(original: Pixels, generated: Pixels) -> Levels:
    """How far a pixel stands out, z above, `[H, W]`: the root of the mean square of the channels' z."""
    levels = original.astype(np.float32)
    middle = levels.mean(axis=(0, 1), keepdims=True)  # squares of small numbers lose no digits
    coarse = cv2.GaussianBlur(levels - middle, (0, 0), COARSE)
    square = cv2.GaussianBlur((levels - middle) ** 2, (0, 0), COARSE)
    deviation = np.maximum(np.sqrt(np.maximum(square - coarse**2, 0)), LEAST_DEVIATION)
    fine = cv2.GaussianBlur(generated.astype(np.float32) - middle, (0, 0), FINE)
    return np.asarray(np.sqrt((((fine - coarse) / deviation) ** 2).mean(axis=2)), dtype=np.float32)


def _otsu(values: Levels) -> float:
    """Threshold between two classes of numbers from 0 up, by Otsu's method on 256 steps."""
    highest = float(np.quantile(values, 0.999))
    if highest <= 0:
        return 0.0
    steps = np.minimum(values * (255 / highest), 255).astype(np.uint8)
    threshold, _ = cv2.threshold(steps.reshape(1, -1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(threshold + 1) * highest / 255


def _disc(radius: int) -> Pixels:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)))
