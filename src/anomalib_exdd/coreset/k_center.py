"""Exact greedy k-center selection (Gonzalez, 1985; Sener & Savarese, ICLR 2018), many centres at a time.

The textbook loop picks the point farthest from all centres, then updates the distance of every point: k passes over the
data. Here a round looks at the B points that are farthest now. Distances only shrink, so that no other point can exceed
the (B+1)-th value tau. As long as the farthest candidate is at least tau away it is the farthest of all points, and the
choices of a whole round follow from one B x B table. Then all of them are applied to the points at once. The selection
is the textbook's, ties aside. With points in several processes, each proposes its farthest ones, all follow the same
table, and each updates its own points.

Shape suffixes: N points, A active points, D dimensions, B candidates, K centres, P centres picked in one round.
"""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.distributed import gather_tensors
from anomalib_exdd.utils.files import write_atomically
from anomalib_exdd.utils.precision import full_float32, mean_of_rows

SAVE_INTERVAL = 30.0  # seconds between two saved states
_PROGRESS_DELAY = 2.0  # seconds before a progress bar appears
_SHRINK = 0.9  # factor by which the radius beyond which points are active falls when none is left
_BLOCK_ELEMENTS = 1 << 20  # distances held at once: 4 MiB, so that a block stays in the cache
_ROWS = 1 << 16  # points copied at once


class Shard(NamedTuple):
    """Which of all points this process holds."""

    index_N: Tensor  # of each of its points among all points, ascending, int64, shape (N,)
    total: int  # number of all points
    mean_D: Tensor  # of all points, float32, shape (D,)

    def rows(self, index_P: Tensor) -> Tensor:
        """Return the rows of those of the given points that this process holds."""
        row_P = torch.searchsorted(self.index_N, index_P)
        inside_P = row_P < len(self.index_N)
        row_P, index_P = row_P[inside_P], index_P[inside_P]
        return row_P[self.index_N[row_P] == index_P]


def greedy_k_center(
    points_ND: Tensor,
    count: int,
    *,
    seed: int = 0,
    candidates: int = 1024,
    description: str | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
    state: Path | None = None,
) -> Tensor:
    """Select ``count`` points such that the farthest point is as near as greedy choice can make it.

    Args:
        points_ND: Points, floating point, shape (N, D), on any device.
        count: Number of centres k; k >= N selects every point.
        seed: Seed of the first centre, the only random choice.
        candidates: Points looked at in one round, B. It changes the speed, not the selection.
        description: Label of a progress bar, shown after two seconds; None for no bar.
        overwrite: Whether the points' memory may be changed, instead of a copy of them.
        shard: Which of all points these are, if several processes hold some each; None for all of them, in a single
            process. All processes have to call, and all get the same selection.
        state: File to save the selection of one process in from time to time, and to resume from if it is there, with
            the same points; it is removed at the end.

    Returns:
        Indices of the centres in the order of their choice, int64, shape (min(k, N),), on the points' device.
    """
    total = len(points_ND) if shard is None else shard.total
    if count >= total:
        return torch.arange(total, device=points_ND.device)
    with (
        full_float32(points_ND.device),
        tqdm(total=count, desc=description, disable=description is None, delay=_PROGRESS_DELAY) as bar,
    ):
        if shard is None:
            index_N = torch.arange(total, device=points_ND.device)
            shard = Shard(index_N, total, mean_of_rows(points_ND))
        # Small norms make the rounding errors of expanded distances small.
        points_ND = points_ND.float()
        centred_ND = points_ND.sub_(shard.mean_D) if overwrite else points_ND - shard.mean_D
        coverage = Coverage(centred_ND)
        if state is not None and state.is_file():
            chosen = coverage.load(state)[:count]  # it may be of a selection of more: the first centres are the same
        else:
            chosen = torch.tensor([np.random.default_rng(seed).integers(total)], device=points_ND.device)
            own = shard.rows(chosen)
            coverage.add(gather_tensors(centred_ND[own]), own)
        saved = time.monotonic()
        while len(chosen) < count:
            index_P, centre_PD = _next_centres(coverage, shard, candidates, count - len(chosen))
            coverage.add(centre_PD, shard.rows(index_P))
            chosen = torch.cat([chosen, index_P])
            bar.update(len(chosen) - bar.n)
            if state is not None and time.monotonic() - saved > SAVE_INTERVAL:
                coverage.save(state, chosen)
                saved = time.monotonic()
    if state is not None:
        state.unlink(missing_ok=True)
    return chosen


def _next_centres(coverage: "Coverage", shard: Shard, candidates: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Choose greedily among the farthest points while that is the choice among all; return indices and points."""
    while True:
        value_B, row_B = coverage.farthest(candidates + 1)
        value_B, index_B, candidate_BD = map(gather_tensors, (value_B, shard.index_N[row_B], coverage.points_ND[row_B]))
        if len(value_B):
            break
        threshold = float(gather_tensors(coverage.largest()).max()) * _SHRINK**2
        coverage.lower_threshold(threshold if threshold > 1e-30 else 0.0)  # distances that are as good as none
    farthest = value_B.argsort(descending=True, stable=True)[: candidates + 1]
    tau = coverage.threshold
    if len(farthest) > candidates:
        tau = float(value_B[farthest[-1]])
        farthest = farthest[:-1]
    farthest = farthest[index_B[farthest].argsort()]  # by index, so that equal distances have a defined winner
    picked_P = farthest[_greedy_order(candidate_BD[farthest], value_B[farthest], tau, wanted)]
    return index_B[picked_P], candidate_BD[picked_P]


def _greedy_order(candidate_BD: Tensor, value_B: Tensor, tau: float, wanted: int) -> Tensor:
    """Choose among the candidates for as long as none of the other points can be farther than ``tau``.

    The first choice is always right; a later one that is exactly as far as tau may have a rival among the others.
    """
    norm_B = candidate_BD.square().sum(dim=1)
    table_BB = expanded_distances(candidate_BD, candidate_BD, norm_B).add_(norm_B.unsqueeze(1)).clamp_(min=0)
    value, table = value_B.cpu().numpy(), table_BB.cpu().numpy()
    picked: list[int] = []
    while len(picked) < min(wanted, len(value)):
        best = int(value.argmax())
        if picked and value[best] <= tau:
            break
        picked.append(best)
        np.minimum(value, table[best], out=value)
        value[best] = -1
    return torch.tensor(picked, device=candidate_BD.device)


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


def gaussian_projection(dimension: int, projected: int, seed: int) -> Tensor:
    """Draw the matrix that projects features before the coreset is selected (paper, section 3.2.3).

    The columns are Gaussian directions (Johnson & Lindenstrauss, 1984) of unit length, so that a projected coordinate
    has the scale of the original ones. NumPy draws them, whose streams are the same on every machine.

    Returns:
        Matrix of shape (dimension, projected), float32; the identity if ``dimension`` is not larger, where projecting
        would only lose.
    """
    if dimension <= projected:
        return torch.eye(dimension, dtype=torch.float32)  # trainers in true precision change the default
    matrix = np.random.default_rng(seed).standard_normal((dimension, projected))
    matrix /= np.linalg.norm(matrix, axis=0, keepdims=True)
    return torch.from_numpy(matrix.astype(np.float32))
