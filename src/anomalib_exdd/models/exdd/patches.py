"""The grid of patches on an image: positions, and which patches are defective, by masks, by boxes or by distance.

Shape suffixes: N boxes, P patches, O cells of the fine grid, F fine features, H x W pixels, h x w patches or cells.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

CROP_SIZE = (128, 128)  # size that defect crops are squashed to in the published code, (height, width)

_OUTLINE_REACH = 8  # cells around a defect that count as near
_OUTLINE_FREE = 0.1  # coverage of a cell that counts as free of defects
_OUTLINE_DEFECT = 128  # cells in the defects of an image that are kept for its outline, at most
_OUTLINE_NEAR, _OUTLINE_FAR = 192, 64  # the same beside defects and elsewhere
_CELLS_IN_BOXES = 2048  # that wait for the choice of patches, at most


def patch_centres(grid: Sequence[int], image_size: Sequence[int]) -> Tensor:
    """Return row and column of the centre of each of h x w patches, in pixels, row by row, int64, shape (h * w, 2)."""
    rows, columns = (
        ((torch.arange(patches) * 2 + 1) * pixels) // (2 * patches)
        for patches, pixels in zip(grid, image_size, strict=True)
    )
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)


def defect_patches(mask_HW: Tensor, grid: Sequence[int], min_coverage: float) -> Tensor:
    """Tell which of h x w patches are defect by a mask that is non-zero on defects, boolean, shape (h, w), on the CPU.

    Those of which at least a share of ``min_coverage`` is defect; and of every connected defect, however small, the
    patch that holds most of it.
    """
    coverage_hw = F.adaptive_avg_pool2d((mask_HW.cpu() != 0)[None].float(), (grid[0], grid[1]))[0]
    belongs_hw = coverage_hw >= min_coverage
    components, label_HW = _components(mask_HW)
    rows, columns = np.nonzero(label_HW)
    patches = grid[0] * grid[1]
    patch = (rows * grid[0] // label_HW.shape[0]) * grid[1] + columns * grid[1] // label_HW.shape[1]
    pixels = np.bincount(label_HW[rows, columns] * patches + patch, minlength=components * patches)
    fullest = pixels.reshape(components, patches)[1:].argmax(axis=1)  # component 0 is the background
    belongs_hw.view(-1)[torch.from_numpy(fullest)] = True
    return belongs_hw


def outline_cells(mask_HW: Tensor, grid: Sequence[int], most_defective: int = _OUTLINE_DEFECT) -> tuple[Tensor, Tensor]:
    """Choose some of h x w cells in and beside a defect, by a mask that is non-zero on defects.

    Returns:
        Cells, numbered row by row, int64, shape (N,), and whether each is at least half defect (where none is: the
        fullest), boolean. At most ``most_defective`` are.
    """
    coverage_1hw = F.adaptive_avg_pool2d((mask_HW.cpu() != 0)[None].float(), (grid[0], grid[1]))
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


class Outline(NamedTuple):
    """Cells of an image's fine grid, in and beside its defects."""

    features: Tensor  # float16, shape (O, F)
    defective: Tensor  # whether each cell is defect, boolean, shape (O,)

    @classmethod
    def of(cls, fine_Fhw: Tensor, mask_HW: Tensor) -> "Outline":
        """Take cells of a grid of fine features by the mask of the pre-processed image, non-zero on defects."""
        cells, defective = outline_cells(mask_HW, fine_Fhw.shape[-2:])
        return cls(_features_at(fine_Fhw, cells), defective)


def _features_at(fine_Fhw: Tensor, cells: Tensor) -> Tensor:
    """Return the features of cells, numbered row by row, float16, on the CPU, shape (O, F)."""
    return fine_Fhw.flatten(1).T[cells.to(fine_Fhw.device)].half().cpu()


