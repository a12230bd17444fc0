"""Distances of points to their nearest centre, updated lazily.

Shape suffixes: N points, A active points, D dimensions, K centres.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.files import write_atomically

_BLOCK_ELEMENTS = 1 << 20  # distances held at once: 4 MiB, so that a block stays in the cache
_ROWS = 1 << 16  # points copied at once


class Coverage:
    """Squared distances of points to their nearest centre.

    Greedy selection asks for the farthest points only, and distances can only fall. So points nearer than a threshold
    are inactive: they are not updated until the selection's radius has come down to it, and then all the centres that
    they have missed follow in one matrix product. Points that are covered well never meet most of the centres.

    Args:
        points_ND: Points, float32, centred on their mean so that expanded distances round little, shape (N, D).
    """

    def __init__(self, points_ND: Tensor) -> None:
        self.points_ND = points_ND
        self.num_centres = 0
        self.threshold = torch.inf  # squared; all points are infinitely far from no centre
        self._centres: list[Tensor] = []
        self._norm_N = torch.cat([block.square().sum(dim=1) for block in points_ND.split(_ROWS)])
        self._nearest_N = torch.full_like(self._norm_N, torch.inf)  # -1 for a centre
        self._seen_N = torch.zeros_like(self._norm_N, dtype=torch.int32)  # number of centres that a point has met
        self._activate()

    def add(self, centre_KD: Tensor, own_K: Tensor) -> None:
        """Add centres; ``own_K`` are the rows of those among them that are (active) points of this set."""
        self._centres.append(centre_KD)
        self.num_centres += len(centre_KD)
        _lower(self._nearest_A, self._active_AD, self._norm_A, centre_KD)
        # A centre is never chosen again, whatever rounding left of its distance to itself.
        self._nearest_A[torch.searchsorted(self._row_A, own_K)] = -1

    def farthest(self, count: int) -> tuple[Tensor, Tensor]:
        """Return squared distances and rows of the ``count`` farthest active points; without active points, of none.

        No other point is farther than the last of them, or than the threshold if there are fewer.
        """
        found = self._nearest_A.topk(min(count, len(self._nearest_A)))
        beyond = found.values >= self.threshold
        return found.values[beyond], self._row_A[found.indices[beyond]]

    def largest(self) -> Tensor:
        """Return the largest squared distance, as far as distances are up to date, shape (1,); 0 without points."""
        self._write_back()
        return torch.cat([self._nearest_N, self._nearest_N.new_zeros(1)]).amax(dim=0, keepdim=True)

    def lower_threshold(self, threshold: float) -> None:
        """Update the points that may be beyond a lower threshold, and make those that are active."""
        self._write_back()
        self.threshold = threshold
        centres_KD = torch.cat(self._centres)
        row_N = ((self._nearest_N >= threshold) & (self._seen_N < self.num_centres)).nonzero().flatten()
        seen_N = self._seen_N[row_N]
        for seen in seen_N.unique().tolist():
            for rows in row_N[seen_N == seen].split(_ROWS):
                nearest = self._nearest_N[rows]
                _lower(nearest, self.points_ND[rows], self._norm_N[rows], centres_KD[seen:])
                self._nearest_N[rows] = nearest
                self._seen_N[rows] = self.num_centres
        self._activate()

    def save(self, path: Path, chosen_K: Tensor) -> None:
        """Write the state and the indices of the centres, beside first, so that the file is always complete."""
        self._write_back()
        threshold = torch.tensor(self.threshold, dtype=torch.float64)
        state = {"nearest": self._nearest_N, "seen": self._seen_N, "threshold": threshold, "chosen": chosen_K}
        with write_atomically(path) as partial:
            save_file(state | {"centres": torch.cat(self._centres)}, partial)

    def load(self, path: Path) -> Tensor:
        """Continue from a saved state of the same points, and return the indices of its centres."""
        state = load_file(path, device=str(self.points_ND.device))
        self._nearest_N, self._seen_N, self.threshold = state["nearest"], state["seen"], float(state["threshold"])
        self._centres, self.num_centres = [state["centres"]], len(state["centres"])
        self._activate()
        return state["chosen"]

    def _write_back(self) -> None:
        self._nearest_N[self._row_A] = self._nearest_A
        self._seen_N[self._row_A] = self.num_centres

    def _activate(self) -> None:
        """Take a contiguous copy of the active points."""
        self._active_AD = self.points_ND  # lets the copy before go first
        self._row_A = (self._nearest_N >= self.threshold).nonzero().flatten()
        self._nearest_A, self._norm_A = self._nearest_N[self._row_A], self._norm_N[self._row_A]
        if len(self._row_A) < len(self.points_ND):
            self._active_AD = self.points_ND[self._row_A]


def _lower(nearest_N: Tensor, points_ND: Tensor, norm_N: Tensor, centre_KD: Tensor) -> None:
    """Lower points' squared distances to their nearest centre, in place; -1 stays."""
    norm_K = centre_KD.square().sum(dim=1)
    rows = max(256, _BLOCK_ELEMENTS // max(1, len(centre_KD)))
    for start in range(0, len(points_ND), rows):
        block = slice(start, start + rows)
        squared = expanded_distances(points_ND[block], centre_KD, norm_K).amin(dim=1)
        torch.minimum(nearest_N[block], squared.add_(norm_N[block]).clamp_(min=0), out=nearest_N[block])
