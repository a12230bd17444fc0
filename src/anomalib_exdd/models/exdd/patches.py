"""The grid of patches on an image: positions, and which patches are defective.

Shape suffixes: B images, H x W pixels, h x w patches.
"""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

CROP_SIZE = (128, 128)
"""Size that defect crops are squashed to in the published code, (height, width)."""

_OUTLINE_REACH = 8  # cells around a defect that count as near
_OUTLINE_FREE = 0.1  # coverage of a cell that counts as free of defects
OUTLINE_DEFECT = 128
"""Cells in the defects of an image that are kept for its outline, at most."""
_OUTLINE_NEAR, _OUTLINE_FAR = 192, 64  # the same beside defects and elsewhere


def patch_centres(grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Return row and column of the centre of each of h x w patches, in pixels, row by row, int64, shape (h * w, 2)."""
    rows, columns = (
        ((torch.arange(patches) * 2 + 1) * pixels) // (2 * patches)
        for patches, pixels in zip(grid, image_size, strict=True)
    )
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)


def defect_patches(mask_HW: Tensor, grid: tuple[int, int], min_coverage: float) -> Tensor:
    """Tell which of h x w patches are defect by a mask that is non-zero on defects, boolean, shape (h, w), on the CPU.

    Those of which at least a share of ``min_coverage`` is defect; and of every connected defect, however small, the
    patch that holds most of it.
    """
    defect_HW = mask_HW.cpu() != 0
    coverage_hw = F.adaptive_avg_pool2d(defect_HW[None].float(), grid)[0]
    belongs_hw = coverage_hw >= min_coverage
    components, label_HW = cv2.connectedComponents(defect_HW.numpy().astype(np.uint8), connectivity=8)
    if components == 1:
        return belongs_hw
    rows, columns = np.nonzero(label_HW)
    patches = grid[0] * grid[1]
    patch = (rows * grid[0] // label_HW.shape[0]) * grid[1] + columns * grid[1] // label_HW.shape[1]
    pixels = np.bincount(label_HW[rows, columns] * patches + patch, minlength=components * patches)
    fullest = pixels.reshape(components, patches)[1:].argmax(axis=1)  # component 0 is the background
    belongs_hw.view(-1)[torch.from_numpy(fullest)] = True
    return belongs_hw


def outline_cells(
    mask_HW: Tensor, grid: tuple[int, int], most_defective: int = OUTLINE_DEFECT
) -> tuple[Tensor, Tensor]:
    """Choose some of h x w cells in and beside a defect, by a mask that is non-zero on defects.

    Returns:
        Cells, numbered row by row, int64, shape (N,), and whether each is at least half defect (where none is: the
        fullest), boolean. At most ``most_defective`` are.
    """
    coverage_1hw = F.adaptive_avg_pool2d((mask_HW.cpu() != 0)[None].float(), grid)
    near_N = F.max_pool2d(coverage_1hw, 2 * _OUTLINE_REACH + 1, stride=1, padding=_OUTLINE_REACH).flatten() > 0
    coverage_N = coverage_1hw.flatten()
    inside_N = coverage_N >= min(0.5, float(coverage_N.max()))
    outside_N = (coverage_N < _OUTLINE_FREE) & ~inside_N  # a tiny defect's fullest cell may be nearly free
    groups = ((inside_N, most_defective), (outside_N & near_N, _OUTLINE_NEAR), (outside_N & ~near_N, _OUTLINE_FAR))
    chosen = []
    for group_N, most in groups:
        rows = group_N.nonzero().flatten()
        chosen.append(rows[evenly_spaced(len(rows), most)])
    cells = torch.cat(chosen)
    return cells, torch.arange(len(cells)) < len(chosen[0])


def evenly_spaced(length: int, most: int) -> Tensor:
    """Choose at most so many of the numbers from 0 to ``length - 1``, int64."""
    count = min(most, length)
    return (torch.arange(count) * 2 + 1) * length // max(1, 2 * count)


def farthest_patches(distance_P: Tensor, usual: float, most: float) -> Tensor:
    """Tell which patches of a defective image without a mask are taken for its defect, boolean, shape (P,).

    Those that are farther from the negative bank than the farthest patch of a normal image ``usual``-ly is: one at
    least, and at most a share of ``most``, so that an image of another brightness does not fill the bank.
    """
    count = max(1, int(most * len(distance_P)))
    farthest = torch.zeros(len(distance_P), dtype=torch.bool, device=distance_P.device)
    farthest[distance_P.topk(count).indices] = True
    taken = farthest & (distance_P > usual)
    taken[distance_P.argmax()] = True
    return taken


def defect_crops(image_CHW: Tensor, mask_HW: Tensor) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """Cut the bounding box of every defect out of an image, as the thesis and the published code do.

    Returns:
        Crops with a margin of one pixel, resized to 128 x 128 bilinearly, shape (N, C, 128, 128), and their boxes
        (top, left, height, width).
    """
    defect_HW = (mask_HW.cpu() != 0).numpy().astype(np.uint8)
    components, _, statistics, _ = cv2.connectedComponentsWithStats(defect_HW, connectivity=8)
    height, width = mask_HW.shape
    boxes = []
    for left, top, box_width, box_height, _ in statistics[1:components].tolist():
        upper, outer = max(0, top - 1), max(0, left - 1)
        lower, right = min(height, top + box_height + 1), min(width, left + box_width + 1)
        boxes.append((upper, outer, lower - upper, right - outer))
    crops = [
        F.interpolate(image_CHW[None, :, y : y + h, x : x + w], CROP_SIZE, mode="bilinear", align_corners=False)
        for y, x, h, w in boxes
    ]
    return (torch.cat(crops) if crops else image_CHW.new_empty(0, image_CHW.shape[0], *CROP_SIZE)), boxes
