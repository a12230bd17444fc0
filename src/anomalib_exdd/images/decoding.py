"""Opening image files, and telling which pixels of a mask are defect: with Pillow and NumPy alone."""

from __future__ import annotations

from pathlib import Path
from struct import error as StructError  # noqa: N812

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, StructError, Image.DecompressionBombError)
"""What Pillow raises on a file that it cannot decode."""

_LOSSY_FORMATS = {"JPEG", "MPO", "JPEG2000", "AVIF"}
_LOSSY_COMPRESSIONS = {"jpeg", "tiff_jpeg", "webp"}  # of a TIFF
_LOSSY_MASK_LEVEL = 127


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


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
    with Image.open(path) as mask:
        level = _LOSSY_MASK_LEVEL if _is_lossy(mask, path) else 0
        mask.load()
        if is_deep(mask) or (mask.mode in {"1", "L"} and not mask.has_transparency_data):
            return np.asarray(np.asarray(mask) > level)
        # A dark colour rounds to grey 0: look at the channels, not at their brightness.
        pixels = np.asarray(mask.convert("RGBA"))
    return np.asarray((pixels[..., :3] > level).any(axis=-1) & (pixels[..., 3] > level))


def _is_lossy(image: Image.Image, path: str | Path) -> bool:
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
