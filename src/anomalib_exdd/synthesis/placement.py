"""Where a defect goes: the masks of real defects, the same moved about, or generated shapes.

Positions are (row, column). Masks are moved pixel by pixel and never resampled: a line of one pixel stays a line.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .base import Defect, Mask, Pixels, bounding_box, check_mask
from .foreground import foreground
from .shapes import Points, draw_shape

MaskSource = Literal["auto", "real", "moved", "drawn"]
"""`real`: masks of real defects as they are, as DIAG takes them. `moved`: the same, turned, mirrored, scaled, warped
and put elsewhere on the part. `drawn`: generated shapes. `auto`: `moved` where there are real defects, else `drawn`."""

SCALES = (0.7, 1.3)
TRIES = 12


Placement = tuple[Mask, Defect | None, str]


class Motion(NamedTuple):
    """How a defect is turned, mirrored and scaled about its centre: `[2, 2]`, float64, and in words."""

    matrix: Points
    description: str


def place(image: Pixels, defects: Sequence[Defect], source: MaskSource, rng: Generator) -> Placement:
    """Choose where a defect goes in a normal image, `[H, W, 3]`, uint8. Only one of the real defects is read.

    Returns:
        Mask, `[H, W]`, bool, not empty; the real defect that it was made from, None for a generated shape; the same in
        words, for the manifest. A ValueError says that a real mask is empty or does not fit its image.
    """
    if source == "drawn" or (source == "auto" and not len(defects)):
        mask, kind = draw_shape(foreground(image), rng)
        return mask, None, f"drawn {kind}"
    defect = defects[int(rng.integers(len(defects)))]
    check_mask(defect.image, defect.mask, f" of defect `{defect.path}`")
    if source == "real":
        return fit_mask(defect.mask, image.shape[:2]), defect, f"mask of {defect.path}"
    part = foreground(image)
    motion = draw_motion(defect.mask, extent(part), lambda: rng.uniform(*SCALES), rng)
    patch, _ = move(defect.mask, motion, _draw_bend(defect.mask, rng))
    if (np.array(patch.shape) > part.shape).any():  # a bent shape may reach a little beyond the room
        patch, _ = move(defect.mask, motion)
    positions = best_positions(patch, part)
    mask = paste_mask(patch, positions[rng.integers(len(positions))], part)
    return mask, defect, f"mask of {defect.path}, {motion.description}"


def fit_mask(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """Resize a mask, `[h, w]`, to a height and width without losing a pixel of it.

    Where it shrinks, a pixel is True if any that it covers is; where it grows, pixels repeat.
    """
    for axis, (old, new) in enumerate(zip(mask.shape, shape, strict=True)):
        first = np.arange(new) * old // new
        last = -(-np.arange(1, new + 1) * old // new) if new < old else first + 1
        before = np.insert(np.cumsum(mask, axis=axis, dtype=np.int64), 0, 0, axis=axis)
        mask = before.take(last, axis=axis) > before.take(first, axis=axis)
    return np.asarray(mask, dtype=np.bool_)


def extent(mask: Mask) -> tuple[int, int]:
    """Return height and width of the smallest box around a mask."""
    rows, columns = bounding_box(mask)
    return rows.stop - rows.start, columns.stop - columns.start


def draw_motion(mask: Mask, room: tuple[int, int], draw_scale: Callable[[], float], rng: Generator) -> Motion:
    """Draw how to turn, mirror and scale a mask, `[H, W]`, so that it fits into a room of some height and width.

    A mask that never fits in several draws is not turned, and shrunk as far as necessary.
    """
    corners = cv2.convexHull(np.argwhere(mask).astype(np.float32))[:, 0]
    for _ in range(TRIES):
        motion = _motion(int(rng.choice((-1, 1))), rng.uniform(-180, 180), draw_scale())
        if (np.ptp(corners @ motion.matrix.T, axis=0) + 2 <= room).all():
            return motion
    fitting = float(np.min((np.array(room) - 2) / np.maximum(np.ptp(corners, axis=0), 1)))
    return _motion(int(rng.choice((-1, 1))), 0.0, min(1.0, max(0.0, fitting)))


def _motion(mirror: int, degrees: float, scale: float) -> Motion:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    words = f"turned by {degrees:.0f} degrees, scaled by {scale:.2f}"
    return Motion(scale * turn @ np.diag([1.0, mirror]), "mirrored, " * (mirror < 0) + words)


def move(mask: Mask, motion: Motion, bend: Callable[[Points], Points] | None = None) -> tuple[Mask, Points]:
    """Turn, mirror and scale a mask, `[H, W]`, bool, not empty, after `bend` has moved its points, `[N, 2]`.

    Every pixel is moved as nine points, so that none is lost, neighbors stay neighbors, and no holes appear unless
    something is stretched to more than about 1.6 times its size. Points are relative to the mask's centre.

    Returns:
        The moved mask, cut to its smallest box `[h, w]`, bool; and `[2, 3]`, float64: a pixel p of the old image is at
        `matrix[:, :2] @ p + matrix[:, 2]` of that box.
    """
    pixels = np.argwhere(mask).astype(np.float64)
    centre = (pixels.min(axis=0) + pixels.max(axis=0)) / 2
    thirds = (np.argwhere(np.ones((3, 3))) - 1) / 3
    points = (pixels[:, None] - centre + thirds).reshape(-1, 2)
    cells = np.rint((points if bend is None else bend(points)) @ motion.matrix.T).astype(np.int64)
    corner = cells.min(axis=0)
    moved = np.zeros(cells.max(axis=0) - corner + 1, dtype=np.bool_)
    moved[tuple((cells - corner).T)] = True
    return moved, np.c_[motion.matrix, -motion.matrix @ centre - corner]


def _draw_bend(mask: Mask, rng: Generator) -> Callable[[Points], Points]:
    """Draw a sine wave as long as the defect, or longer, and so flat that it stretches nothing by more than a fifth."""
    length = max(16.0, float(max(extent(mask)))) * rng.uniform(0.8, 2.0)
    along, across, phase = rng.uniform(0, 2 * np.pi, 3)
    height = rng.uniform(0, 0.2) * length / (2 * np.pi)
    shift = height * np.array([np.sin(across), np.cos(across)])
    direction = 2 * np.pi / length * np.array([np.sin(along), np.cos(along)])
    return lambda points: points + np.sin(points @ direction + phase)[:, None] * shift


def best_positions(patch: Mask, part: Mask) -> NDArray[np.intp]:
    """Find the positions, `[N, 2]`, at which a patch lies on the part, or as much of it as possible; at least one."""
    if part.all():
        return np.argwhere(np.ones([room - size + 1 for room, size in zip(part.shape, patch.shape, strict=True)]))
    overlap = cv2.matchTemplate(part.astype(np.float32), patch.astype(np.float32), cv2.TM_CCORR)
    pixels = np.rint(overlap)  # whole numbers, but for the rounding of the Fourier transform
    return np.argwhere(pixels == pixels.max())


def paste_mask(patch: Mask, position: NDArray[np.intp], part: Mask) -> Mask:
    """Put a patch at a position of an empty mask, cut off where it leaves the part unless nothing would remain."""
    (top, left), (height, width) = position, patch.shape
    mask = np.zeros_like(part)
    mask[top : top + height, left : left + width] = patch
    return np.asarray(mask & part) if (mask & part).any() else mask
