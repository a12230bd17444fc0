"""How well chosen centres cover a set of points: every point's distance to its nearest centre, kept up to date lazily.

Greedy selection asks for the farthest points only, and a point's distance can only fall. So a point that is nearer than
a threshold is parked: it is not looked at until the selection's radius has come down to it, and then it is shown all
the centres that it has missed in one matrix product. Points that end up well covered never see most of the centres.

Shape suffixes: N points, A points that are not parked, D dimensions, K centres.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 20  # distances held at once: 4 MiB, so that a block stays in the cache
_ROWS = 1 << 16  # points copied at once
SHRINK = 0.9
"""Factor by which the threshold falls when no point is beyond it any more."""


class Coverage:
    """Squared distances of points to their nearest centre.

    Args:
        points_ND: Points, float32, centred on their mean so that expanded distances round little, shape (N, D).
        count: Number of centres that there will be at most.

    Attributes:
        points_ND: The points.
        norm_N: Their squared norms.
        nearest_N: Squared distance of every point to its nearest centre; of a parked point to the nearest of those it
            was shown, which is below :attr:`threshold`; -1 for a centre. Up to date after :meth:`settle`.
        seen_N: Number of centres that every point was shown.
        centres_KD: The centres so far are its first :attr:`num_centres` rows.
        threshold: Squared distance below which points are parked.
    """

    def __init__(self, points_ND: Tensor, count: int) -> None:
        self.points_ND = points_ND
        self.norm_N = torch.cat([block.square().sum(dim=1) for block in points_ND.split(_ROWS)])
        self.nearest_N = torch.full_like(self.norm_N, torch.inf)
        self.seen_N = torch.zeros(len(points_ND), dtype=torch.int32, device=points_ND.device)
        self.centres_KD = points_ND.new_empty(count, points_ND.shape[1])
        self.num_centres = 0
        self.threshold = torch.inf  # all points are infinitely far from no centre
        self._activate()

    def add(self, centre_KD: Tensor, own_K: Tensor) -> None:
        """Add centres.

        Args:
            centre_KD: The new centres, shape (K, D).
            own_K: Rows of those among them that are points of this set, shape (at most K,).
        """
        self.centres_KD[self.num_centres : self.num_centres + len(centre_KD)] = centre_KD
        self.num_centres += len(centre_KD)
        _lower(self._nearest_A, self._active_AD, self._norm_A, centre_KD)
        if len(own_K):
            # A centre is never chosen again, whatever rounding left of its distance to itself.
            self._nearest_A[torch.searchsorted(self._rows_A, own_K.sort().values)] = -1

    def farthest(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the squared distances and the rows of the farthest points that are not parked, at most ``count``.

        No other point is farther than the last of them, or than the threshold if there are fewer than ``count``.
        """
        found = self._nearest_A.topk(min(count, len(self._nearest_A)))
        beyond = found.values >= self.threshold
        return found.values[beyond], self._rows_A[found.indices[beyond]]

    def lower_threshold(self, threshold: float) -> None:
        """Let points be parked below a lower threshold; those that may be beyond it are shown what they missed."""
        self.settle()
        self.threshold = threshold
        behind_N = (self.nearest_N >= threshold) & (self.seen_N < self.num_centres)
        rows_N = behind_N.nonzero().flatten()
        missed_N = self.seen_N[rows_N]
        for seen in missed_N.unique().tolist():
            for rows in rows_N[missed_N == seen].split(_ROWS):
                nearest = self.nearest_N[rows]
                _lower(nearest, self.points_ND[rows], self.norm_N[rows], self.centres_KD[seen : self.num_centres])
                self.nearest_N[rows] = nearest
                self.seen_N[rows] = self.num_centres
        self._activate()

    def settle(self) -> None:
        """Write the distances of the points that are not parked back to :attr:`nearest_N` and :attr:`seen_N`."""
        self.nearest_N[self._rows_A] = self._nearest_A
        self.seen_N[self._rows_A] = self.num_centres

    def restore(self, nearest_N: Tensor, seen_N: Tensor, centres_KD: Tensor, threshold: float) -> None:
        """Go on from what :meth:`settle` left in another object of the same points."""
        self.nearest_N, self.seen_N, self.threshold = nearest_N.clone(), seen_N.clone(), threshold
        self.num_centres = len(centres_KD)
        self.centres_KD[: self.num_centres] = centres_KD
        self._activate()

    def _activate(self) -> None:
        """Take a contiguous copy of the points that are not parked."""
        self._active_AD = self.points_ND  # lets the copy before go first
        self._rows_A = (self.nearest_N >= self.threshold).nonzero().flatten()
        if len(self._rows_A) == len(self.points_ND):
            self._active_AD, self._norm_A = self.points_ND, self.norm_N
        else:
            self._active_AD, self._norm_A = self.points_ND[self._rows_A], self.norm_N[self._rows_A]
        self._nearest_A = self.nearest_N[self._rows_A]


def _lower(nearest_N: Tensor, points_ND: Tensor, norm_N: Tensor, centre_KD: Tensor) -> None:
    """Lower points' squared distances to their nearest centre, in place; -1 stays."""
    norm_K = centre_KD.square().sum(dim=1)
    rows = max(256, _BLOCK_ELEMENTS // max(1, len(centre_KD)))
    for start in range(0, len(points_ND), rows):
        block = slice(start, start + rows)
        expanded = torch.addmm(norm_K, points_ND[block], centre_KD.T, alpha=-2)
        squared = expanded.amin(dim=1).add_(norm_N[block]).clamp_(min=0)
        torch.minimum(nearest_N[block], squared, out=nearest_N[block])
