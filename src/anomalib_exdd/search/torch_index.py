"""Exact search in plain torch, on any device: lower bounds from principal components prune nearly all entries.

Split a centred vector into its coordinates on the leading principal axes of the bank and a residual. For a query q and
an entry m

    |q - m|^2 = |coordinates(q) - coordinates(m)|^2 + |residual(q) - residual(m)|^2
             >= |coordinates(q) - coordinates(m)|^2 + (|residual(q)| - |residual(m)|)^2,

by the triangle inequality: the distance of the *compressed* vectors (coordinates, |residual|) never exceeds the true
one. The entries with the smallest bounds give k true distances; an entry whose bound is above the k-th of them is
pruned. Some ten entries per query remain on patch features of a ResNet, with an eighth to a third of the dimensions as
coordinates.

Shape suffixes: Q queries, M bank entries or points, D feature dimension, P principal axes, E = P + 1 numbers of a
compressed vector, K neighbours, C candidates, G groups of columns, N pairs of a query and an entry.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .exact import EXTRA_CANDIDATES, NeighborIndex, Neighbors, pair_distances, rerank
from .pca import compress, principal_axes

AFFORDABLE_SHARE = 1 / 64
"""Share of the bank that may remain for a query; beyond, a product over all dimensions is cheaper."""
_RESIDUAL_VARIANCE = 0.07  # less makes the products larger, more leaves more entries
_SMALLEST_BANK = 4096  # below, one product over all dimensions is as cheap as the bounds and what follows them
_GROUP = 16  # columns whose smallest value stands for all of them
_CPU_BLOCK = 1 << 21  # scores held at once on a CPU, 8 MiB, so that they stay near the cache ...
_CPU_ROWS = 128  # ... but at least so many rows, below which a product spends its time on packing the points ...
_CPU_LIMIT = 1 << 25  # ... and never more than 128 MiB
_ACCELERATOR_BLOCK = 1 << 27  # 512 MiB: few and large launches
_BUILDING = threading.Lock()


class TorchIndex(NeighborIndex):
    """Pruned search where it saves work, and products over all dimensions for all other queries.

    Attributes:
        axes_DP: Principal axes for the lower bounds, float64, shape (D, P); None for banks that are small or vary in
            many directions, which are not pruned.
    """

    def build(self, centred_MD: Tensor) -> None:
        """See :meth:`NeighborIndex.build`."""
        large = len(centred_MD) >= _SMALLEST_BANK
        self.axes_DP = principal_axes(centred_MD, _RESIDUAL_VARIANCE) if large else None
        self._products = BlockedProducts(centred_MD) if self.axes_DP is None else None
        if self.axes_DP is not None:
            self._bounds = BlockedProducts(compress(centred_MD, self.axes_DP))
            self.description = "exact, by bounds from {1} of {0} dimensions".format(*self.axes_DP.shape)

    def search_candidates(self, query_QD: Tensor, k: int) -> tuple[Neighbors, Tensor]:
        """See :meth:`NeighborIndex.search_candidates`."""
        if self.axes_DP is None or len(query_QD) == 0:
            return super().search_candidates(query_QD, k)
        found, exact_Q = self.pruned_search(query_QD, k)
        rest_Q = (~exact_Q).nonzero().squeeze(1)
        if len(rest_Q):
            rest, exact_Q[rest_Q] = super().search_candidates(query_QD[rest_Q], k)
            found.distances[rest_Q], found.indices[rest_Q] = rest
        return found, exact_Q

    def candidates(self, centred_QD: Tensor, count: int) -> Neighbors:
        """See :meth:`NeighborIndex.candidates`."""
        with _BUILDING:
            if self._products is None:  # as large as the bank, and seldom needed
                self._products = BlockedProducts(self.bank_MD - self.mean_D)
        return self._products.nearest(centred_QD, count)

    def pruned_search(self, query_QD: Tensor, k: int) -> tuple[Neighbors, Tensor]:
        """Search for one query or more where the bounds leave few entries.

        Returns:
            Neighbours, and for which queries they are exact, boolean, shape (Q,); the others need all dimensions.

        Raises:
            ValueError: If there are no :attr:`axes_DP`.
        """
        if self.axes_DP is None:
            msg = f"The bank cannot be pruned: its search is {self.description}. Use `search`."
            raise ValueError(msg)
        size = len(self.bank_MD)
        centred_QD = query_QD - self.mean_D
        compressed_QE = compress(centred_QD, self.axes_DP)
        # A score is half the squared bound less half the query's squared norm, and it is rounded.
        slack_Q = self.rounding_error(centred_QD) - compressed_QE.square().sum(dim=1)
        found = []
        for rows, scores in self._bounds.scores(compressed_QE):
            query = query_QD[rows]
            first_QC = scores.smallest(min(k + EXTRA_CANDIDATES, size)).indices
            known_Q = rerank(query, self.bank_MD, first_QC, k).distances[:, -1]
            limit_Q = (known_Q.square() + slack_Q[rows]) / 2
            few_Q = scores.count_groups(limit_Q) <= AFFORDABLE_SHARE * size
            row_N, index_N = scores.up_to(limit_Q.masked_fill(~few_Q, -torch.inf))
            found.append((*_nearest_pairs(query, self.bank_MD, first_QC, row_N, index_N, k), few_Q))
        distances, indices, exact_Q = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Neighbors(distances, indices), exact_Q


class GroupedScores:
    """Scores of some queries with all points, lower is nearer, with the smallest of each group of columns.

    The groups are interleaved, so that their smallest values are taken over whole stretches of memory: this and a
    selection among the groups is several times faster than a selection among all columns. Rows are contiguous.
    """

    def __init__(self, score_QM: Tensor) -> None:
        self.score_QM = score_QM
        size, device = score_QM.shape[1], score_QM.device
        self._groups = size // _GROUP
        self._grouped = self._groups * _GROUP  # columns in groups; fewer than a group are left over
        self._start = torch.arange(0, self._grouped, max(1, self._groups), device=device)
        self._smallest_QG = score_QM[:, : self._grouped].unflatten(1, (_GROUP, self._groups)).amin(dim=1)

    def smallest(self, count: int) -> Neighbors:
        """Find the ``count`` smallest scores of each query, ascending, and their columns, both of shape (Q, C)."""
        if self._groups < 4 * count:
            return Neighbors(*self.score_QM.topk(count, dim=1, largest=False))
        # They lie in the groups with the smallest minima.
        group_QC = self._smallest_QG.topk(count, dim=1, largest=False, sorted=False).indices
        left_over = torch.arange(self._grouped, self.score_QM.shape[1], device=group_QC.device)
        grouped = (group_QC.unsqueeze(1) + self._start.unsqueeze(1)).flatten(1)
        column = torch.cat([grouped, left_over.expand(len(group_QC), -1)], dim=1)
        score, place = self.score_QM.gather(1, column).topk(count, dim=1, largest=False)
        return Neighbors(score, column.gather(1, place))

    def count_groups(self, limit_Q: Tensor) -> Tensor:
        """Count the groups with scores that are not above a limit, shape (Q,): at most the number of such scores."""
        return (self._smallest_QG <= limit_Q.unsqueeze(1)).sum(dim=1)

    def up_to(self, limit_Q: Tensor) -> tuple[Tensor, Tensor]:
        """Find the rows and columns of all scores that are not above their query's limit, int64, both of shape (N,)."""
        limit_Q1 = limit_Q.unsqueeze(1)
        row_N, group_N = (self._smallest_QG <= limit_Q1).nonzero(as_tuple=True)
        column_NG = group_N.unsqueeze(1) + self._start
        cell_N = (row_N.unsqueeze(1) * self.score_QM.shape[1] + column_NG).flatten()
        low_NG = self.score_QM.flatten().index_select(0, cell_N).view_as(column_NG) <= limit_Q1[row_N]
        pair_N, member_N = low_NG.nonzero(as_tuple=True)
        row, column = (self.score_QM[:, self._grouped :] <= limit_Q1).nonzero(as_tuple=True)
        column_N = group_N[pair_N] + self._start[member_N]
        return torch.cat([row_N[pair_N], row]), torch.cat([column_N, column + self._grouped])


