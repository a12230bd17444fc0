"""Masks of defects: read, checked against their images, and resized without losing a thin line.

torchvision resizes masks by picking the nearest pixel, and picks nothing of a one-pixel crack between two samples.
:class:`DefectMask` brings its own resize kernel, so that any transform that resizes image and mask together (a
``Resize`` in a ``Compose``, or the one that Anomalib appends for the model's input size) keeps every defect.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Mask, wrap

from .reading import decoding_errors_named, inspect_image, is_deep, map_files, open_image

logger = logging.getLogger(__name__)

_LOSSY_FORMATS = {"JPEG", "MPO", "JPEG2000", "AVIF"}
_LOSSY_COMPRESSIONS = {"jpeg", "tiff_jpeg", "webp"}  # of a TIFF
_LOSSY_MASK_LEVEL = 127


class DefectMask(Mask):
    """A mask ``[..., H, W]`` of defects (zero: background) that loses none of them when it is resized.

    It behaves like any other :class:`torchvision.tv_tensors.Mask` in flips, crops and other geometric transforms.

    Example:
        >>> import torch
        >>> from torchvision.transforms.v2 import Resize
        >>> mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
        >>> mask[0, 33, :] = 1  # a line of one pixel
        >>> int(Resize((8, 8))(Mask(mask)).sum()), int(Resize((8, 8))(DefectMask(mask)).sum())
        (0, 8)
    """


def read_mask(path: str | Path) -> DefectMask:
    """Read a mask ``[H, W]``, uint8, 0 or 1, as :func:`read_defect_pixels` does."""
    return DefectMask(torch.from_numpy(read_defect_pixels(path).astype(np.uint8)))


def read_defect_pixels(path: str | Path) -> NDArray[np.bool_]:
    """Read which pixels of a mask are defect, boolean, shape (H, W): those that are neither black nor transparent.

    Lossy compression leaves dark grey around every edge: in such a file only what is brighter than half the range
    counts.

    Raises:
        ValueError: If the file cannot be decoded.
    """
    with decoding_errors_named("mask", path):
        level = _LOSSY_MASK_LEVEL if _is_lossy(path) else 0
        mask = open_image(path)
        if is_deep(mask) or (mask.mode in {"1", "L"} and not mask.has_transparency_data):
            return np.asarray(np.asarray(mask) > level)
        # A dark colour rounds to grey 0: look at the channels, not at their brightness.
        pixels = np.asarray(mask.convert("RGBA"))
        return np.asarray((pixels[..., :3] > level).any(axis=-1) & (pixels[..., 3] > level))


def inspect_masks(pairs: Sequence[tuple[str | Path, str | Path | None]]) -> list[bool | None]:
    """Check masks against their images, warn of those that look inverted, and tell whether each shows a defect.

    A pair is an image and its mask, or an image and None, for which None is returned.

    Raises:
        ValueError: If a file cannot be decoded, or a mask has another size than its image.
    """
    found = map_files(_inspect, pairs, "Reading the masks")
    warn_of_inverted_masks([str(pair[1]) for pair, (_, inverted) in zip(pairs, found, strict=True) if inverted])
    return [has_defect for has_defect, _ in found]


def looks_inverted(defect_pixels: NDArray[np.bool_]) -> bool:
    """Tell whether a mask, boolean, shape (H, W), looks as if its black and white were swapped.

    Of 510 masks of four real data sets (defects of up to 58 % of the image) none does, and 99 % of their inverses do.
    """
    border = np.concatenate([defect_pixels[[0, -1]].ravel(), defect_pixels[:, [0, -1]].ravel()])
    return bool(defect_pixels.mean() > 0.5 and border.mean() > 0.5)


def warn_of_inverted_masks(paths: Sequence[str | Path]) -> None:
    """Warn once of all masks that look inverted, if there are any."""
    if paths:
        logger.warning(
            "Most of the image and of its border is defect by these masks (%d): %s. What is neither black nor "
            "transparent in a mask is defect: if black and white are swapped, invert the files.",
            len(paths),
            ", ".join(f"`{path}`" for path in paths),
        )


def check_same_size(
    image_path: str | Path, image_size: Sequence[int], mask_path: str | Path, mask_size: Sequence[int]
) -> None:
    """Raise a ValueError if height and width of a mask are not its image's."""
    if tuple(image_size) != tuple(mask_size):
        msg = (
            f"The mask `{mask_path}` is {mask_size[1]} x {mask_size[0]} pixels (width x height), but its image "
            f"`{image_path}` is {image_size[1]} x {image_size[0]} (with its EXIF orientation, as viewers show it)."
        )
        raise ValueError(msg)


