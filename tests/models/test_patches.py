"""Which patches belong to defects, and where patches lie."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from anomalib_exdd.models.exdd.patches import (
    defect_crops,
    defect_patches,
    farthest_patches,
    outline_cells,
    patch_centres,
)


def test_a_tiny_defect_keeps_its_most_covered_patch() -> None:
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[7, 6:10] = 1  # two pixels in the first cell, two in the second: the first wins
    mask[20:23, 20] = 1
    belongs = defect_patches(mask, (4, 4), 0.5)
    assert belongs.nonzero().tolist() == [[0, 0], [2, 2]]


def test_coverage_decides_for_large_defects() -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, :12] = True  # full first column of cells, half of the second
    assert defect_patches(mask, (4, 4), 0.5).sum(0).tolist() == [4, 4, 0, 0]
    assert defect_patches(mask, (4, 4), 0.51).sum(0).tolist() == [4, 0, 0, 0]


def test_no_defect_no_patch() -> None:
    assert not defect_patches(torch.zeros(30, 20), (4, 3), 0.1).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(32, 24, 4, 3), (37, 29, 5, 4), (16, 16, 16, 16)]), st.floats(0.05, 1))
def test_every_defect_is_represented(seed: int, shape: tuple[int, int, int, int], min_coverage: float) -> None:
    height, width, rows, columns = shape
    rng = np.random.default_rng(seed)
    mask = ndimage.binary_dilation(rng.random((height, width)) < 0.01, iterations=int(rng.integers(0, 3)))
    belongs = defect_patches(torch.from_numpy(mask), (rows, columns), min_coverage).numpy()
    pixel_belongs = belongs[
        (np.arange(height) * rows // height)[:, None], (np.arange(width) * columns // width)[None, :]
    ]
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    for defect in range(1, count + 1):
        assert pixel_belongs[labels == defect].any()
    touched = np.zeros_like(belongs)
    for y, x in np.argwhere(mask):
        touched[y * rows // height, x * columns // width] = True
    if height % rows == 0 and width % columns == 0:
        assert not (belongs & ~touched).any()


def test_centres_of_patches() -> None:
    assert patch_centres((2, 2), (16, 8)).tolist() == [[4, 2], [4, 6], [12, 2], [12, 6]]


def test_crops_cover_each_defect_with_a_margin() -> None:
    image = torch.arange(3 * 40 * 30, dtype=torch.float32).reshape(3, 40, 30)
    mask = torch.zeros(40, 30)
    mask[0:5, 0:4] = 1  # at the border, where there is no room for the margin
    mask[20:22, 10:25] = 1
    crops, boxes = defect_crops(image, mask)
    assert sorted(boxes) == [(0, 0, 6, 5), (19, 9, 4, 17)]
    assert crops.shape == (2, 3, 128, 128)
    corner = crops[boxes.index((19, 9, 4, 17))][:, 0, 0]
    torch.testing.assert_close(corner, image[:, 19, 9])


class TestOutlineCells:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10_000), st.sampled_from([(64, 48, 16, 12), (61, 50, 30, 25), (128, 128, 32, 32)]))
    def test_they_are_the_same_as_by_loops(self, seed: int, shape: tuple[int, int, int, int]) -> None:
        height, width, rows, columns = shape
        rng = np.random.default_rng(seed)
        mask = ndimage.binary_dilation(rng.random((height, width)) < 1e-3, iterations=int(rng.integers(1, 6)))
        mask[int(rng.integers(height)), int(rng.integers(width))] = True
        coverage = np.empty((rows, columns))
        for y in range(rows):
            for x in range(columns):  # cells of adaptive pooling may share a row of pixels
                top, bottom = y * height // rows, -(-(y + 1) * height // rows)
                left, right = x * width // columns, -(-(x + 1) * width // columns)
                coverage[y, x] = mask[top:bottom, left:right].mean()
        most = coverage.max()
        inside, near, far = [], [], []
        for y in range(rows):
            for x in range(columns):
                cell = y * columns + x
                if coverage[y, x] >= min(0.5, most) - 1e-6:
                    inside.append(cell)
                elif coverage[y, x] < 0.1:
                    around = coverage[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9]
                    (near if around.any() else far).append(cell)
        cells, defective = outline_cells(torch.from_numpy(mask), (rows, columns))
        found, number = cells.tolist(), int(defective.sum())
        assert defective.tolist() == [True] * number + [False] * (len(found) - number)
        assert len(set(found)) == len(found)
        groups = [
            found[:number],
            [c for c in found[number:] if c in set(near)],
            [c for c in found[number:] if c in set(far)],
        ]
        assert sum(map(len, groups)) == len(found)
        for chosen, group, limit in zip(groups, (inside, near, far), (128, 192, 64), strict=True):
            assert set(chosen) <= set(group)
            assert len(chosen) == min(limit, len(group))
            if len(group) > limit:  # evenly spaced: no run of cells left out is longer than one step
                places = [-1, *(group.index(cell) for cell in chosen), len(group)]
                assert np.diff(places).max() <= -(-len(group) // limit) + 1

    def test_a_defect_smaller_than_half_a_cell_is_its_fullest_cell_and_no_free_one(self) -> None:
        mask = torch.zeros(64, 64)
        mask[9, 9] = 1  # a sixteenth of a cell
        cells, defective = outline_cells(mask, (16, 16))
        assert cells[defective].tolist() == [2 * 16 + 2]
        assert 2 * 16 + 2 not in cells[~defective].tolist()


def test_farthest_patches_take_what_no_normal_image_shows() -> None:
    distances = torch.tensor([0.1, 5.0, 0.2, 4.0, 3.0, 0.3] + [0.1] * 94)
    assert farthest_patches(distances, usual=3.5, most=0.1).nonzero().flatten().tolist() == [1, 3]
    assert farthest_patches(distances, usual=9.0, most=0.1).nonzero().flatten().tolist() == [1]
    assert int(farthest_patches(distances, usual=0.0, most=0.03).sum()) == 3