class BoxedImage(NamedTuple):
    """What waits for the negative bank, by which patches are chosen, of a training image with boxes."""

    patches: Tensor  # which patches belong to each box, boolean, shape (N, P)
    cells: Outline | None  # cells in and beside the boxes, if the backbone has fine features
    patch_of_cell: Tensor  # int64, shape (O,)

    @classmethod
    def of(cls, mask_HW: Tensor, grid: Sequence[int], min_coverage: float, fine_Fhw: Tensor | None) -> "BoxedImage":
        """Take an image's boxes by its mask, non-zero in boxes, and fine features, if there are any.

        Patches belong to a box as to a defect, by :func:`defect_patches`. Boxes that overlap or touch count as one.
        """
        count, label_HW = _components(mask_HW)
        boxes = [defect_patches(torch.from_numpy(label_HW == box), grid, min_coverage) for box in range(1, count)]
        patches = torch.stack(boxes).flatten(1)
        if fine_Fhw is None:
            return cls(patches, None, torch.empty(0, dtype=torch.int64))
        rows, columns = fine_Fhw.shape[-2:]
        cells, inside = outline_cells(mask_HW, (rows, columns), _CELLS_IN_BOXES)
        patch_of_cell = (cells // columns * grid[0] // rows) * grid[1] + cells % columns * grid[1] // columns
        return cls(patches, Outline(_features_at(fine_Fhw, cells), inside), patch_of_cell)

    def outline(self, taken_P: Tensor) -> Outline | None:
        """Return cells in the patches that were taken for defects and beside the boxes; None if there are none inside.

        What else lies in a box is left out: it may be either.
        """
        if self.cells is None:
            return None
        features, inside = self.cells
        defective = (inside & taken_P[self.patch_of_cell]).nonzero().flatten()
        if len(defective) == 0:
            return None
        kept = torch.cat([defective[evenly_spaced(len(defective), _OUTLINE_DEFECT)], (~inside).nonzero().flatten()])
        return Outline(features[kept], inside[kept])


def outstanding_patches(distance_P: Tensor, boxes_NP: Tensor, usual: float) -> Tensor:
    """Tell which patches in the boxes around defects are taken for the defects, boolean, shape (P,).

    Those that are farther from the negative bank than the farthest patch of a normal image ``usual``-ly is, and the
    farthest of every box, which has one at least.
    """
    taken_P = boxes_NP.any(dim=0) & (distance_P > usual)
    taken_P[distance_P.masked_fill(~boxes_NP, -torch.inf).argmax(dim=1)] = True
    return taken_P


def farthest_patches(distance_P: Tensor, usual: float, most: float) -> Tensor:
    """Tell which patches of a defective image without a mask are taken for its defect, boolean, shape (P,).

    The outstanding ones, as in a box, among a share of ``most``: an image of another brightness does not fill the bank.
    """
    farthest_1P = torch.zeros(1, len(distance_P), dtype=torch.bool)
    farthest_1P[0, distance_P.topk(max(1, int(most * len(distance_P)))).indices] = True
    return outstanding_patches(distance_P, farthest_1P, usual)


def defect_crops(image_CHW: Tensor, mask_HW: Tensor) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """Cut the bounding box of every defect out of an image, as the thesis and the published code do.

    Returns:
        Crops with a margin of one pixel, resized to 128 x 128 bilinearly, shape (N, C, 128, 128), and their boxes
        (top, left, height, width).
    """
    height, width = mask_HW.shape
    boxes = []
    for rows, columns in ndimage.find_objects(_components(mask_HW)[1]):
        top, left = max(0, rows.start - 1), max(0, columns.start - 1)
        boxes.append((top, left, min(height, rows.stop + 1) - top, min(width, columns.stop + 1) - left))
    crops = [
        F.interpolate(image_CHW[None, :, y : y + h, x : x + w], CROP_SIZE, mode="bilinear", align_corners=False)
        for y, x, h, w in boxes
    ]
    return torch.cat(crops), boxes


def _components(mask_HW: Tensor) -> tuple[int, Any]:
    """Number the connected defects of a mask from 1; return one more than there are, and the number of each pixel."""
    count, label_HW = cv2.connectedComponents((mask_HW.cpu() != 0).numpy().astype(np.uint8), connectivity=8)
    return count, label_HW
