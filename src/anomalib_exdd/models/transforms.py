"""Geometry of transforms: which part of an image is left, and where its map belongs in the whole image."""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from typing import NamedTuple

import torch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import CenterCrop, Compose, Grayscale, Normalize, Resize, ToDtype, ToImage, Transform

from anomalib_exdd.images.masks import resized_size

_CUTS = (CenterCrop, ExportableCenterCrop)
_LEAVE_POSITIONS = (Normalize, ToDtype, ToImage, Grayscale)


class Part(NamedTuple):
    """A part of an image, in its pixels; where the image was padded, it reaches beyond the image."""

    top: Fraction
    left: Fraction
    height: Fraction
    width: Fraction


def steps_of(transform: Transform | None) -> Iterator[Transform]:
    """Yield the single steps of a transform, in their order."""
    if isinstance(transform, Compose):
        for step in transform.transforms:
            yield from steps_of(step)
    elif transform is not None:
        yield transform


def first_resize(transform: Transform | None) -> Resize | None:
    """Return the resize that comes before all other changes of the geometry: an image may be read in its size."""
    step = next((step for step in steps_of(transform) if not isinstance(step, _LEAVE_POSITIONS)), None)
    return step if isinstance(step, Resize) else None


def crops_of(transform: Transform | None) -> list[Transform]:
    """Return the steps of a transform that cut something off."""
    return [step for step in steps_of(transform) if isinstance(step, _CUTS)]


def covered_pixels(start: Fraction, length: Fraction, count: int) -> tuple[int, int]:
    """Return the pixels, of ``count``, that a stretch of an axis touches: the first, and that behind the last."""
    return max(0, math.floor(start)), min(count, math.ceil(start + length))


def seen_part(transforms: Iterable[Transform | None], size: Sequence[int]) -> Part | None:
    """Return the part of an image (height, width) that transforms leave; None if a step may move pixels elsewhere."""
    now = size
    start, pixel = [Fraction(0)] * 2, [Fraction(1)] * 2  # of both axes, in pixels of the image
    for step in chain.from_iterable(map(steps_of, transforms)):
        before = now
        if isinstance(step, Resize):
            now = resized_size(before, step.size, step.max_size)
            pixel = [length * old / new for length, old, new in zip(pixel, before, now, strict=True)]
        elif isinstance(step, (*_CUTS, SquarePad)):
            now = [max(before)] * 2 if isinstance(step, SquarePad) else step.size
            offsets = map(_offset, before, now)
            start = [edge + length * offset for edge, length, offset in zip(start, pixel, offsets, strict=True)]
        elif not isinstance(step, _LEAVE_POSITIONS):
            return None
    return Part(*start, *(length * count for length, count in zip(pixel, now, strict=True)))


def whole_maps(maps_NHW: Tensor, transform: Transform | None, size: Sequence[int]) -> Tensor:
    """Put maps of cropped images where they belong in maps of whole ones of a height and width, for pictures.

    What was cut off has the lowest of all values. Maps are returned as they are if nothing was cut off, or its place is
    not known.
    """
    part = seen_part([transform], size) if crops_of(transform) else None
    if part is None:
        return maps_NHW
    padding: list[int] = []  # left, right, top and bottom; negative where the image was padded
    for start, length, count, side in (
        (part.left, part.width, maps_NHW.shape[-1], size[1]),
        (part.top, part.height, maps_NHW.shape[-2], size[0]),
    ):
        scale = count / length
        before = round(start * scale)
        padding += [before, round(side * scale) - before - count]
    return F.pad(maps_NHW, padding, value=float(maps_NHW.min()))


def _offset(length: int, target: int) -> int:
    """Return where a cut begins along an axis, as torchvision rounds it; negative where padding comes first."""
    return round((length - target) / 2) if target <= length else -((target - length) // 2)


def without_normalization(image_CHW: Tensor, transform: Transform | None) -> Tensor:
    """Undo the last normalisation of a transformed image; the result is float32 in 0..1, shape (3, H, W)."""
    image_CHW = image_CHW.float()
    for step in [step for step in steps_of(transform) if isinstance(step, Normalize)][-1:]:
        mean, std = (torch.tensor(value, device=image_CHW.device).view(-1, 1, 1) for value in (step.mean, step.std))
        image_CHW = image_CHW * std + mean
    return image_CHW.clamp(0, 1)
