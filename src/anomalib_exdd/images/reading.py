"""Reading images and masks, with errors that name the file.

What a user's folder may hold is decided here: 8-bit and 16-bit grey, RGB, RGBA and palette images; masks of any of
these kinds, in which every pixel that is neither black nor transparent is defect.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import to_dtype, to_image
from tqdm import tqdm

from .decoding import (
    DECODING_ERRORS,
    PIXEL_LIMIT,
    is_deep,
    open_image,
    peak_of_deep_image,
    read_defect_pixels,
    read_size,
)
from .masks import DefectMask

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS: tuple[str, ...] = tuple(sorted({*IMG_EXTENSIONS, ".bmp", ".tif", ".tiff"}))

WHITE_LEVEL = 65535
"""The number that is white in images of more than 8 bits, unless their owner knows better."""

_READING_THREADS = 8
_LOOKED_AT = 16  # images, to tell how many bits a camera has

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_image(path: str | Path, white_level: int = WHITE_LEVEL) -> tv_tensors.Image:
    """Read an image as RGB.

    Grey images are repeated over the three channels, an alpha channel is dropped, and 16-bit grey is divided by the
    white level (Pillow's own conversion would clip everything above 255 to white). An EXIF orientation is applied.

    Args:
        path: Image file.
        white_level: The number that is white in images of more than 8 bits.

    Returns:
        Image ``[3, H, W]``, float32 in 0..1.

    Raises:
        ValueError: If the file cannot be decoded, or holds numbers of no known scale.
    """
    try:
        image = open_image(path)
        if not is_deep(image):
            # Bit for bit what Anomalib reads, so that its prediction on a folder sees the same numbers.
            return cast("tv_tensors.Image", to_dtype(to_image(image.convert("RGB")), torch.float32, scale=True))
        pixels = _scale_deep_pixels(np.asarray(image), path, white_level)
    except _UnknownScaleError:
        raise
    except DECODING_ERRORS as error:
        raise ValueError(_undecodable("image", path, error)) from error
    return tv_tensors.Image(torch.from_numpy(pixels).expand(3, -1, -1).contiguous())


def warn_of_unused_range(paths: Sequence[str | Path], white_level: int) -> None:
    """Warn of 16-bit images that are nearly black, as those of a camera with 12 bits; a few of them are looked at.

    Args:
        paths: Image files.
        white_level: The number that is white. A chosen one is not doubted.
    """
    if white_level != WHITE_LEVEL:
        return
    peaks: dict[int, str | Path] = {}
    for path in paths[:: max(1, len(paths) // _LOOKED_AT)]:
        with suppress(*DECODING_ERRORS):  # whoever reads it says what is wrong with it
            peaks[peak_of_deep_image(path) or 0] = path
    highest = max(peaks, default=0)
    if 0 < highest <= WHITE_LEVEL // 4:
        bits = next(bits for bits in (8, 10, 12, 14) if highest < 2**bits)
        logger.warning(
            "16-bit images are nearly black: the highest number in some of them is %d (`%s`), and %d is white. If the "
            "camera has %d bits, train with `white_level` %d of the data module (`--data.white_level %d`), which the "
            "checkpoint keeps for predictions. It applies to grey images; save colour with 8 bits per channel.",
            *(highest, peaks[highest], white_level, bits, 2**bits - 1, 2**bits - 1),
        )


def read_mask(path: str | Path) -> DefectMask:
    """Read a mask, see :func:`.read_defect_pixels`.

    Args:
        path: Mask file.

    Returns:
        Mask ``[H, W]``, uint8, 0 or 1.

    Raises:
        ValueError: If the file cannot be decoded.
    """
    return DefectMask(torch.from_numpy(_decode_mask(path).astype(np.uint8)))


def inspect_image(path: str | Path) -> tuple[int, int]:
    """Read the size of an image from its header.

    Args:
        path: Image file.

    Returns:
        Height and width.

    Raises:
        ValueError: If the header cannot be decoded.
    """
    try:
        return read_size(path)
    except DECODING_ERRORS as error:
        raise ValueError(_undecodable("image", path, error)) from error


class InspectedPair(NamedTuple):
    """What an image and its mask say before they are needed.

    Attributes:
        has_defect: Whether any pixel of the mask is defect, at the mask's own resolution.
        size: Height and width of both.
        looks_inverted: Whether most of the mask and of its border is defect, as where black and white are swapped.
    """

    has_defect: bool
    size: tuple[int, int]
    looks_inverted: bool


def inspect_pair(image_path: str | Path, mask_path: str | Path) -> InspectedPair:
    """Say whether a mask shows a defect and whether it fits its image.

    The mask is decoded, of the image only the header is read.

    Args:
        image_path: Image file.
        mask_path: Its mask.

    Raises:
        ValueError: If one of the files cannot be decoded, or if they differ in size.
    """
    size = inspect_image(image_path)
    defect_pixels = _decode_mask(mask_path)
    check_same_size(image_path, size, mask_path, defect_pixels.shape)
    return InspectedPair(bool(defect_pixels.any()), size, looks_inverted(defect_pixels))


def looks_inverted(defect_pixels: NDArray[np.bool_]) -> bool:
    """Tell whether a mask looks as if its black and white were swapped.

    Of 510 masks of four real data sets (defects of up to 58 % of the image) none does, and 99 % of their inverses do.

    Args:
        defect_pixels: Boolean, shape (H, W).
    """
    border = np.concatenate([defect_pixels[[0, -1]].ravel(), defect_pixels[:, [0, -1]].ravel()])
    return bool(defect_pixels.mean() > 0.5 and border.mean() > 0.5)


def warn_of_inverted_masks(paths: Sequence[str | Path]) -> None:
    """Warn of masks that look inverted, of all of them at once.

    Args:
        paths: The masks; none, and nothing is said.
    """
    if paths:
        logger.warning(
            "Most of the image and of its border is defect by these masks (%d): %s. What is neither black nor "
            "transparent in a mask is defect: if black and white are swapped, invert the files. Otherwise the model "
            "learns good surface as defective.",
            len(paths),
            ", ".join(f"`{path}`" for path in paths),
        )


def check_same_size(
    image_path: str | Path,
    image_size: Sequence[int],
    mask_path: str | Path,
    mask_size: Sequence[int],
) -> None:
    """Refuse a mask whose size is not its image's.

    Args:
        image_path: Image file, for the message.
        image_size: Height and width of the image.
        mask_path: Mask file, for the message.
        mask_size: Height and width of the mask.

    Raises:
        ValueError: If the sizes differ.
    """
    if tuple(image_size) == tuple(mask_size):
        return
    msg = (
        f"The mask `{mask_path}` is {mask_size[1]} x {mask_size[0]} pixels (width x height), but its image "
        f"`{image_path}` is {image_size[1]} x {image_size[0]}. Save the mask in the size of its image."
    )
    if tuple(image_size) == tuple(mask_size)[::-1]:
        msg += " Images are turned as their EXIF orientation says: draw masks on them as viewers show them."
    raise ValueError(msg)


def map_files(function: Callable[[Item], Result], items: Sequence[Item], description: str) -> list[Result]:
    """Apply a function that reads files to many items, in a few threads, with a progress bar when it takes long.

    Args:
        function: Reads the files of one item.
        items: What to read.
        description: Text of the progress bar, which appears after two seconds.

    Returns:
        The results, in the order of the items.
    """
    threads = min(_READING_THREADS, (os.cpu_count() or 1) + 2, max(1, len(items)))
    executor = ThreadPoolExecutor(threads)
    try:
        return list(tqdm(executor.map(function, items), total=len(items), desc=description, delay=2, unit="file"))
    finally:
        executor.shutdown(cancel_futures=True)  # after an error, the thousands of files behind it need no reading


class _UnknownScaleError(ValueError):
    """An image decodes, but nobody can say which number is white."""


def _scale_deep_pixels(pixels: NDArray[np.generic], path: str | Path, white_level: int) -> NDArray[np.float32]:
    """Scale the numbers of a 16-bit, 32-bit or floating-point image to 0..1."""
    low, high = float(pixels.min()), float(pixels.max())
    if np.issubdtype(pixels.dtype, np.floating):
        if not (low >= 0 and high <= 1):
            msg = (
                f"The image `{path}` holds floating-point numbers from {low:g} to {high:g}, but they have to lie "
                "between 0 and 1. Save it with 8 or 16 bits per channel."
            )
            raise _UnknownScaleError(msg)
        return pixels.astype(np.float32)
    if low < 0 or high > white_level:
        msg = (
            f"The image `{path}` holds integers from {low:.0f} to {high:.0f}, but they have to lie between 0 and "
            f"{white_level}, which is white. Save it with 8 or 16 bits per channel, or train with another "
            "`white_level` of the data module."
        )
        raise _UnknownScaleError(msg)
    return (pixels.astype(np.float64) / white_level).astype(np.float32)


def _decode_mask(path: str | Path) -> NDArray[np.bool_]:
    try:
        return read_defect_pixels(path)
    except DECODING_ERRORS as error:
        raise ValueError(_undecodable("mask", path, error)) from error


def _undecodable(kind: str, path: str | Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"The {kind} `{path}` is gone since the folder was read. Put it back, or start anew."
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"The {kind} `{path}` has more pixels than Pillow decodes: a guard against files made to fill the memory. "
            f"({error}) If you trust it, set the environment variable {PIXEL_LIMIT} to the number of its pixels, or "
            "save it smaller: models resize it anyway."
        )
    reason = "Pillow knows no such image" if isinstance(error, UnidentifiedImageError) else str(error)
    return f"The {kind} `{path}` cannot be decoded ({reason}). Replace the file, or take it out of the data set."
