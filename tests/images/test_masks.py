import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import Image, Mask

from anomalib_exdd.images.masks import DefectMask, resize_defects

sides = st.integers(min_value=1, max_value=24)


@st.composite
def sparse_masks(draw: st.DrawFn) -> torch.Tensor:
    height, width = draw(sides), draw(sides)
    mask = torch.zeros(height, width, dtype=torch.uint8)
    pixels = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1), st.sampled_from([1, 7, 255]))
    for row, column, value in draw(st.lists(pixels, max_size=5)):
        mask[row, column] = value
    return mask


def sources_of(target: int, target_size: int, source_size: int) -> list[int]:
    """Source pixels that a target pixel shows: all it overlaps when shrinking, the nearest one when growing."""
    if target_size >= source_size:
        return [target * source_size // target_size]
    # Pixel s covers [s, s + 1) * target_size / source_size, in whole numbers.
    return [
        s
        for s in range(source_size)
        if s * target_size < (target + 1) * source_size and (s + 1) * target_size > target * source_size
    ]


def resize_by_hand(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    result = torch.zeros(size, dtype=mask.dtype)
    for row in range(size[0]):
        for column in range(size[1]):
            rows = sources_of(row, size[0], mask.shape[0])
            columns = sources_of(column, size[1], mask.shape[1])
            result[row, column] = max(int(mask[r, c]) for r in rows for c in columns)
    return result


@given(mask=sparse_masks(), height=sides, width=sides)
@settings(max_examples=150, deadline=None)
def test_resize_equals_marking_every_overlapped_pixel(mask: torch.Tensor, height: int, width: int) -> None:
    assert torch.equal(resize_defects(mask, (height, width)), resize_by_hand(mask, (height, width)))


@given(mask=sparse_masks(), height=sides, width=sides)
@settings(max_examples=150, deadline=None)
def test_no_defect_disappears_and_none_appears(mask: torch.Tensor, height: int, width: int) -> None:
    resized = v2.Resize((height, width))(DefectMask(mask))

    assert bool(resized.any()) == bool(mask.any())
    assert set(resized.unique().tolist()) <= {0, *mask.unique().tolist()}
    for row, column in mask.nonzero().tolist():  # each pixel is found where it belongs
        top, bottom = row * height // mask.shape[0], -(-(row + 1) * height // mask.shape[0])
        left, right = column * width // mask.shape[1], -(-(column + 1) * width // mask.shape[1])
        assert resized[top : max(bottom, top + 1), left : max(right, left + 1)].any()


def test_thin_line_that_nearest_resize_loses_is_kept() -> None:
    mask = torch.zeros(1, 640, 230, dtype=torch.uint8)
    mask[:, 302, 20:200] = 255
    lost = v2.Resize((79, 28))(Mask(mask))
    kept = v2.Resize((79, 28))(DefectMask(mask))

    assert not lost.any(), "the test needs a line that torchvision loses"
    assert kept.any()


def test_growing_keeps_every_pixel_of_a_long_axis() -> None:
    # Floating-point index arithmetic can skip a source pixel here.
    mask = torch.arange(1, 20001).reshape(1, -1)
    assert torch.equal(resize_defects(mask, (1, 20003)).unique(), mask.flatten())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("leading", [(), (1,), (3, 1)])
def test_shape_and_dtype(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    resized = v2.Resize((5, 9))(DefectMask(torch.ones(*leading, 10, 4).to(dtype)))

    assert resized.shape == (*leading, 5, 9)
    assert resized.dtype == dtype
    assert isinstance(resized, DefectMask)


@pytest.mark.parametrize(
    "resize", [v2.Resize(7), v2.Resize([7]), v2.Resize(7, max_size=9), v2.Resize(None, max_size=9)]
)
def test_size_is_that_of_the_image(resize: v2.Transform) -> None:
    image, mask = resize(Image(torch.zeros(3, 10, 20)), DefectMask(torch.zeros(10, 20, dtype=torch.uint8)))
    assert image.shape[-2:] == mask.shape[-2:]


def test_stays_a_defect_mask_through_other_transforms() -> None:
    image = Image(torch.rand(3, 40, 30))
    pixels = torch.zeros(40, 30, dtype=torch.uint8)
    pixels[11, 3] = 1
    chain = v2.Compose(
        [v2.RandomHorizontalFlip(p=1), v2.CenterCrop((36, 28)), v2.Resize((6, 4)), v2.ToDtype(torch.float)]
    )

    _, mask = chain(image, DefectMask(pixels))

    assert isinstance(mask, DefectMask)
    # Row 11 - 2 of 36 in steps of 6; column 29 - 3 - 1 of 28 in steps of 7.
    assert mask.nonzero().tolist() == [[1, 3]]


def test_resized_crop_keeps_what_is_inside() -> None:
    pixels = torch.zeros(100, 100, dtype=torch.uint8)
    pixels[33, 47] = 1

    inside = transforms.resized_crop(DefectMask(pixels), 20, 20, 60, 60, [6, 6])
    outside = transforms.resized_crop(DefectMask(pixels), 50, 50, 50, 50, [6, 6])

    assert isinstance(inside, DefectMask)
    assert inside.nonzero().tolist() == [[1, 2]]
    assert not outside.any()


def test_plain_masks_are_left_to_torchvision() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[0, 3, 3] = 1
    assert not v2.Resize((2, 2))(Mask(mask)).any()


def test_copies_stay_defect_masks() -> None:
    assert isinstance(copy.deepcopy(DefectMask(torch.ones(2, 2))), DefectMask)
