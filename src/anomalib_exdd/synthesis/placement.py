"""Where a defect goes: the masks of real defects, the same moved about, or made-up shapes.

Positions are (row, column). Masks are moved pixel by pixel and never resampled: a line of one pixel stays a line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .base import Defect, Mask, Pixels
from .foreground import foreground
from .shapes import draw_shape

MaskSource = Literal["auto", "real", "moved", "drawn"]
"""`real`: masks of real defects as they are, as DIAG takes them. `moved`: the same, turned, mirrored, scaled, warped
and put elsewhere on the part. `drawn`: made-up shapes. `auto`: `moved` where there are real defects, else `drawn`."""

SCALES = (0.7, 1.3)
TRIES = 12

Points = NDArray[np.float64]


@dataclass(frozen=True)
class PlacedMask:
    """Where a defect is to be drawn.

    Attributes:
        mask: `[H, W]`, bool, of the image's size; never empty.
        defect: The real defect that the mask was made from, None for a made-up shape.
        description: The same in words, for the manifest.
    """

    mask: Mask
    defect: Defect | None
    description: str


@dataclass(frozen=True)
class Motion:
    """How a defect is turned, mirrored and scaled about its centre.

    Attributes:
        matrix: `[2, 2]`, float64: the new offset from the centre is `matrix @ offset`.
        description: The same in words.
    """

    matrix: Points
    description: str


@dataclass(frozen=True)
class Patch:
    """A moved mask, cut out.

    Attributes:
        mask: `[h, w]`, bool: the pixels from the first to the last that is True.
        matrix: `[2, 3]`, float64: a pixel p of the old image is at `matrix[:, :2] @ p + matrix[:, 2]` of the patch.
    """

    mask: Mask
    matrix: Points


def place(image: Pixels, defects: Sequence[Defect], source: MaskSource, rng: Generator) -> PlacedMask:
    """Choose where a defect goes in a normal image.

    Args:
        image: `[H, W, 3]`, uint8.
        defects: Real defects; may be empty for `auto` and `drawn`. One is looked at.
        source: Where the mask comes from.
        rng: Decides everything.

    Raises:
        ValueError: If `source` is unknown, or asks for real defects where there are none, or a real mask is empty.
    """
    if source not in get_args(MaskSource):
        msg = f"Argument `source` has to be one of {', '.join(get_args(MaskSource))}, but got {source!r}."
        raise ValueError(msg)
    if source == "drawn" or (source == "auto" and not len(defects)):
        shape = draw_shape(foreground(image), rng)
        return PlacedMask(shape.mask, None, f"drawn {shape.kind}")
    if not len(defects):
        msg = f"Masks of source `{source}` need real defects, but there are none. Take `drawn` or `auto`."
        raise ValueError(msg)
    defect = defects[int(rng.integers(len(defects)))]
    check_defect(defect)
    if source == "real":
        return PlacedMask(fit_mask(defect.mask, image.shape[:2]), defect, f"mask of {defect.path}")
    part = foreground(image)
    motion = draw_motion(defect.mask, room_in(part), lambda: rng.uniform(*SCALES), rng)
    # A wave may reach a little beyond the room that was made for the straight shape.
    bent = move(defect.mask, motion, partial(_bend, wave=_draw_wave(defect.mask, rng))).mask
    patch = bent if fits(bent, part.shape) else move(defect.mask, motion).mask
    positions = best_positions(patch, part)
    top, left = positions[rng.integers(len(positions))].tolist()
    mask = put(patch, (top, left), part)
    return PlacedMask(mask, defect, f"mask of {defect.path}, {motion.description}")


def check_defect(defect: Defect) -> None:
    """Refuse a real defect that cannot be used.

    Raises:
        ValueError: If image or mask have the wrong shape or type, or if the mask is empty.
    """
    image, mask = defect.image, defect.mask
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        msg = f"The image of defect `{defect.path}` has to be [H, W, 3] of uint8, but is {list(image.shape)} of "
        raise ValueError(msg + f"{image.dtype}.")
    if mask.dtype != np.bool_ or mask.shape != image.shape[:2]:
        msg = f"The mask of defect `{defect.path}` has to be {list(image.shape[:2])} of bool, but is "
        raise ValueError(msg + f"{list(mask.shape)} of {mask.dtype}.")
    if not mask.any():
        msg = f"The mask of defect `{defect.path}` is empty. Leave this defect out."
        raise ValueError(msg)


def fit_mask(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """Stretch a mask to another size so that every pixel of it is found where it belongs.

    Args:
        mask: `[h, w]`, bool.
        shape: Height and width wanted.

    Returns:
        `[H, W]`, bool. Where it shrinks, a pixel is True if any that it covers is; where it grows, pixels repeat.
    """
    for axis in (0, 1):
        old, new = mask.shape[axis], shape[axis]
        if new >= old:
            mask = mask.take(np.arange(new) * old // new, axis=axis)
            continue
        before = np.insert(np.cumsum(mask, axis=axis, dtype=np.int64), 0, 0, axis=axis)
        first, last = np.arange(new) * old // new, -(-np.arange(1, new + 1) * old // new)
        mask = before.take(last, axis=axis) > before.take(first, axis=axis)
    return np.asarray(mask, dtype=np.bool_)


def room_in(part: Mask) -> tuple[int, int]:
    """Height and width of the part: what is put on it has to be smaller."""
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


def draw_motion(mask: Mask, room: tuple[int, int], draw_scale: Callable[[], float], rng: Generator) -> Motion:
    """Draw how to turn, mirror and scale a mask, so that the result fits into a room.

    What does not fit is drawn anew; a mask that hardly ever fits is not turned, and shrunk as far as it has to be.

    Args:
        mask: `[H, W]`, bool, not empty.
        room: Height and width that there are, in pixels.
        draw_scale: Draws a scale.
        rng: Decides about turn and mirroring.
    """
    corners = cv2.convexHull(np.argwhere(mask).astype(np.float32))[:, 0]
    for _ in range(TRIES):
        mirror, degrees, scale = int(rng.choice((-1, 1))), rng.uniform(-180, 180), draw_scale()
        motion = _motion(mirror, degrees, scale)
        if (np.ptp(corners @ motion.matrix.T, axis=0) + 2 <= room).all():
            return motion
    fitting = float(np.min((np.array(room) - 2) / np.maximum(np.ptp(corners, axis=0), 1)))
    return _motion(int(rng.choice((-1, 1))), 0.0, min(1.0, max(0.0, fitting)))


def _motion(mirror: int, degrees: float, scale: float) -> Motion:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    words = f"turned by {degrees:.0f} degrees, scaled by {scale:.2f}"
    return Motion(scale * turn @ np.diag([1.0, mirror]), "mirrored, " * (mirror < 0) + words)


def move(mask: Mask, motion: Motion, bend: Callable[[Points], Points] | None = None) -> Patch:
    """Turn, mirror and scale a mask.

    Every pixel is moved as nine points, so that none is lost, neighbors stay neighbors, and no holes appear as long as
    nothing is stretched to more than about 1.6 times its size.

    Args:
        mask: `[H, W]`, bool, not empty.
        motion: How.
        bend: Displaces points `[N, 2]`, relative to the centre, before they are moved.
    """
    pixels = np.argwhere(mask).astype(np.float64)
    centre = (pixels.min(axis=0) + pixels.max(axis=0)) / 2
    thirds = np.array([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]) / 3
    points = (pixels[:, None] - centre + thirds).reshape(-1, 2)
    cells = np.rint((points if bend is None else bend(points)) @ motion.matrix.T).astype(np.int64)
    corner = cells.min(axis=0)
    moved = np.zeros(cells.max(axis=0) - corner + 1, dtype=np.bool_)
    moved[tuple((cells - corner).T)] = True
    return Patch(moved, np.c_[motion.matrix, -motion.matrix @ centre - corner])


@dataclass(frozen=True)
class _Wave:
    """Points are displaced along `shift` (pixels) as a sine of their position along `direction` (1 / pixels)."""

    shift: Points
    direction: Points
    phase: float


def _draw_wave(mask: Mask, rng: Generator) -> _Wave:
    """Draw a wave as long as the defect, or longer, and so flat that it stretches nothing by more than a fifth."""
    length = max(16.0, float(max(room_in(mask)))) * rng.uniform(0.8, 2.0)
    along, across, phase = rng.uniform(0, 2 * np.pi, 3)
    height = rng.uniform(0, 0.2) * length / (2 * np.pi)
    return _Wave(
        height * np.array([np.sin(across), np.cos(across)]),
        2 * np.pi / length * np.array([np.sin(along), np.cos(along)]),
        phase,
    )


def _bend(points: Points, wave: _Wave) -> Points:
    return points + np.sin(points @ wave.direction + wave.phase)[:, None] * wave.shift


def fits(patch: Mask, shape: tuple[int, ...]) -> bool:
    """Whether a patch lies inside an image of some height and width."""
    return patch.shape[0] <= shape[0] and patch.shape[1] <= shape[1]


def best_positions(patch: Mask, part: Mask) -> NDArray[np.intp]:
    """Find the places at which a patch lies on the part, or as much of it as is possible.

    Args:
        patch: `[h, w]`, bool.
        part: `[H, W]`, bool, at least as large.

    Returns:
        `[N, 2]`, row and column of the image at which the patch's first pixel is put; at least one.
    """
    if part.all():
        return np.argwhere(np.ones([room - size + 1 for room, size in zip(part.shape, patch.shape, strict=True)]))
    overlap = cv2.matchTemplate(part.astype(np.float32), patch.astype(np.float32), cv2.TM_CCORR)
    pixels = np.rint(overlap)  # whole numbers, but for the rounding of the Fourier transform
    return np.argwhere(pixels == pixels.max())


def put(patch: Mask, position: tuple[int, int], part: Mask) -> Mask:
    """Put a patch into an empty mask of the part's size, and cut it where it leaves the part.

    A patch that does not touch the part at all is not cut: a mask is never empty.
    """
    (top, left), (height, width) = position, patch.shape
    mask = np.zeros_like(part)
    mask[top : top + height, left : left + width] = patch
    return np.asarray(mask & part) if (mask & part).any() else mask
