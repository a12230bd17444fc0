"""Defect regions against a flood fill, and against masks that are blown up pixel by pixel."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from anomalib_exdd.models.regions import Region, find_regions
from anomalib_exdd.models.transforms import Part

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
MASKS = arrays(bool, SHAPES)


def flood_fill(mask: NDArray[np.bool_]) -> Iterator[set[tuple[int, int]]]:
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    while left:
        todo = [left.pop()]
        region = set(todo)
        while todo:
            y, x = todo.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            region |= near
            todo += near
        yield region


def brute_force(mask: NDArray[np.bool_], values: NDArray[np.float32]) -> list[Region]:
    regions = []
    for pixels in flood_fill(mask):
        ys, xs = zip(*pixels, strict=True)
        box = (min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1)
        regions.append(Region(box, len(pixels), float(max(values[y, x] for y, x in pixels))))
    return sorted(regions)


def values_for(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.random.default_rng(mask.size).random(mask.shape, dtype=np.float32)


@given(MASKS)
def test_regions_are_those_of_a_flood_fill(mask: NDArray[np.bool_]) -> None:
    values = values_for(mask)
    found = find_regions(mask, values, mask.shape)
    assert sorted(found) == brute_force(mask, values)
    assert [region.value for region in found] == sorted((region.value for region in found), reverse=True)


@given(MASKS, st.integers(1, 4), st.integers(1, 4))
def test_pixels_of_the_original_are_those_of_the_enlarged_mask(mask: NDArray[np.bool_], down: int, right: int) -> None:
    values = values_for(mask)
    block = np.ones((down, right), dtype=np.float32)
    large, large_values = np.kron(mask, block).astype(bool), np.kron(values, block)
    assert sorted(find_regions(mask, values, large.shape)) == brute_force(large, large_values)


@given(MASKS, st.integers(1, 30), st.integers(1, 30))
def test_boxes_cover_their_regions_and_lie_in_the_image(mask: NDArray[np.bool_], height: int, width: int) -> None:
    rows, columns = mask.shape
    values = values_for(mask)
    expected = {region.value: region for region in brute_force(mask, values)}
    for box, area, value, *_ in find_regions(mask, values, (height, width)):
        small = expected[value].box
        for start, length, pixels, cells, size in (
            (box[0], box[2], (small[0], small[0] + small[2]), columns, width),
            (box[1], box[3], (small[1], small[1] + small[3]), rows, height),
        ):
            first, last = pixels[0] * size / cells, pixels[1] * size / cells
            assert 0 <= start <= first + 1e-9 < start + 1 + 1e-9
            assert last - 1e-9 <= start + length <= size
            assert start + length < last + 1 + 1e-9
        assert area >= 1
        assert abs(area - expected[value].area * height * width / (rows * columns)) <= 1


@given(MASKS, st.integers(1, 3), st.tuples(st.integers(-5, 9), st.integers(-5, 9)), st.integers(6, 20))
def test_regions_of_a_part_lie_where_it_lies(
    mask: NDArray[np.bool_], scale: int, corner: tuple[int, int], side: int
) -> None:
    """Also where the part reaches beyond the image, into padding."""
    values = values_for(mask)
    block = np.ones((scale, scale), dtype=np.float32)
    large, large_values = np.kron(mask, block).astype(bool), np.kron(values, block)
    part = Part(*map(Fraction, (*corner, *large.shape)))
    found = {region.value: region for region in find_regions(mask, values, (side, side), part)}
    expected = {}
    for box, area, value, *_ in brute_force(large, large_values):
        left, top = max(0, box[0] + corner[1]), max(0, box[1] + corner[0])
        right, bottom = min(side, box[0] + corner[1] + box[2]), min(side, box[1] + corner[0] + box[3])
        if left < right and top < bottom:
            shown = (left, top, right - left, bottom - top)
            expected[value] = Region(shown, min(area, shown[2] * shown[3]), value)
    assert found == expected


def test_case_worked_out_by_hand() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[1, 2:4] = mask[2, 4] = True  # touches at a corner
    mask[3, 7] = True
    values = np.where(mask, np.float32(0.75), np.float32(0))
    values[3, 7] = 0.875
    assert find_regions(mask, values, (40, 40)) == [
        Region((35, 30, 5, 10), 50, 0.875),
        Region((10, 10, 15, 20), 150, 0.75),
    ]
    assert find_regions(np.zeros_like(mask), values, (40, 40)) == []
