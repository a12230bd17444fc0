"""Geometry of transforms: which part of an image is left, and where its map belongs in the whole image."""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from torch import Tensor
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
    now = [size[0], size[1]]
    start, pixel = [Fraction(0)] * 2, [Fraction(1)] * 2  # of both axes, in pixels of the image
    for transform in transforms:
        for step in steps_of(transform):
            if isinstance(step, Resize):
                after = resized_size(now, step.size, step.max_size)
                pixel = [length * old / new for length, old, new in zip(pixel, now, after, strict=True)]
            elif isinstance(step, (*_CUTS, SquarePad)):
                after = (max(now), max(now)) if isinstance(step, SquarePad) else (step.size[0], step.size[1])
                start = [
                    edge + length * _offset(old, new)
                    for edge, length, old, new in zip(start, pixel, now, after, strict=True)
                ]
            elif isinstance(step, _LEAVE_POSITIONS):
                continue
            else:
                return None
            now = list(after)
    return Part(*start, *(length * count for length, count in zip(pixel, now, strict=True)))


def whole_maps(maps_NHW: Tensor, transform: Transform | None, size: Sequence[int]) -> Tensor:
    """Put maps of cropped images where they belong in maps of whole ones of a height and width, for pictures.

    What was cut off has the lowest of all values. Maps are returned as they are if nothing was cut off, or its place is
    not known.
    """
    part = seen_part([transform], size) if crops_of(transform) else None
    if part is None:
        return maps_NHW
    scales = [maps_NHW.shape[-2] / part.height, maps_NHW.shape[-1] / part.width]
    lengths = [round(side * scale) for side, scale in zip(size, scales, strict=True)]
    starts = [round(start * scale) for start, scale in zip((part.top, part.left), scales, strict=True)]
    whole = maps_NHW.new_full((len(maps_NHW), *lengths), float(maps_NHW.min()))
    target, source = [], []
    for start, length, count in zip(starts, lengths, maps_NHW.shape[-2:], strict=True):
        first, last = max(0, start), min(length, start + count)  # without what was padded
        target.append(slice(first, last))
        source.append(slice(first - start, last - start))
    whole[:, target[0], target[1]] = maps_NHW[:, source[0], source[1]]
    return whole


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