def resize_defects(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a mask ``[..., H, W]`` of any dtype, non-negative, to a height and a width so that no defect disappears.

    An axis that shrinks is max-pooled: a defective pixel marks every target pixel that it overlaps. An axis that grows
    takes the nearest pixel, which repeats every source pixel at least once. The axes are independent of each other.
    """
    height, width = mask.shape[-2:]
    if (height, width) == size:
        return mask
    # Pooling exists for floating point only; double holds every integer that a mask may carry.
    dtype = torch.float32 if mask.dtype in {torch.bool, torch.uint8, torch.float32} else torch.float64
    values = mask.reshape(-1, 1, height, width).to(dtype)
    values = F.adaptive_max_pool2d(values, (min(height, size[0]), min(width, size[1])))
    # In whole numbers: floating point may skip a pixel of a long axis.
    rows, columns = (torch.arange(new) * old // new for old, new in zip(values.shape[-2:], size, strict=True))
    values = values.to(mask.dtype)[..., rows[:, None], columns]
    return values.reshape(*mask.shape[:-2], *size)


@transforms.register_kernel(transforms.resize, DefectMask)  # type: ignore[untyped-decorator]
def resize_defect_mask(
    mask: DefectMask,
    size: int | list[int] | None,
    interpolation: Any = None,  # noqa: ARG001 (torchvision passes the image's)
    max_size: int | None = None,
    **_kwargs: Any,
) -> DefectMask:
    """Resize a mask to the size that torchvision gives to an image of its height and width."""
    target = resized_size(mask.shape[-2:], size, max_size)
    resized: DefectMask = wrap(resize_defects(mask.as_subclass(torch.Tensor), target), like=mask)
    return resized


@transforms.register_kernel(transforms.resized_crop, DefectMask)  # type: ignore[untyped-decorator]
def resized_crop_defect_mask(
    mask: DefectMask, top: int, left: int, height: int, width: int, size: list[int], **_kwargs: Any
) -> DefectMask:
    """Crop a mask, then resize it, as ``RandomResizedCrop`` does with the image."""
    resized: DefectMask = transforms.resize(transforms.crop(mask, top, left, height, width), size)
    return resized


def resized_size(image_size: Sequence[int], size: int | Sequence[int] | None, max_size: int | None) -> tuple[int, int]:
    """Return height and width that torchvision's ``Resize(size, max_size=max_size)`` gives to an image."""
    height, width = image_size
    if size is not None and not isinstance(size, int) and len(size) == 2 and max_size is None:
        return int(size[0]), int(size[1])
    # Its rule is private: an expanded single element is resized, which costs next to nothing.
    stand_in = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, height, width)
    resized = transforms.resize(stand_in, size=size, max_size=max_size, antialias=False)
    return int(resized.shape[-2]), int(resized.shape[-1])


def _inspect(pair: tuple[str | Path, str | Path | None]) -> tuple[bool | None, bool]:
    """Return whether the mask of an image shows a defect, and whether it looks inverted."""
    image_path, mask_path = pair
    size = inspect_image(image_path)
    if mask_path is None:
        return None, False
    defect_pixels = read_defect_pixels(mask_path)
    check_same_size(image_path, size, mask_path, defect_pixels.shape)
    return bool(defect_pixels.any()), looks_inverted(defect_pixels)


def _is_lossy(path: str | Path) -> bool:
    with Image.open(path) as image:
        if image.format == "WEBP":  # either of two compressions, which Pillow does not tell
            compression = re.search(rb"VP8[ L]", Path(path).read_bytes())
            return compression is None or compression[0] == b"VP8 "
        return image.format in _LOSSY_FORMATS or image.info.get("compression") in _LOSSY_COMPRESSIONS
