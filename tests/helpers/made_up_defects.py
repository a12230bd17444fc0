"""Tiny made-up surfaces and defects for the tests of this folder, always the same for the same seed."""

import cv2
import numpy as np

from anomalib_exdd.synthesis import Defect
from anomalib_exdd.synthesis.base import Mask, Pixels


def textured(seed: int, height: int = 96, width: int = 64, *, roughness: float = 6.0) -> Pixels:
    """A normal surface `[H, W, 3]`: uneven light, strokes along the height and grain of `roughness` grey levels."""
    rng = np.random.default_rng((seed, 1))
    light = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), 20)
    strokes = cv2.blur(rng.standard_normal((height, width)), (1, 15))
    grain = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), 0.7)
    relief = 6 * light / light.std() + roughness * (0.6 * strokes / strokes.std() + 0.8 * grain / grain.std())
    tint = np.array([1.03, 1.0, 0.95])
    return np.clip(np.rint((120 + relief)[..., None] * tint), 0, 255).astype(np.uint8)


def blob(height: int, width: int, centre: tuple[float, float], radii: tuple[float, float]) -> Mask:
    """An ellipse: `centre` and `radii` are (row, column), in pixels."""
    rows, columns = np.mgrid[:height, :width]
    return np.asarray(((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 <= 1)


def darkened(image: Pixels, mask: Mask, levels: float = 50.0) -> Pixels:
    """The image with the mask's pixels darker by some grey levels; its texture still shows."""
    return np.clip(np.rint(image - levels * mask[..., None]), 0, 255).astype(np.uint8)


def with_defect(seed: int, height: int = 96, width: int = 64, *, levels: float = 50.0) -> Defect:
    """A dark spot somewhere on `textured(seed, height, width)`, away from the borders."""
    rng = np.random.default_rng((seed, 2))
    radii = rng.uniform(0.06, 0.1, 2) * min(height, width) + 1
    centre = rng.uniform(0.35, 0.65, 2) * (height, width)
    mask = blob(height, width, (centre[0], centre[1]), (radii[0], radii[1]))
    return Defect(darkened(textured(seed, height, width), mask, levels), mask, f"defects/{seed:05d}.png")
