"""Reading image files, with errors that name the file.

What a user's file may hold is decided here: 8-bit and 16-bit grey, RGB, RGBA and palette images, turned as their EXIF
orientation says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import error as StructError  # noqa: N812
from typing import TypeVar, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import to_dtype, to_image
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

logger = logging.getLogger(__name__)

DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, StructError, Image.DecompressionBombError)
"""What Pillow raises on a file that it cannot decode."""

IMAGE_EXTENSIONS: tuple[str, ...] = tuple(sorted({*IMG_EXTENSIONS, ".bmp", ".tif", ".tiff"}))

PIXEL_LIMIT = "ANOMALIB_EXDD_MAX_PIXELS"
"""Environment variable: the most pixels that an image may have. It replaces Pillow's limit in all processes."""

WHITE_LEVEL = 65535
"""Default of the number that is white in images of more than 8 bits."""

_READING_THREADS = 8
_SAMPLED_IMAGES = 16  # to tell how many bits a camera has

Item = TypeVar("Item")
Result = TypeVar("Result")

if limit := os.environ.get(PIXEL_LIMIT):
    Image.MAX_IMAGE_PIXELS = int(limit)


def read_image(path: str | Path, white_level: int = WHITE_LEVEL) -> tv_tensors.Image:
    """Read an image as RGB.

    Grey images are repeated over the three channels, an alpha channel is dropped, and 16-bit grey is divided by the
    white level (Pillow's own conversion would clip everything above 255 to white). An EXIF orientation is applied.

    Returns:
        Image ``[3, H, W]``, float32 in 0..1.

    Raises:
        ValueError: If the file cannot be decoded, or holds numbers of no known scale.
    """
    with decoding_errors_named("image", path):
        image = open_image(path)
        if not is_deep(image):
            # Bit for bit what Anomalib reads, so that its prediction on a folder sees the same numbers.
            return cast("tv_tensors.Image", to_dtype(to_image(image.convert("RGB")), torch.float32, scale=True))
        pixels = np.asarray(image)
    white = 1 if np.issubdtype(pixels.dtype, np.floating) else white_level
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= white):
        msg = (
            f"The image `{path}` holds numbers from {low:g} to {high:g}, but they have to lie between 0 and {white}, "
            "which is white. Save it with 8 or 16 bits per channel, or train with another `white_level`."
        )
        raise ValueError(msg)
    scaled = (pixels.astype(np.float64) / white).astype(np.float32)
    return tv_tensors.Image(torch.from_numpy(scaled).expand(3, -1, -1).contiguous())


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image, turned as its EXIF orientation says: as viewers and labelling tools show it.

    Raises:
        OSError: Or another of :data:`DECODING_ERRORS`, if the file cannot be decoded.
    """
    # Not by its name: Pillow 13 then garbles uncompressed TIFFs that are turned by a quarter.
    with Path(path).open("rb") as file, Image.open(file) as image:
        image.load()
        with suppress(Exception):  # the EXIF data may be broken, and the image sound
            ImageOps.exif_transpose(image, in_place=True)
        return image


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def inspect_image(path: str | Path) -> tuple[int, int]:
    """Read height and width of an image, as :func:`open_image` turns it, from its header alone.

    Raises:
        ValueError: If the header cannot be decoded.
    """
    with decoding_errors_named("image", path), Image.open(path) as image:
        width, height = image.size
        with suppress(*DECODING_ERRORS, TypeError):
            # The method of the base class: that of PNGs decodes the whole image. Pillow turns TIFFs itself.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
            if orientation in {5, 6, 7, 8} and image.format != "TIFF":
                return width, height
        return height, width


def warn_of_unused_range(paths: Sequence[str | Path], white_level: int) -> None:
    """Warn if 16-bit images are nearly black, as a camera's with 12 bits, unless another white level is chosen."""
    if white_level != WHITE_LEVEL:
        return
    peaks: dict[int, str | Path] = {}
    for path in paths[:: max(1, len(paths) // _SAMPLED_IMAGES)]:
        with suppress(*DECODING_ERRORS):  # reported when the image is read
            peaks[_peak_of_deep_image(path)] = path
    highest = max(peaks, default=0)
    if 0 < highest <= WHITE_LEVEL // 4:
        bits = next(bits for bits in (8, 10, 12, 14) if highest < 2**bits)
        logger.warning(
            "16-bit images are nearly black: the highest number in some of them is %d (`%s`), and %d is white. If the "
            "camera has %d bits, train with `white_level` %d of the data module, which the checkpoint keeps for "
            "predictions. Save colour with 8 bits per channel.",
            *(highest, peaks[highest], white_level, bits, 2**bits - 1),
        )


def map_files(function: Callable[[Item], Result], items: Sequence[Item], description: str) -> list[Result]:
    """Apply a function that reads files to many items, in a few threads; a progress bar appears after two seconds."""
    progress = {"tqdm_class": tqdm, "desc": description, "delay": 2, "unit": "file"}
    found: list[Result] = thread_map(function, items, max_workers=_READING_THREADS, **progress)
    return found


@contextmanager
def decoding_errors_named(kind: str, path: str | Path) -> Iterator[None]:
    """Turn an error of decoding into a ValueError that names the file, its kind ("mask") and what to do."""
    try:
        yield
    except Image.DecompressionBombError as error:
        msg = (
            f"The {kind} `{path}` has more pixels than Pillow decodes, a guard against files made to fill the memory "
            f"({error}). Save it smaller, or, if you trust it, set {PIXEL_LIMIT} to the number of its pixels."
        )
        raise ValueError(msg) from error
    except DECODING_ERRORS as error:
        reason = "Pillow knows no such image" if isinstance(error, UnidentifiedImageError) else str(error)
        msg = f"The {kind} `{path}` cannot be decoded ({reason}). Replace the file, or take it out of the data set."
        raise ValueError(msg) from error


def _peak_of_deep_image(path: str | Path) -> int:
    """Return the highest number in a file of 16 bits per channel; 0 for any other file."""
    with Image.open(path) as image:
        if not any(";16" in str(tile[3]) for tile in image.tile):
            return 0
    pixels = np.asarray(open_image(path))
    # Pillow keeps the upper eight bits of colour.
    return int(pixels.max()) if pixels.ndim == 2 else int(pixels[..., :3].max()) * 257
