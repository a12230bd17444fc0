"""Exact greedy k-center selection (Gonzalez, 1985; Sener & Savarese, ICLR 2018), many centres at a time.

The textbook loop picks the point farthest from all chosen centres, then updates the distance of *every* point, for each
centre: k passes over the data. Here a round looks at the B points that are farthest now. Distances only shrink, so
whoever is not among them can never exceed the (B+1)-th value tau. As long as the farthest candidate is at least tau
away it is therefore the farthest of all points, and the greedy choices of a whole stretch follow from one B x B table.
Then all of them are applied to all points in one matrix product. The selection is the textbook's, ties aside.

Shape suffixes: N points, D dimensions, B candidates, P centres picked in one round.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from anomalib_exdd.precision import full_float32

_BLOCK_ELEMENTS = 1 << 23  # distances held at once while centres are applied: 32 MiB
_PROGRESS_DELAY = 2.0  # seconds before a progress bar appears


def greedy_k_center(
    points_ND: Tensor,
    count: int,
    *,
    seed: int = 0,
    candidates: int = 1024,
    description: str | None = None,
) -> Tensor:
    """Select ``count`` points such that the farthest point is as near as greedy choice can make it.

    Args:
        points_ND: Points, floating point, shape (N, D), on any device.
        count: Number of centres k; k >= N selects every point.
        seed: Seed of the first centre, the only random choice.
        candidates: Points looked at in one round, B. It changes the speed, not the selection.
        description: Label of a progress bar, shown when the selection takes more than two seconds; None for no bar.

    Returns:
        Indices of the centres in the order of their choice, int64, shape (min(k, N),), on the points' device.

    Raises:
        ValueError: If there are no points, or ``count`` or ``candidates`` is not positive.
    """
    total = len(points_ND)
    if points_ND.ndim != 2 or total == 0:
        msg = f"Points have to be of shape (N, D) with N >= 1, but got {tuple(points_ND.shape)}."
        raise ValueError(msg)
    if count < 1 or candidates < 1:
        msg = f"Arguments `count` and `candidates` have to be positive, but got {count} and {candidates}."
        raise ValueError(msg)
    if count >= total:
        return torch.arange(total, device=points_ND.device)

    first = int(np.random.default_rng(seed).integers(total))
    with (
        full_float32(points_ND.device),
        tqdm(total=count, desc=description, disable=description is None, delay=_PROGRESS_DELAY) as bar,
    ):
        points_ND = points_ND.float()
        points_ND = points_ND - points_ND.mean(dim=0)  # small norms: small rounding errors of expanded distances
        squared_norm_N = points_ND.square().sum(dim=1)
        nearest_N = torch.full_like(squared_norm_N, torch.inf)
        centres = [torch.tensor([first], device=points_ND.device)]
        _apply_centres(points_ND, squared_norm_N, nearest_N, centres[0])
        bar.update()
        chosen = 1
        while chosen < count:
            picked_P = _pick(points_ND, squared_norm_N, nearest_N, min(candidates, total - 1), count - chosen)
            _apply_centres(points_ND, squared_norm_N, nearest_N, picked_P)
            centres.append(picked_P)
            chosen += len(picked_P)
            bar.update(len(picked_P))
    return torch.cat(centres)


def _apply_centres(points_ND: Tensor, squared_norm_N: Tensor, nearest_N: Tensor, centre_P: Tensor) -> None:
    """Lower every point's squared distance to its nearest centre, in place."""
    centres_PD, centre_norm_P = points_ND[centre_P], squared_norm_N[centre_P]
    rows = max(1, _BLOCK_ELEMENTS // len(centre_P))
    for start in range(0, len(points_ND), rows):
        block = slice(start, start + rows)
        expanded = torch.addmm(centre_norm_P, points_ND[block], centres_PD.T, alpha=-2)
        squared = expanded.amin(dim=1).add_(squared_norm_N[block]).clamp_(min=0)
        torch.minimum(nearest_N[block], squared, out=nearest_N[block])
    nearest_N[centre_P] = -1  # a centre is never chosen again, whatever rounding left of its distance to itself


def _pick(points_ND: Tensor, squared_norm_N: Tensor, nearest_N: Tensor, candidates: int, wanted: int) -> Tensor:
    """Follow the greedy choice among the farthest points for as long as it provably is the choice among all."""
    farthest = nearest_N.topk(candidates + 1)
    tau = float(farthest.values[-1])
    candidate_B = farthest.indices[:-1].sort().values  # by index, so that equal distances have a defined winner
    candidate_BD, norm_B = points_ND[candidate_B], squared_norm_N[candidate_B]
    table_BB = torch.addmm(norm_B, candidate_BD, candidate_BD.T, alpha=-2).add_(norm_B.unsqueeze(1)).clamp_(min=0)
    value_B = nearest_N[candidate_B].cpu().numpy()
    table = table_BB.cpu().numpy()
    picked: list[int] = []
    while len(picked) < wanted:
        best = int(value_B.argmax())
        if picked and value_B[best] < tau:
            break
        picked.append(best)
        np.minimum(value_B, table[best], out=value_B)
        value_B[best] = -1
        if len(picked) == len(value_B):
            break
    return candidate_B[torch.tensor(picked, device=candidate_B.device)]
