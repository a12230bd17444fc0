"""Exact search in plain torch, on any device: products in low precision propose, and a bound tells what they prove.

Where a processor multiplies bfloat16 faster than float32, by a factor of two to five on many, vectors are rounded to it
for the products. Distances of rounded vectors tell much about the true ones: by the triangle inequality

    |q - m| >= |q' - m'| - |q - q'| - |m - m'|,

and what rounding has taken from every vector is known. On patch features of a trained ResNet eight candidates prove the
three nearest entries of all but one query in a thousand; the others get more candidates.

Shape suffixes: Q queries, M bank entries, D feature dimension, C candidates, F numbers of an augmented vector.
"""

import timeit
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.utils.precision import full_float32

from .exact import NeighborIndex, Neighbors, Proposal

_GROUP = 8  # columns whose smallest value stands for all of them
_PADDED_TO = 512  # a multiple of which the columns are, so that groups of groups are whole and lie well in memory
_CPU_BLOCK = 1 << 24  # scores held at once on a CPU, at most 64 MiB ...
_CPU_ROWS = 1024  # ... but at least so many rows, below which a product spends its time on packing the points ...
_CPU_LIMIT = 1 << 26  # ... and never more than 256 MiB
_ACCELERATOR_BLOCK = 1 << 27  # 512 MiB: few and large launches
_WORTHWHILE = 1.5  # how many times as fast bfloat16 has to be


class TorchIndex(NeighborIndex):
    """Search by the score ``|m|^2 / 2 - q.m``, which orders entries as their distance does.

    It is one product, of ``(q, 1)`` and the augmented entry ``(-m, |m|^2 / 2)``: nothing has to be added to the large
    result. In bfloat16 the squared norm is a sum of three numbers, which hold as many digits as float32.
    """

    def build(self, centred_MD: Tensor) -> None:
        """See :meth:`NeighborIndex.build`."""
        on_cpu = centred_MD.device.type == "cpu"
        dtype = torch.bfloat16 if on_cpu and bfloat16_is_fast() else torch.float32
        rounded_MD = centred_MD.to(dtype)
        self._rounding = float(torch.linalg.vector_norm(centred_MD - rounded_MD, dim=1).max())
        norm_M = rounded_MD.to(torch.float64 if on_cpu or centred_MD.is_cuda else torch.float32).square().sum(dim=1) / 2
        norms = []
        for _ in range(3 if dtype == torch.bfloat16 else 1):
            norms.append(norm_M.to(dtype))
            norm_M = norm_M - norms[-1]
        self._norms = len(norms)
        augmented_MF = torch.cat([-rounded_MD, torch.stack(norms, dim=1)], dim=1)
        # More entries, infinitely far.
        self._augmented_MF = F.pad(augmented_MF, (0, 0, 0, -len(centred_MD) % _PADDED_TO))
        self._augmented_MF[len(centred_MD) :, -1] = torch.inf
        if dtype == torch.bfloat16:
            self.extra_candidates = (8, 60)
            self.description += ", proposed in bfloat16"

    def candidates(self, centred_QD: Tensor, count: int, excluded_QM: Tensor | None) -> Proposal:
        """See :meth:`NeighborIndex.candidates`."""
        rounded_QD = centred_QD.to(self._augmented_MF.dtype)
        bank_size, found = len(self.bank_MD), []
        for queries, score_QM in self._score_blocks(rounded_QD):
            if excluded_QM is not None:
                # Less than the padding has, so that no padding is found.
                farthest = torch.finfo(score_QM.dtype).max
                score_QM[:, :bank_size].masked_fill_(excluded_QM[queries], farthest)
            found.append(smallest(score_QM, count))
        score_QC, index_QC = (torch.cat(parts) for parts in zip(*found, strict=True))
        last_Q = score_QC[:, -1].float()
        last_Q = last_Q - torch.finfo(score_QC.dtype).eps * last_Q.abs()  # scores are rounded as well
        squared_Q = 2 * last_Q + rounded_QD.float().square().sum(dim=1) - self.rounding_error(centred_QD)
        rounding_Q = torch.linalg.vector_norm(centred_QD - rounded_QD, dim=1) + self._rounding
        # Where scores are no numbers, what is found may be padding.
        return Proposal(index_QC.clamp_max(bank_size - 1), squared_Q.clamp_min(0).sqrt() - rounding_Q)

    def approximate_distances(self, query_QD: Tensor, excluded_M: Tensor) -> Tensor:
        """Estimate distances to the nearest entries by the products alone, to their two or three digits.

        Args:
            query_QD: Queries on the bank's device, float32, shape (Q, D).
            excluded_M: Entries that no query is compared with, boolean, shape (M,).

        Returns:
            Distances, float32, shape (Q,).
        """
        excluded = excluded_M.nonzero().squeeze(1)
        with torch.no_grad(), full_float32(query_QD.device):
            rounded_QD = (query_QD - self.mean_D).to(self._augmented_MF.dtype)
            nearest = [query_QD.new_empty(0)]
            for _, score_QM in self._score_blocks(rounded_QD):
                nearest.append(smallest(score_QM.index_fill_(1, excluded, torch.inf), 1).distances[:, 0].float())
            return (2 * torch.cat(nearest) + rounded_QD.float().square().sum(dim=1)).clamp_min(0).sqrt()

    def _score_blocks(self, rounded_QD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the scores of some queries at a time, padding included, in a buffer that all blocks share."""
        size = len(self._augmented_MF)
        augmented_QF = F.pad(rounded_QD, (0, self._norms), value=1.0)
        if rounded_QD.device.type == "cpu":
            rows = max(1, _CPU_BLOCK // size, min(_CPU_ROWS, _CPU_LIMIT // size))
        else:
            rows = max(1, _ACCELERATOR_BLOCK // size)
        # One buffer for all blocks: fresh memory of this size costs as much as filling it.
        buffer = augmented_QF.new_empty(min(rows, len(augmented_QF)) * size)
        for start in range(0, len(augmented_QF), rows):
            block = augmented_QF[start : start + rows]
            score_QM = buffer[: len(block) * size].view(len(block), size)
            yield slice(start, start + rows), torch.mm(block, self._augmented_MF.T, out=score_QM)


def smallest(score_QM: Tensor, count: int) -> Neighbors:
    """Find the ``count`` smallest scores of each query, ascending, and their columns, both of shape (Q, C).

    They lie in the groups of columns with the smallest minima, which are found in the same way. Groups are interleaved,
    so that minima are taken over whole stretches of memory.
    """
    groups, rest = divmod(score_QM.shape[1], _GROUP)
    if rest or groups < _GROUP * count // 4:
        return Neighbors(*score_QM.topk(count, dim=1, largest=False))
    group_QC = smallest(score_QM.unflatten(1, (_GROUP, groups)).amin(dim=1), count).indices
    start = torch.arange(0, score_QM.shape[1], groups, device=group_QC.device)
    column = (group_QC.unsqueeze(1) + start.unsqueeze(1)).flatten(1)
    score, place = score_QM.gather(1, column).topk(count, dim=1, largest=False)
    return Neighbors(score, column.gather(1, place))


@cache
def bfloat16_is_fast() -> bool:
    """Tell whether this processor multiplies bfloat16 much faster than float32, by trying both for some milliseconds.

    The answer decides on speed alone: found neighbours are the same.
    """

    def seconds(dtype: torch.dtype) -> float:
        query, points = torch.ones(512, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
        return min(timeit.repeat(lambda: torch.mm(query, points.T), number=1, repeat=5))

    return _WORTHWHILE * seconds(torch.bfloat16) < seconds(torch.float32)
