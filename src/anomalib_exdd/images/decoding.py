"""Opening image files, and telling which pixels of a mask are defect: with Pillow and NumPy alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from struct import error as StructError  # noqa: N812

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, StructError, Image.DecompressionBombError)
"""What Pillow raises on a file that it cannot decode."""

PIXEL_LIMIT = "ANOMALIB_EXDD_MAX_PIXELS"
"""Environment variable: so many pixels may an image have. It replaces Pillow's limit, in all processes of a command."""

_LOSSY_FORMATS = {"JPEG", "MPO", "JPEG2000", "AVIF"}
_LOSSY_COMPRESSIONS = {"jpeg", "tiff_jpeg", "webp"}  # of a TIFF
_LOSSY_MASK_LEVEL = 127


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation asks for; 1 stands for an image that is shown as it is stored."""


def _set_pixel_limit() -> None:
    limit = os.environ.get(PIXEL_LIMIT)
    if limit is None:
        return
    if not limit.isdecimal():
        msg = f"The environment variable {PIXEL_LIMIT} has to be a whole number of pixels, but is `{limit}`."
        raise ValueError(msg)
    Image.MAX_IMAGE_PIXELS = int(limit)


_set_pixel_limit()


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image, turned as its EXIF orientation says: as viewers, and labelling tools, show it.

    Raises:
        OSError: Or another of :data:`DECODING_ERRORS`, if the file cannot be decoded.
    """
    # Not by its name: Pillow 13 then garbles uncompressed TIFFs that are turned by a quarter.
    with Path(path).open("rb") as file, Image.open(file) as image:
        image.load()
        turn = _TURNS.get(_orientation(image.getexif))
        return image if turn is None else image.transpose(turn)


def read_size(path: str | Path) -> tuple[int, int]:
    """Return height and width of an image as :func:`open_image` opens it, from its header alone.

    Raises:
        OSError: Or another of :data:`DECODING_ERRORS`, if the header cannot be decoded.
    """
    with Image.open(path) as image:
        width, height = image.size
        if image.format == "TIFF":  # which Pillow turns itself
            return height, width
        # The method of the base class: that of PNGs decodes the whole image.
        quarter_turn = _orientation(partial(Image.Image.getexif, image)) >= 5
    return (width, height) if quarter_turn else (height, width)


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    try:
        orientation = read_exif().get(ExifTags.Base.Orientation)
    except (*DECODING_ERRORS, TypeError):  # the entry may be broken, and the image sound
        return 1
    return orientation if orientation in _TURNS else 1


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def peak_of_deep_image(path: str | Path) -> int | None:
    """Return the highest number in a file of 16 bits per channel; None for any other file.

    Pillow keeps of colour the upper eight bits.

    Raises:
        OSError: Or another of :data:`DECODING_ERRORS`, if the file cannot be decoded.
    """
    with Image.open(path) as image:
        if not any(";16" in str(tile[3]) for tile in image.tile):
            return None
    pixels = np.asarray(open_image(path))
    return int(pixels.max()) if pixels.ndim == 2 else int(pixels[..., :3].max()) * 257


def read_defect_pixels(path: str | Path) -> NDArray[np.bool_]:
    """Tell which pixels of a mask are defect: those that are neither black nor transparent.

    Lossy compression sprinkles dark grey around every edge: in a file of that kind only what is brighter than half the
    range counts.

    Args:
        path: Mask file of any format.

    Returns:
        Boolean, shape (H, W).

    Raises:
        OSError: Or another of :data:`DECODING_ERRORS`, if the file cannot be decoded.
    """
    level = _LOSSY_MASK_LEVEL if _is_lossy(path) else 0
    mask = open_image(path)
    if is_deep(mask) or (mask.mode in {"1", "L"} and not mask.has_transparency_data):
        return np.asarray(np.asarray(mask) > level)
    # A dark colour rounds to grey 0: look at the channels, not at their brightness.
    pixels = np.asarray(mask.convert("RGBA"))
    return np.asarray((pixels[..., :3] > level).any(axis=-1) & (pixels[..., 3] > level))


def _is_lossy(path: str | Path) -> bool:
    with Image.open(path) as image:
        if image.format == "WEBP":
            return _is_lossy_webp(path)
        return image.format in _LOSSY_FORMATS or image.info.get("compression") in _LOSSY_COMPRESSIONS


def _is_lossy_webp(path: str | Path) -> bool:
    """Look which of the two compressions a WebP file has; Pillow does not tell."""
    with Path(path).open("rb") as file:
        file.seek(12)  # behind the name of the container
        while len(head := file.read(8)) == 8:
            name, length = head[:4], int.from_bytes(head[4:], "little")
            if name in {b"VP8 ", b"VP8L"}:
                return name == b"VP8 "
            file.seek(16 if name == b"ANMF" else length + length % 2, 1)  # a frame of an animation holds the image
    return True
