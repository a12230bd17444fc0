"""Which part of an image is left after transforms, against pixels that know where they come from."""

from typing import Any

import pytest
import torch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    Grayscale,
    InterpolationMode,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    Resize,
    Transform,
)

from anomalib_exdd.models.transforms import crops_of, first_resize, seen_part, steps_of, whole_maps

sides = st.integers(12, 60)
pairs = st.tuples(sides, sides)
NORMALIZE = Normalize(mean=[0.5], std=[0.5])


def resize(size: Any) -> Resize:
    return Resize(list(size) if isinstance(size, tuple) else size, interpolation=InterpolationMode.NEAREST_EXACT)


steps = st.one_of(
    st.builds(resize, st.one_of(sides, pairs)),
    st.builds(CenterCrop, st.one_of(sides, pairs)),
    st.builds(ExportableCenterCrop, pairs),
    st.builds(SquarePad),
)


@settings(max_examples=200, deadline=None)
@given(pairs, st.lists(steps, min_size=1, max_size=3))
def test_part_is_where_the_pixels_come_from(size: tuple[int, int], chain: list[Transform]) -> None:
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    image = torch.stack([rows, columns])[None].float()
    real = torch.ones(1, 1, *size)  # zero is padding
    for step in chain:
        image, real = step(image), step(real.bool()).float() if isinstance(step, SquarePad) else step(real)
    part = seen_part([chain[0], None, *(Compose([Compose([step])]) for step in chain[1:])], size)
    assert part is not None
    # Each step may take the pixel beside, of the image as it is then.
    coarse = 1 + sum(float(max(part.height / image.shape[-2], part.width / image.shape[-1], 1)) for _ in chain)
    for axis, (start, length) in enumerate(((part.top, part.height), (part.left, part.width))):
        target = image.shape[-2 + axis]
        expected = float(start) + (torch.arange(target) + 0.5) * float(length / target) - 0.5
        difference = image[0, axis] - (expected[:, None] if axis == 0 else expected)
        assert (difference[real[0, 0] > 0].abs() <= coarse).all()


@pytest.mark.parametrize("last", [RandomHorizontalFlip(), RandomCrop(5)])
def test_other_steps_are_not_guessed(last: Transform) -> None:
    assert seen_part([Resize((9, 9)), last], (10, 10)) is None


def test_cases_worked_out_by_hand() -> None:
    # 400 x 200 becomes 200 x 100, of which rows 20 to 180 and columns 10 to 90 are left.
    chain = [Resize((200, 100)), Compose([NORMALIZE, CenterCrop((160, 80))])]
    assert seen_part(chain, (400, 200)) == (40, 20, 320, 160)
    # 90 x 120 becomes 60 x 80; two columns of 80 are cut off, and ten rows padded on either side.
    assert seen_part([Resize(60), CenterCrop((80, 76))], (90, 120)) == (-15, 3, 120, 114)
    assert seen_part([SquarePad(), Resize((64, 64))], (90, 120)) == (-15, 0, 120, 120)
    assert seen_part([None], (7, 5)) == seen_part([Resize((3, 3))], (7, 5)) == (0, 0, 7, 5)


def test_steps() -> None:
    crop, whole = CenterCrop(5), Resize((7, 7))
    assert list(steps_of(Compose([Compose([whole]), crop]))) == [whole, crop]
    assert list(steps_of(None)) == []
    assert crops_of(Compose([whole, Compose([crop]), ExportableCenterCrop(3)]))[0] is crop
    assert crops_of(Compose([whole, NORMALIZE, SquarePad()])) == []
    assert first_resize(Compose([NORMALIZE, Grayscale(), whole, crop])) is whole
    assert first_resize(Compose([crop, whole])) is None


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [(CenterCrop((6, 4)), slice(3, 9), slice(2, 6)), (CenterCrop((16, 4)), slice(0, 12), slice(2, 6))],
)
def test_maps_of_cropped_images_are_put_where_they_belong(crop: CenterCrop, rows: slice, columns: slice) -> None:
    transform = Compose([Resize((12, 8)), crop])
    maps = torch.rand(3, *crop.size) + 1
    whole = whole_maps(maps, transform, (120, 160))
    assert whole.shape == (3, 12, 8)
    assert torch.equal(transform.transforms[1](whole)[:, 2:-2], maps[:, 2:-2])  # but for what was padded
    outside = torch.ones(12, 8, dtype=torch.bool)
    outside[rows, columns] = False
    assert (whole[:, outside] == maps.min()).all()
    for unchanged in (None, Resize((12, 8)), Compose([crop, RandomHorizontalFlip()])):
        assert whole_maps(maps, unchanged, (120, 160)) is maps
