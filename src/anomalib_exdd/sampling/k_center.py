"""Exact greedy k-center selection (Gonzalez, 1985; Sener & Savarese, ICLR 2018), many centres at a time.

The textbook loop picks the point farthest from all chosen centres, then updates the distance of *every* point, for each
centre: k passes over the data. Here a round looks at the B points that are farthest now. Distances only shrink, so
whoever is not among them can never exceed the (B+1)-th value tau. As long as the farthest candidate is at least tau
away it is therefore the farthest of all points, and the greedy choices of a whole stretch follow from one B x B table.
Then all of them are applied to the points at once, and to those that are well covered already only later or never (see
:mod:`.coverage`). The selection is the textbook's, ties aside.

Points may lie in several processes: each proposes its farthest ones, all of them follow the same table, and each
updates its own points.

Shape suffixes: N points, D dimensions, B candidates, P centres picked in one round.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from anomalib_exdd.precision import full_float32
from anomalib_exdd.processes import gather_tensors
from anomalib_exdd.utils.files import write_atomically

from .coverage import SHRINK, Coverage

_PROGRESS_DELAY = 2.0  # seconds before a progress bar appears
_SAVE_EVERY = 30.0  # seconds between two saved states
_NOTHING = 1e-30  # squared distances that are as good as none


@dataclass(frozen=True)
class Shard:
    """Which of all points this process holds.

    Attributes:
        index_N: Index of each of its points among all points, ascending, int64, shape (N,).
        total: Number of all points.
        mean_D: Mean of all points, float32, shape (D,).
    """

    index_N: Tensor
    total: int
    mean_D: Tensor


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
        description: Label of a progress bar, shown when the selection takes more than two seconds; None for no bar.
        overwrite: Whether the points' memory may be changed, instead of a copy of them.
        shard: What part of all points these are, where every process of a group holds some; None for all of them. All
            processes have to call, and all get the same selection.
        state: File to keep the state of the selection in from time to time, and to go on from if it is there. It has to
            be of the same points, and there is one process only; it is removed at the end.

    Returns:
        Indices of the centres in the order of their choice, int64, shape (min(k, N),), on the points' device.

    Raises:
        ValueError: If there are no points, or ``count`` or ``candidates`` is not positive.
    """
    total = len(points_ND) if shard is None else shard.total
    if points_ND.ndim != 2 or total == 0:
        msg = f"Points have to be of shape (N, D) with N >= 1, but got {tuple(points_ND.shape)}."
        raise ValueError(msg)
    if count < 1 or candidates < 1:
        msg = f"Arguments `count` and `candidates` have to be positive, but got {count} and {candidates}."
        raise ValueError(msg)
    if count >= total:
        return torch.arange(total, device=points_ND.device)
    with (
        full_float32(points_ND.device),
        tqdm(total=count, desc=description, disable=description is None, delay=_PROGRESS_DELAY) as bar,
    ):
        alone = shard is None
        if shard is None:
            shard = Shard(torch.arange(total, device=points_ND.device), total, mean_of([points_ND]))
        # Small norms make the rounding errors of expanded distances small.
        points_ND = points_ND.float()
        centred_ND = points_ND.sub_(shard.mean_D) if overwrite else points_ND - shard.mean_D
        selection = _Selection(Coverage(centred_ND, count), shard, alone)
        if state is not None and state.is_file():
            selection.load(state, count)
        else:
            selection.start(int(np.random.default_rng(seed).integers(total)))
        bar.update(len(selection))
        saved = time.monotonic()
        while len(selection) < count:
            before = len(selection)
            selection.advance(candidates, count)
            bar.update(len(selection) - before)
            if state is not None and time.monotonic() - saved > _SAVE_EVERY:
                selection.save(state)
                saved = time.monotonic()
    if state is not None:
        state.unlink(missing_ok=True)
    return selection.chosen


def mean_of(parts: list[Tensor]) -> Tensor:
    """Return the mean of points that come in parts, summed in float64, as float32, shape (D,)."""
    sums = [block.double().sum(dim=0) for part in parts for block in part.split(1 << 16)]
    return (torch.stack(sums).sum(dim=0) / sum(len(part) for part in parts)).float()


