"""Exact greedy k-center selection (Gonzalez, 1985; Sener & Savarese, ICLR 2018), many centres at a time.

The textbook loop picks the point farthest from all centres, then updates the distance of every point: k passes over the
data. Here a round looks at the B points that are farthest now. Distances only shrink, so that no other point can exceed
the (B+1)-th value tau. As long as the farthest candidate is at least tau away it is the farthest of all points, and the
choices of a whole round follow from one B x B table. Then all of them are applied to the points at once. The selection
is the textbook's, ties aside. With points in several processes, each proposes its farthest ones, all follow the same
table, and each updates its own points.

Shape suffixes: N points, D dimensions, B candidates, P centres picked in one round.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.distributed import gather_tensors
from anomalib_exdd.utils.precision import full_float32, mean_of_rows

from .coverage import Coverage

SAVE_INTERVAL = 30.0  # seconds between two saved states
_PROGRESS_DELAY = 2.0  # seconds before a progress bar appears
_SHRINK = 0.9  # factor by which the radius beyond which points are active falls when none is left


@dataclass(frozen=True)
class Shard:
    """Which of all points this process holds."""

    index_N: Tensor  # of each of its points among all points, ascending, int64, shape (N,)
    total: int  # number of all points
    mean_D: Tensor  # of all points, float32, shape (D,)
    shared: bool = True  # whether other processes hold the other points

    def gather(self, value: Tensor) -> Tensor:
        """Concatenate the values of all processes that hold points."""
        return gather_tensors(value) if self.shared else value

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
        shard: Which of all points these are, if every process holds some; None for all of them. All processes have to
            call, and all get the same selection.
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
            shard = Shard(index_N, total, mean_of_rows(points_ND), shared=False)
        # Small norms make the rounding errors of expanded distances small.
        points_ND = points_ND.float()
        centred_ND = points_ND.sub_(shard.mean_D) if overwrite else points_ND - shard.mean_D
        coverage = Coverage(centred_ND)
        if state is not None and state.is_file():
            chosen = coverage.load(state)[:count]  # it may be of a selection of more: the first centres are the same
        else:
            chosen = torch.tensor([np.random.default_rng(seed).integers(total)], device=points_ND.device)
            own = shard.rows(chosen)
            coverage.add(shard.gather(centred_ND[own]), own)
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


def _next_centres(coverage: Coverage, shard: Shard, candidates: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Choose greedily among the farthest points while that is the choice among all; return indices and points."""
    while True:
        value_B, row_B = coverage.farthest(candidates + 1)
        value_B, index_B, candidate_BD = map(shard.gather, (value_B, shard.index_N[row_B], coverage.points_ND[row_B]))
        if len(value_B):
            break
        threshold = float(shard.gather(coverage.largest()).max()) * _SHRINK**2
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
