"""Defects of which a box around them is known instead of an outline: what in the box is taken for the defect.

Shape suffixes: N boxes, P patches, O cells of the fine grid, H x W pixels, h x w patches or cells.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from .calibration_set import Outline
from .patches import OUTLINE_DEFECT, defect_patches, evenly_spaced, outline_cells

_CELLS_IN_BOXES = 2048  # that wait for the choice of patches, at most


class BoxedImage(NamedTuple):
    """What waits for the negative bank, by which patches are chosen, of a training image with boxes."""

    patches: Tensor  # which patches belong to each box, boolean, shape (N, P)
    cells: Outline | None  # cells in and beside the boxes, if the backbone has fine features
    patch_of_cell: Tensor  # int64, shape (O,)

    @classmethod
    def of(cls, mask_HW: Tensor, grid: tuple[int, int], min_coverage: float, fine_Fhw: Tensor | None) -> "BoxedImage":
        """Take an image's boxes by its mask, non-zero in boxes, and fine features, if there are any.

        ``min_coverage`` is the share of a patch that has to lie in a box.
        """
        patches = box_patches(mask_HW, grid, min_coverage)
        if fine_Fhw is None:
            return cls(patches, None, torch.empty(0, dtype=torch.int64))
        rows, columns = fine_Fhw.shape[-2:]
        cells, inside = outline_cells(mask_HW, (rows, columns), _CELLS_IN_BOXES)
        features = fine_Fhw.flatten(1).T[cells.to(fine_Fhw.device)].half().cpu()
        patch_of_cell = (cells // columns * grid[0] // rows) * grid[1] + cells % columns * grid[1] // columns
        return cls(patches, Outline(features, inside), patch_of_cell)

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
        kept = torch.cat([defective[evenly_spaced(len(defective), OUTLINE_DEFECT)], (~inside).nonzero().flatten()])
        return Outline(features[kept], inside[kept])


def box_patches(mask_HW: Tensor, grid: tuple[int, int], min_coverage: float) -> Tensor:
    """Tell which of h x w patches belong to each box of a mask, by :func:`defect_patches`, boolean, shape (N, h * w).

    Boxes that overlap or touch count as one.
    """
    count, label_HW = cv2.connectedComponents((mask_HW.cpu() != 0).numpy().astype(np.uint8), connectivity=8)
    boxes = [defect_patches(torch.from_numpy(label_HW == box), grid, min_coverage).flatten() for box in range(1, count)]
    return torch.stack(boxes) if boxes else torch.zeros(0, grid[0] * grid[1], dtype=torch.bool)


def outstanding_patches(distance_P: Tensor, boxes_NP: Tensor, usual: float) -> Tensor:
    """Tell which patches in the boxes around defects are taken for the defects, boolean, shape (P,).

    Those that are farther from the negative bank than the farthest patch of a normal image usually is, and the farthest
    of every box, which has one at least.
    """
    taken_P = boxes_NP.any(dim=0) & (distance_P > usual)
    taken_P[distance_P.masked_fill(~boxes_NP, -torch.inf).argmax(dim=1)] = True
    return taken_P
