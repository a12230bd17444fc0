"""Pictures of the report, embedded as data URIs, and one colour scale for the heat maps of all methods.

Map values of different methods have no common unit. Comparable is the share of the pixels of normal test images below
a value. Colours follow that share on a logarithmic scale (0 %, 90 %, 99 %, 99.9 %, ...): a value that one of ten
thousand normal pixels exceeds has the same colour for all methods.
"""

import math
from base64 import b64encode
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from anomalib_exdd.images.masks import read_defect_pixels
from anomalib_exdd.images.reading import DECODING_ERRORS, is_deep, open_image

SIDE = 224
"""Longest side of a picture, in pixels."""
TILE = 128
"""Side of the crop around a patch, in pixels."""
_WINDOW = 0.2  # side of the crop, as a share of the image's longer side
_MARK = 0.1  # half the side of the square around the patch, as a share of the crop
_OUTLINE = (0, 229, 255)  # not in the palette
_JPEG_QUALITY = 82
LEVELS = 64
MAX_DECADES = 4


def palette() -> NDArray[np.uint8]:
    """Return the colour of every level, RGB, shape (LEVELS, 3).

    The brightness of this map ascends evenly, which is visible to people with any colour vision and in a grey print.
    """
    shades = np.linspace(0, 255, LEVELS).round().astype(np.uint8)[None]
    return np.asarray(cv2.applyColorMap(shades, cv2.COLORMAP_INFERNO)[0, :, ::-1])


def share_above(values: NDArray[np.float16], normal: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the share of normal pixels, given in ascending order, that are not below each value."""
    return (normal.size - np.searchsorted(normal, values.astype(np.float32))) / normal.size


def heat_levels(shares: NDArray[np.float64], decades: int) -> NDArray[np.uint8]:
    """Return the level of the palette of each share, for a scale of so many powers of ten."""
    above = np.maximum(shares, 10.0 ** -(decades + 1))
    return (np.clip(-np.log10(above) / decades, 0, 1) * (LEVELS - 1)).round().astype(np.uint8)


def common_decades(pixels: Iterable[int]) -> int:
    """Return how many powers of ten all scales can resolve, given the number of pixels of each: 1 to 4."""
    return max(1, min(MAX_DECADES, *(math.floor(math.log10(count)) for count in pixels)))


def decade_names(decades: int) -> list[str]:
    """Name the powers of ten by the share of normal pixels below: 0 %, 90 %, 99 %, 99.9 %."""
    return [f"{100 - 100 / 10**decade:.10g} %" for decade in range(decades + 1)]


def read_picture(path: str | Path) -> Image.Image | None:
    """Read an image as RGB; None if it cannot be read."""
    try:
        image = open_image(path)
    except DECODING_ERRORS:
        return None
    if not is_deep(image):
        return image.convert("RGB")
    # Pillow clips 16 bits to white: stretch the image's own range instead.
    pixels = np.asarray(image, dtype=np.float64)
    span = float(np.ptp(pixels)) or 1.0
    return Image.fromarray(((pixels - pixels.min()) / span * 255).astype(np.uint8)).convert("RGB")


def read_mask(path: str | Path) -> Image.Image | None:
    """Read a mask as a grey image of 0 and 255; None if it cannot be read."""
    try:
        return Image.fromarray(read_defect_pixels(path).astype(np.uint8) * 255)
    except DECODING_ERRORS:
        return None


def small_size(size: Sequence[int]) -> tuple[int, int]:
    """Return width and height of an image's picture, at most :data:`SIDE`."""
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def outline(mask: Image.Image, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels of a mask's outline in a picture, two pixels wide, around the defect, shape (height, width)."""
    # Any share of a small pixel counts, so that thin scratches stay visible.
    inside = mask.resize(size, Image.Resampling.BOX).point([0, *[255] * 255])
    around = inside.filter(ImageFilter.MaxFilter(5))
    return np.asarray(np.asarray(around) != np.asarray(inside))


def photo(image: Image.Image, mask: Image.Image | None = None) -> str:
    """Return a small picture of an image, with the outline of a mask if one is given, as JPEG."""
    small = image.resize(small_size(image.size), Image.Resampling.BOX)
    if mask is not None:
        edge = outline(mask, small.size)[..., None]
        small = Image.fromarray(np.where(edge, np.array(_OUTLINE, dtype=np.uint8), np.asarray(small)))
    return _data_uri(small, "jpeg", quality=_JPEG_QUALITY)


def heat_picture(levels_hw: NDArray[np.uint8], size: tuple[int, int], mask: Image.Image | None = None) -> str:
    """Return a map of palette levels as PNG.

    Args:
        levels_hw: Levels, shape (height, width) of the map.
        size: Width and height of the picture. Where it is smaller than the map, the highest level is shown.
        mask: The true defect, whose outline is drawn.
    """
    for axis, length in enumerate(reversed(size)):
        if length < levels_hw.shape[axis]:
            starts = np.arange(length) * levels_hw.shape[axis] // length
            levels_hw = np.maximum.reduceat(levels_hw, starts, axis=axis)
    levels = np.asarray(Image.fromarray(levels_hw).resize(size, Image.Resampling.BILINEAR))
    if mask is not None:
        levels = np.where(outline(mask, size), np.uint8(LEVELS), levels)
    picture = Image.fromarray(levels)
    picture.putpalette([*palette().ravel().tolist(), *_OUTLINE])
    return _data_uri(picture, "png", optimize=True)


def patch_tile(image: Image.Image, row: float, column: float) -> str:
    """Crop an image around a patch and mark the patch, as JPEG; its centre is given in shares of height and width."""
    x, y, half = column * image.width, row * image.height, _WINDOW * max(image.size) / 2
    box = (round(x - half), round(y - half), round(x + half) + 1, round(y + half) + 1)
    tile = image.crop(box).resize((TILE, TILE), Image.Resampling.BICUBIC)
    low, high = TILE * (0.5 - _MARK), TILE * (0.5 + _MARK)
    ImageDraw.Draw(tile).rectangle((low, low, high, high), outline=_OUTLINE, width=2)
    return _data_uri(tile, "jpeg", quality=_JPEG_QUALITY)


def _data_uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}"
