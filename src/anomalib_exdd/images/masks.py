"""Masks that keep their defects: a torchvision mask type whose resize never loses a thin line.

torchvision resizes masks by picking the nearest pixel, and picks nothing of a one-pixel crack between two samples. An
image labelled defective would then reach the model with an empty mask. :class:`DefectMask` brings its own resize
kernel, so that any transform that resizes image and mask together (a ``Resize`` in a ``Compose``, or the one that
Anomalib appends for the model's input size) keeps every defect without knowing about it.

Shapes: masks are ``[..., H, W]``, zero is background, positive numbers are defect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Mask, wrap


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


def resize_defects(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a mask so that no defect disappears.

    An axis that shrinks is max-pooled: a defective pixel marks every target pixel that it overlaps. An axis that grows
    takes the nearest pixel, which repeats every source pixel at least once. The axes are independent of each other.

    Args:
        mask: Mask ``[..., H, W]`` of any dtype, non-negative.
        size: Height and width of the result.

    Returns:
        Mask ``[..., *size]`` of the same dtype, holding only values of the source.
    """
    height, width = mask.shape[-2:]
    if (height, width) == size:
        return mask
    if mask.numel() == 0:
        return mask.new_zeros(*mask.shape[:-2], *size)
    # Pooling exists for floating point only; double holds every integer that a mask may carry.
    dtype = torch.float32 if mask.dtype in {torch.bool, torch.uint8, torch.float32} else torch.float64
    values = mask.reshape(-1, 1, height, width).to(dtype)
    values = F.adaptive_max_pool2d(values, (min(height, size[0]), min(width, size[1])))
    values = values.to(mask.dtype)[..., _nearest(values.shape[-2], size[0]), :]
    values = values[..., _nearest(values.shape[-1], size[1])]
    return values.reshape(*mask.shape[:-2], *size)


@transforms.register_kernel(transforms.resize, DefectMask)  # type: ignore[untyped-decorator]
def resize_defect_mask(
    mask: DefectMask,
    size: int | list[int] | None,
    interpolation: Any = None,  # noqa: ARG001 (torchvision passes the image's)
    max_size: int | None = None,
    **_kwargs: Any,
) -> DefectMask:
    """Resize a :class:`DefectMask` as torchvision resizes the image beside it, without losing a defect.

    Args:
        mask: Mask ``[..., H, W]``.
        size: Target size in any form that ``Resize`` takes.
        interpolation: The image's interpolation; a mask has no use for it.
        max_size: Upper bound of the longer edge, as in ``Resize``.

    Returns:
        The resized mask, of the size that torchvision gives to an image of the same height and width.
    """
    target = resized_size(mask.shape[-2:], size, max_size)
    resized: DefectMask = wrap(resize_defects(mask.as_subclass(torch.Tensor), target), like=mask)
    return resized


@transforms.register_kernel(transforms.resized_crop, DefectMask)  # type: ignore[untyped-decorator]
def resized_crop_defect_mask(
    mask: DefectMask,
    top: int,
    left: int,
    height: int,
    width: int,
    size: list[int],
    **_kwargs: Any,
) -> DefectMask:
    """Crop a :class:`DefectMask`, then resize it, as ``RandomResizedCrop`` does with the image.

    Args:
        mask: Mask ``[..., H, W]``.
        top: First row of the crop.
        left: First column of the crop.
        height: Height of the crop.
        width: Width of the crop.
        size: Target size.

    Returns:
        The cropped and resized mask; every defect inside the crop is still there.
    """
    resized: DefectMask = transforms.resize(transforms.crop(mask, top, left, height, width), size)
    return resized


def _nearest(source: int, target: int) -> torch.Tensor:
    """Source index of each target pixel, in whole numbers: floating point may skip a pixel of a long axis."""
    return torch.arange(target) * source // target


def resized_size(image_size: Sequence[int], size: int | Sequence[int] | None, max_size: int | None) -> tuple[int, int]:
    """Ask torchvision for the size that a resize gives to an image.

    Its rule for one-number sizes and ``max_size`` is private; an expanded single element costs next to nothing.

    Args:
        image_size: Height and width of the image.
        size: Target size in any form that ``Resize`` takes.
        max_size: Upper bound of the longer edge, as in ``Resize``.

    Returns:
        Height and width after it.
    """
    height, width = image_size
    if size is not None and not isinstance(size, int) and len(size) == 2 and max_size is None:
        return int(size[0]), int(size[1])
    stand_in = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, height, width)
    resized = transforms.resize(stand_in, size=size, max_size=max_size, antialias=False)
    return int(resized.shape[-2]), int(resized.shape[-1])
