"""A table of points that is searched by matrix products, and quick ways to pick entries of the result.

Shape suffixes: Q queries, M points, E their dimension, C wanted per query, G groups of columns, N pairs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .exact import Neighbors

_GROUP = 16  # columns whose smallest value stands for all of them
_CPU_BLOCK = 1 << 21  # scores held at once on a CPU, 8 MiB, so that they stay near the cache ...
_CPU_ROWS = 128  # ... but at least so many rows, below which a product spends its time on packing the points ...
_CPU_LIMIT = 1 << 25  # ... and never more than 128 MiB
_ACCELERATOR_BLOCK = 1 << 27  # 512 MiB: few and large launches


class Scores:
    """Scores of some queries with all points, lower is nearer, looked at by groups of columns.

    The groups are interleaved, so that their smallest values are taken over whole stretches of memory: this and a
    selection among the groups is several times faster than a selection among all columns.

    Args:
        score_QM: Scores, shape (Q, M), rows contiguous.
    """

    def __init__(self, score_QM: Tensor) -> None:
        self.score_QM = score_QM
        self.groups = score_QM.shape[1] // _GROUP
        device = score_QM.device
        self._start = torch.arange(0, self.groups * _GROUP, max(1, self.groups), device=device)
        self._left_over = torch.arange(self.groups * _GROUP, score_QM.shape[1], device=device)
        grouped = score_QM[:, : self.groups * _GROUP].unflatten(1, (_GROUP, self.groups)) if self.groups else None
        self.smallest_QG = score_QM.new_empty(len(score_QM), 0) if grouped is None else grouped.amin(dim=1)

    def smallest(self, count: int) -> Neighbors:
        """Find the smallest scores of each query: they lie in the groups with the smallest minima.

        Args:
            count: Number C of scores wanted, at most M.

        Returns:
            The scores, ascending, and their columns, both of shape (Q, C).
        """
        if self.groups < 4 * count:
            return Neighbors(*self.score_QM.topk(count, dim=1, largest=False))
        group_QC = self.smallest_QG.topk(count, dim=1, largest=False, sorted=False).indices
        left_over = self._left_over.expand(len(group_QC), -1)
        column = torch.cat([(group_QC.unsqueeze(1) + self._start.unsqueeze(1)).flatten(1), left_over], dim=1)
        score, place = self.score_QM.gather(1, column).topk(count, dim=1, largest=False)
        return Neighbors(score, column.gather(1, place))

    def groups_up_to(self, limit_Q: Tensor) -> Tensor:
        """Count the groups that :meth:`up_to` looks into: at most the number of scores that it finds, shape (Q,)."""
        return (self.smallest_QG <= limit_Q.unsqueeze(1)).sum(dim=1)

    def up_to(self, limit_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Find all scores that are not above a limit.

        Args:
            limit_Q: Limit of every query, shape (Q,).

        Returns:
            Rows and columns of the scores, int64, both of shape (N,), in no particular order.
        """
        limit_Q1 = limit_Q.unsqueeze(1)
        row_N, group_N = (self.smallest_QG <= limit_Q1).nonzero(as_tuple=True)
        column_NG = group_N.unsqueeze(1) + self._start
        cell_N = (row_N.unsqueeze(1) * self.score_QM.shape[1] + column_NG).flatten()
        low_NG = self.score_QM.flatten().index_select(0, cell_N).view_as(column_NG) <= limit_Q1[row_N]
        pair_N, member_N = low_NG.nonzero(as_tuple=True)
        row, column = (self.score_QM[:, self.groups * _GROUP :] <= limit_Q1).nonzero(as_tuple=True)
        column_N = group_N[pair_N] + self._start[member_N]
        return torch.cat([row_N[pair_N], row]), torch.cat([column_N, column + self.groups * _GROUP])


class Table:
    """Points to be multiplied with queries, lengthened by half their squared norm.

    The score ``|m|^2 / 2 - q.m`` orders points as their distance does. It is the product of ``(q, 1)`` and the
    lengthened point ``(-m, |m|^2 / 2)``: nothing has to be added to the large result.

    Args:
        point_ME: Points, float32, shape (M, E), M >= 1.
    """

    def __init__(self, point_ME: Tensor) -> None:
        half_norm_M1 = point_ME.square().sum(dim=1, keepdim=True) / 2
        self.lengthened_MF = torch.cat([-point_ME, half_norm_M1], dim=1)

    def scores(self, query_QE: Tensor) -> Iterator[tuple[slice, Scores]]:
        """Score all points for blocks of queries.

        Args:
            query_QE: Queries, float32, shape (Q, E).

        Yields:
            Rows of the queries, and their scores, which are overwritten by the next ones.
        """
        size = len(self.lengthened_MF)
        rows = _block_rows(size, query_QE.device)
        lengthened_QF = torch.cat([query_QE, torch.ones_like(query_QE[:, :1])], dim=1)
        # One buffer for all blocks: fresh memory of this size costs as much as filling it.
        buffer = query_QE.new_empty(min(rows, len(query_QE)) * size)
        for start in range(0, len(query_QE), rows):
            block = lengthened_QF[start : start + rows]
            score = buffer[: len(block) * size].view(len(block), size)
            yield slice(start, start + len(block)), Scores(torch.mm(block, self.lengthened_MF.T, out=score))

    def nearest(self, query_QE: Tensor, count: int) -> Neighbors:
        """Find the nearest points of every query by expanded distances.

        Args:
            query_QE: Queries, float32, shape (Q, E).
            count: Number C of points wanted, at most M.

        Returns:
            Expanded *squared* distances, ascending, and rows of the points, both of shape (Q, C).
        """
        found = [block.smallest(count) for _, block in self.scores(query_QE)]
        if not found:
            return Neighbors(query_QE.new_empty(0, count), query_QE.new_empty(0, count, dtype=torch.int64))
        score_QC, index_QC = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Neighbors(2 * score_QC + query_QE.square().sum(dim=1, keepdim=True), index_QC)


def _block_rows(size: int, device: torch.device) -> int:
    """Choose how many queries are scored at a time."""
    if device.type != "cpu":
        return max(1, _ACCELERATOR_BLOCK // size)
    return max(1, _CPU_BLOCK // size, min(_CPU_ROWS, _CPU_LIMIT // size))
