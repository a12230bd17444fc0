"""Small pictures that the page carries within itself, as data URIs.

Images that are gone or cannot be decoded give None, and the page says so in their place.
"""

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from anomalib_exdd.images.masks import read_defect_pixels
from anomalib_exdd.images.reading import DECODING_ERRORS, is_deep, open_image

from .heat_scale import LEVELS, palette

SIDE = 224
"""Longest side of a picture, in pixels."""
TILE = 128
"""Side of a cut-out patch, in pixels."""
_WINDOW = 0.2  # side of what a tile shows, as a share of the image's longer side
_MARK = 0.1  # half the side of the mark around a patch's centre, as a share of the tile
_OUTLINE = (0, 229, 255)  # a colour that the palette does not have
_OUTLINE_LEVEL = LEVELS
_JPEG_QUALITY = 82


def read_picture(path: Path | None) -> Image.Image | None:
    """Read an image as RGB; None if it is gone or cannot be decoded."""
    if path is None:
        return None
    try:
        image = open_image(path)
        if not is_deep(image):
            return image.convert("RGB")
        # Pillow would clip 16 bits to white. For a look at it, the image's own range will do.
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    except DECODING_ERRORS:
        return None
    span = float(np.ptp(pixels)) or 1.0
    return Image.fromarray(((pixels - pixels.min()) / span * 255).astype(np.uint8)).convert("RGB")


def read_mask(path: Path | None) -> Image.Image | None:
    """Read a mask as a grey image of 0 and 255; None if it is gone or cannot be decoded."""
    if path is None:
        return None
    try:
        return Image.fromarray(read_defect_pixels(path).astype(np.uint8) * 255)
    except DECODING_ERRORS:
        return None


def small_size(size: Sequence[int]) -> tuple[int, int]:
    """Return width and height of a picture, at most :data:`SIDE`; small images keep their size."""
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def outline(mask: Image.Image, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw the outline of a mask in a small picture, two pixels wide, around the defect.

    Args:
        mask: Grey image of 0 and 255.
        size: Width and height of the picture.

    Returns:
        Pixels of the outline, shape (height, width).
    """
    # Any share of a small pixel counts: the thinnest scratch stays in sight.
    inside = mask.resize(size, Image.Resampling.BOX).point([0, *[255] * 255])
    around = inside.filter(ImageFilter.MaxFilter(5))
    return np.asarray(np.asarray(around) != np.asarray(inside))


def photo(image: Image.Image, edge: NDArray[np.bool_] | None = None) -> bytes:
    """Make a small picture of an image, with an outline on it if one is given; JPEG."""
    small = image.resize(small_size(image.size), Image.Resampling.BOX)
    if edge is not None:
        small = Image.fromarray(np.where(edge[..., None], np.array(_OUTLINE, dtype=np.uint8), np.asarray(small)))
    return _encode(small, "JPEG", quality=_JPEG_QUALITY)


def heat_picture(levels_hw: NDArray[np.uint8], size: tuple[int, int], edge: NDArray[np.bool_] | None = None) -> bytes:
    """Make a picture of a map of levels, in the very colours of the palette; PNG.

    Args:
        levels_hw: Levels, shape (height, width) of the map.
        size: Width and height of the picture. Where it is smaller than the map, the highest level of a place is shown.
        edge: Outline of the true defect, in the picture's size.
    """
    for axis, length in enumerate(reversed(size)):
        if length < levels_hw.shape[axis]:
            starts = np.arange(length) * levels_hw.shape[axis] // length
            levels_hw = np.maximum.reduceat(levels_hw, starts, axis=axis)
    levels = np.asarray(Image.fromarray(levels_hw).resize(size, Image.Resampling.BILINEAR))
    if edge is not None:
        levels = np.where(edge, np.uint8(_OUTLINE_LEVEL), levels)
    picture = Image.fromarray(levels)
    picture.putpalette([*palette().ravel().tolist(), *_OUTLINE])
    return _encode(picture, "PNG", optimize=True)


def patch_tile(image: Image.Image, row: float, column: float) -> bytes:
    """Cut the surroundings of a position out of an image and mark it; JPEG.

    Args:
        image: The image.
        row: Row of the patch's centre, as a share of the height.
        column: Column of the patch's centre, as a share of the width.
    """
    x, y, half = column * image.width, row * image.height, _WINDOW * max(image.size) / 2
    box = (round(x - half), round(y - half), round(x + half) + 1, round(y + half) + 1)
    tile = image.crop(box).resize((TILE, TILE), Image.Resampling.BICUBIC)
    low, high = TILE * (0.5 - _MARK), TILE * (0.5 + _MARK)
    ImageDraw.Draw(tile).rectangle((low, low, high, high), outline=_OUTLINE, width=2)
    return _encode(tile, "JPEG", quality=_JPEG_QUALITY)


def data_uri(picture: bytes) -> str:
    """Write a JPEG or PNG as a data URI."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(picture).decode()}"


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
