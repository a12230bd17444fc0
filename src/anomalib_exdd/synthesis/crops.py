"""What a diffusion model sees: a window around the mask, resized to the size that it works at.

Windows have the proportions of the working size, so that nothing is distorted. Where they reach over the border, the
image is reflected. Sizes are (height, width).
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from .base import Mask, Pixels, bounding_box

LATENT_CELL = 8  # pixels of a side that one number of the latent image stands for
GRANULE = 64  # U-Nets halve latents three times; and images of nearly the same size come to share a batch

Size = tuple[int, int]


class Window(NamedTuple):
    """A rectangle of an image, which may reach over its borders. In pixels."""

    top: int
    left: int
    height: int
    width: int


def working_size(shape: Size, setting: int | Size | None) -> Size:
    """Return the size at which an image is worked on.

    `setting` is None for the size of the image, rounded up to multiples of 64; a number for about the area of a square
    of that side in the proportions of the image, in multiples of 64 (In&Out's buckets); or the size itself.
    """
    if isinstance(setting, tuple):
        return setting
    ratio = math.sqrt(shape[0] / shape[1])
    sides = shape if setting is None else (setting * ratio, setting / ratio)
    rounded = math.ceil if setting is None else round
    height, width = (GRANULE * max(1, rounded(side / GRANULE)) for side in sides)
    return height, width


def check_working_size(setting: int | Size | None) -> None:
    """Refuse a working size whose sides are no positive multiples of 8."""
    for side in setting if isinstance(setting, tuple) else (setting or LATENT_CELL,):
        if side < LATENT_CELL or side % LATENT_CELL:
            msg = f"Argument `working_size` has to be a multiple of {LATENT_CELL}, or two of them, but got {setting}."
            raise ValueError(msg)


def window_around(mask: Mask, padding: int, size: Size) -> Window:
    """Return the smallest window in the proportions of `size` that holds a mask and its surroundings.

    It lies within the image where that is large enough, and is centred over it where it is not. `padding` is in pixels
    on each side, as far as the image reaches.
    """
    rows, columns = bounding_box(mask, padding)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if width * size[0] > height * size[1]:
        height = round(width * size[0] / size[1])
    else:
        width = round(height * size[1] / size[0])
    return Window(_start(rows, height, mask.shape[0]), _start(columns, width, mask.shape[1]), height, width)


def _start(span: slice, length: int, limit: int) -> int:
    if length > limit:
        return -((length - limit) // 2)
    centred = span.start - (length - (span.stop - span.start)) // 2
    return min(max(centred, 0), limit - length)


def cut(image: Pixels, window: Window, size: Size) -> Pixels:
    """Cut a window out of an image, reflected over its borders, and resize it: `[*size, 3]`, uint8."""
    top, left, height, width = window
    spans = zip(window[:2], window[2:], image.shape[:2], strict=True)
    beyond = [(max(-start, 0), max(start + length - limit, 0)) for start, length, limit in spans]
    padded = np.pad(image, [*beyond, (0, 0)], mode="reflect")
    return resized(padded[max(top, 0) :, max(left, 0) :][:height, :width], size)


def cut_mask(mask: Mask, window: Window, size: Size, *, whole_cells: bool) -> Mask:
    """Cut a window out of a mask and resize it to `size`, so that no part of it gets lost.

    Models see a mask at one eighth of its size, sampled at single pixels: nearly nothing would be left of a thin
    scratch. With `whole_cells`, the mask grows to whole cells of the latent image. Otherwise it is resized as diffusers
    does, and grows only if the model would see nothing.
    """
    top, left, height, width = window
    grey = _grey(mask).crop((left, top, left + width, top + height))  # black beyond the border
    if not whole_cells:
        resized = np.asarray(grey.resize(size[::-1], Image.Resampling.LANCZOS)) >= 128
        if resized[::LATENT_CELL, ::LATENT_CELL].any():
            return np.asarray(resized)
    resized = np.asarray(grey.resize(size[::-1], Image.Resampling.BOX)) > 0
    cells = resized.reshape(-1, LATENT_CELL, size[1] // LATENT_CELL, LATENT_CELL).any(axis=(1, 3))
    return cells.repeat(LATENT_CELL, axis=0).repeat(LATENT_CELL, axis=1)


def paste_back(image: Pixels, drawn: Pixels, window: Window, mask: Mask) -> Pixels:
    """Copy a drawn window, `[h, w, 3]`, into the image it was cut from, inside the mask alone."""
    canvas = Image.fromarray(image)
    canvas.paste(Image.fromarray(resized(drawn, (window.height, window.width))), (window.left, window.top))
    return np.where(mask[..., None], np.asarray(canvas), image)


def stretch_mask(mask: Mask, size: Size) -> Mask:
    """Resize a mask as DIAG's code does: at least half covered counts, or anything at all where that leaves nothing."""
    covered: Mask = np.asarray(_grey(mask).resize(size[::-1], Image.Resampling.BICUBIC)) >= 128
    return covered if covered.any() else np.asarray(_grey(mask).resize(size[::-1], Image.Resampling.BOX)) > 0


def _grey(mask: Mask) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def resized(image: Pixels, size: Size, how: Image.Resampling = Image.Resampling.LANCZOS) -> Pixels:
    """Resize an image, `[H, W, 3]`, uint8."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], how))