class _Selection:
    """The centres chosen so far."""

    def __init__(self, coverage: Coverage, shard: Shard, alone: bool) -> None:
        self.coverage = coverage
        self.shard = shard
        self.alone = alone
        self.chosen = torch.empty(0, dtype=torch.int64, device=coverage.points_ND.device)

    def __len__(self) -> int:
        return len(self.chosen)

    def start(self, first: int) -> None:
        """Make the first point a centre."""
        own = torch.searchsorted(self.shard.index_N, torch.tensor([first], device=self.chosen.device))
        own = own[own < len(self.shard.index_N)]
        own = own[self.shard.index_N[own] == first]
        (centre_PD,) = self._gather(self.coverage.points_ND[own])
        self._pick(torch.tensor([first], device=self.chosen.device), centre_PD)

    def advance(self, candidates: int, count: int) -> None:
        """Follow the greedy choice among the farthest points for as long as it provably is the choice among all."""
        value_B, row_B = self.coverage.farthest(candidates + 1)
        index_B, candidate_BD = self.shard.index_N[row_B], self.coverage.points_ND[row_B]
        value_B, index_B, candidate_BD = self._gather(value_B, index_B, candidate_BD)
        if len(value_B) == 0:
            self._descend()
            return
        farthest = value_B.argsort(descending=True, stable=True)[: candidates + 1]
        tau = self.coverage.threshold
        if len(farthest) > candidates:
            tau = float(value_B[farthest[-1]])
            farthest = farthest[:-1]
        farthest = farthest[index_B[farthest].argsort()]  # by index, so that equal distances have a defined winner
        candidate_BD = candidate_BD[farthest]
        picked_P = _greedy_order(candidate_BD, value_B[farthest], tau, count - len(self))
        self._pick(index_B[farthest][picked_P], candidate_BD[picked_P])

    def _pick(self, index_P: Tensor, centre_PD: Tensor) -> None:
        own_P = index_P if self.alone else index_P[torch.isin(index_P, self.shard.index_N)]
        self.coverage.add(centre_PD, torch.searchsorted(self.shard.index_N, own_P))
        self.chosen = torch.cat([self.chosen, index_P])

    def _descend(self) -> None:
        """Lower the threshold to a little below the farthest point's distance, or what is known of it."""
        self.coverage.settle()
        nearest_N = self.coverage.nearest_N  # may be empty where other processes have points
        (largest,) = self._gather(nearest_N.amax(dim=0, keepdim=True) if len(nearest_N) else nearest_N.new_zeros(1))
        threshold = float(largest.max()) * SHRINK**2
        self.coverage.lower_threshold(threshold if threshold > _NOTHING else 0.0)

    def _gather(self, *values: Tensor) -> tuple[Tensor, ...]:
        return values if self.alone else tuple(gather_tensors(value) for value in values)

    def save(self, path: Path) -> None:
        """Keep the state, beside first, so that there is always a whole one."""
        self.coverage.settle()
        state = {"nearest": self.coverage.nearest_N, "seen": self.coverage.seen_N, "chosen": self.chosen}
        state["centres"] = self.coverage.centres_KD[: len(self)]
        state["threshold"] = torch.tensor(self.coverage.threshold, dtype=torch.float64)
        with write_atomically(path) as partial:
            save_file({name: value.cpu().contiguous() for name, value in state.items()}, partial)

    def load(self, path: Path, count: int) -> None:
        """Go on from a saved state, which may be that of a selection of more: the first centres are the same."""
        device = self.chosen.device
        state = {name: value.to(device) for name, value in load_file(path).items()}
        self.chosen = state["chosen"][:count]
        if len(self.chosen) == count:
            return
        self.coverage.restore(state["nearest"], state["seen"], state["centres"], float(state["threshold"]))


def _greedy_order(candidate_BD: Tensor, value_B: Tensor, tau: float, wanted: int) -> Tensor:
    """Choose among the candidates for as long as none of the other points can be farther than ``tau``.

    The first choice is always right; a later one that is exactly as far as tau may have a rival among the others.
    """
    norm_B = candidate_BD.square().sum(dim=1)
    table_BB = torch.addmm(norm_B, candidate_BD, candidate_BD.T, alpha=-2).add_(norm_B.unsqueeze(1)).clamp_(min=0)
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