class BlockedProducts:
    """Expanded distances of queries to points, a block of queries at a time, so that they stay in the cache.

    The score ``|m|^2 / 2 - q.m`` orders points, float32, shape (M, E), as their distance does. It is one product, of
    ``(q, 1)`` and the augmented point ``(-m, |m|^2 / 2)``: nothing has to be added to the large result.
    """

    def __init__(self, point_ME: Tensor) -> None:
        self._augmented_MF = torch.cat([-point_ME, point_ME.square().sum(dim=1, keepdim=True) / 2], dim=1)

    def scores(self, query_QE: Tensor) -> Iterator[tuple[slice, GroupedScores]]:
        """Yield rows of the queries, and their scores with all points, which are overwritten by the next ones."""
        size = len(self._augmented_MF)
        if query_QE.device.type == "cpu":
            rows = max(1, _CPU_BLOCK // size, min(_CPU_ROWS, _CPU_LIMIT // size))
        else:
            rows = max(1, _ACCELERATOR_BLOCK // size)
        augmented_QF = torch.cat([query_QE, torch.ones_like(query_QE[:, :1])], dim=1)
        # One buffer for all blocks: fresh memory of this size costs as much as filling it.
        buffer = query_QE.new_empty(min(rows, len(query_QE)) * size)
        for start in range(0, len(query_QE), rows):
            block = augmented_QF[start : start + rows]
            score = buffer[: len(block) * size].view(len(block), size)
            yield slice(start, start + len(block)), GroupedScores(torch.mm(block, self._augmented_MF.T, out=score))

    def nearest(self, query_QE: Tensor, count: int) -> Neighbors:
        """Find the ``count`` nearest points: expanded *squared* distances, ascending, and rows, of shape (Q, C)."""
        found = [block.smallest(count) for _, block in self.scores(query_QE)]
        if not found:
            return Neighbors(query_QE.new_empty(0, count), query_QE.new_empty(0, count, dtype=torch.int64))
        score_QC, index_QC = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Neighbors(2 * score_QC + query_QE.square().sum(dim=1, keepdim=True), index_QC)


def _nearest_pairs(
    query_QD: Tensor, bank_MD: Tensor, first_QC: Tensor, row_N: Tensor, index_N: Tensor, k: int
) -> Neighbors:
    """Keep the k nearest entries of each query, out of its first candidates and the pairs it is in."""
    size, count = len(bank_MD), len(query_QD)
    first_QC = first_QC + size * torch.arange(count, device=first_QC.device).unsqueeze(1)
    pair_N = torch.cat([first_QC.flatten(), size * row_N + index_N]).unique()  # ascending: by query, then entry
    row_N, index_N = pair_N // size, pair_N % size
    distance_N = pair_distances(query_QD, bank_MD, row_N, index_N)
    order_N = distance_N.argsort(stable=True)
    order_N = order_N[row_N[order_N].argsort(stable=True)]  # by query, then distance, then entry
    pairs_Q = row_N.bincount(minlength=count)
    place_QK = (pairs_Q.cumsum(0) - pairs_Q).unsqueeze(1) + torch.arange(k, device=pairs_Q.device)
    nearest_QK = order_N[place_QK]
    return Neighbors(distance_N[nearest_QK], index_N[nearest_QK])
