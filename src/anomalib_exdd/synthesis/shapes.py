"""Generated shapes of defects, for parts without a real defect."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .base import Mask, Pixels

AREAS = (0.001, 0.03)  # least and greatest share of the part that a shape is to cover
LEAST_AREA = 12  # pixels that a shape covers at least, where the part has as many
TRIES = 20

Points = NDArray[np.float64]


def draw_shape(part: Mask, rng: Generator) -> tuple[Mask, str]:
    """Draw the mask of a defect on a part, both `[H, W]`, bool, not empty; and its kind, one of `KINDS`.

    Shapes cover .1 to 3 % of the part, uniformly on a logarithmic scale (half of KSDD2's defects cover .5 to 5 % of
    their image).
    """
    places = np.argwhere(part)[:, ::-1]
    least = min(LEAST_AREA, len(places))
    for _ in range(TRIES):
        kind, draw = KINDS[rng.integers(len(KINDS))]
        centre = places[rng.integers(len(places))]
        canvas: Pixels = np.zeros(part.shape, dtype=np.uint8)
        draw(canvas, centre.astype(np.float64), max(least, len(places) * log_uniform(rng, *AREAS)), rng)
        mask = np.asarray((canvas > 0) & part)
        if np.count_nonzero(mask) >= least:
            return mask, kind
    # The part is a few pixels, or a thin line: a dot on it.
    canvas = np.zeros(part.shape, dtype=np.uint8)
    cv2.circle(canvas, places[rng.integers(len(places))].tolist(), 2, 1, cv2.FILLED)
    return np.asarray((canvas > 0) & part), "spots"


def log_uniform(rng: Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniformly distributed."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _scratch(canvas: Pixels, centre: Points, area: float, rng: Generator) -> None:
    """A line that bends a little, one to four pixels wide, thinner at its ends."""
    width = log_uniform(rng, 1, 4)
    length = min(area / width, 0.7 * float(np.hypot(*canvas.shape)))
    steps = max(3, round(length / 6))
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.5 / np.sqrt(steps), steps))
    path = np.cumsum(length / steps * np.c_[np.cos(heading), np.sin(heading)], axis=0)
    corners = np.rint(path + (centre - path.mean(axis=0))).astype(int).tolist()
    thickness = np.rint(width * np.sqrt(np.sin(np.pi * np.linspace(0.1, 0.9, steps - 1))))
    for start, end, pixels in zip(corners[:-1], corners[1:], thickness.tolist(), strict=True):
        cv2.line(canvas, start, end, 1, max(1, int(pixels)))


def _spots(canvas: Pixels, centre: Points, area: float, rng: Generator) -> None:
    """A few ellipses beside each other."""
    count = 1 + int(rng.poisson(2))
    radius = np.sqrt(area / (np.pi * count))
    for _ in range(count):
        position = centre + rng.normal(0, 2.5 * radius, 2) * (count > 1)
        stretch = rng.uniform(1, 1.6)
        radii = radius * rng.uniform(0.6, 1.3) * np.array([stretch, 1 / stretch])
        _fill_outline(canvas, position, radii, np.ones(32), rng)


def _blob(canvas: Pixels, centre: Points, area: float, rng: Generator) -> None:
    """One region with a smooth, irregular outline."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    waves = [rng.normal(0, 0.25 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(1, 6)]
    stretch = rng.uniform(1, 1.8)
    radii = np.sqrt(area / np.pi) * np.array([stretch, 1 / stretch])
    _fill_outline(canvas, centre, radii, np.exp(np.sum(waves, axis=0)), rng)


def _fill_outline(canvas: Pixels, centre: Points, radii: Points, factors: Points, rng: Generator) -> None:
    """Fill an ellipse, turned at random, whose radius is multiplied by a factor in each direction."""
    angles = np.linspace(0, 2 * np.pi, len(factors), endpoint=False)
    turn = rng.uniform(0, np.pi)
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    edge = centre + (factors[:, None] * radii * np.c_[np.cos(angles), np.sin(angles)]) @ axes
    cv2.fillPoly(canvas, [np.rint(edge).astype(np.int32)], 1)


def _mark(canvas: Pixels, centre: Points, area: float, rng: Generator) -> None:
    """A frayed patch, longer than wide: an ellipse whose edge is broken by noise of two sizes."""
    stretch = log_uniform(rng, 1, 3)
    half = np.sqrt(2 * area / np.pi * np.array([stretch, 1 / stretch]))[:: int(rng.choice((-1, 1)))]
    left, top = np.maximum(np.floor(centre - half), 0).astype(int)
    right, bottom = np.minimum(np.ceil(centre + half) + 1, canvas.shape[::-1]).astype(int)
    rows, columns = np.mgrid[top:bottom, left:right]
    reach = ((columns - centre[0]) / half[0]) ** 2 + ((rows - centre[1]) / half[1]) ** 2
    size = max(1.0, np.sqrt(area) / 12)
    noise = np.zeros_like(reach)
    for weight, width in ((0.35, 2 * size), (0.2, size)):
        field = cv2.GaussianBlur(rng.standard_normal(reach.shape), (0, 0), width)
        noise += weight * (field / (field.std() + 1e-6))
    canvas[top:bottom, left:right] = (0.5 - reach + noise * (1 - reach) > 0) & (reach < 1)


KINDS: list[tuple[str, Callable[[Pixels, Points, float, Generator], None]]]
KINDS = [("scratch", _scratch), ("spots", _spots), ("blob", _blob), ("mark", _mark)]
