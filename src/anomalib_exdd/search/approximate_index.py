"""Approximate search: candidates from compressed vectors, ranked by their true distances.

Shape suffixes: Q queries, M bank entries, D feature dimension, P principal axes, E = P + 1 numbers of a compressed
vector, K neighbours.
"""

from typing import ClassVar

import torch
from torch import Tensor

from .exact import Neighbors, rerank
from .pca import GRID, principal_axes, shorten_on_grid
from .table import Table
from .torch_index import TorchIndex

LARGEST_REST = 0.15
"""Share of the bank's variance that the compressed vectors keep as a norm only."""

CANDIDATES = 64
"""Candidates per query. On patch features of a ResNet the nearest entry is among the first 32 of 99.6 % of queries."""

SMALLEST_BANK = 50_000
"""Entries below which ranking the candidates costs about as much as exact search by bounds."""


class ApproximateIndex(TorchIndex):
    """Search that misses the nearest entry of a query now and then, and returns another, slightly farther one.

    The candidates are the entries with the smallest lower bounds of :mod:`.bounds`, from fewer directions than an exact
    search can do with, and a fixed number of them. The distances that are returned are the true ones to the entries
    that are returned. The bounds are computed in whole numbers: on a CPU, results are the same for any batch size and
    number of threads, and for every index of the same bank.

    A bank that is too small, or varies in too many directions, to gain by this is searched exactly, as are queries
    more than twice as far from the bank's centre as its farthest entry, for which the whole numbers would be too large.
    """

    exact: ClassVar[bool] = False

    def build(self, centred_MD: Tensor) -> None:
        """See :meth:`NeighborIndex.build`."""
        self.axes_DP = principal_axes(centred_MD, LARGEST_REST) if len(centred_MD) >= SMALLEST_BANK else None
        if self.axes_DP is None:
            super().build(centred_MD)
            return
        self.bounds = self.table = None
        self.step = self.largest_norm / GRID
        self.compressed = Table(shorten_on_grid(centred_MD, self.axes_DP, self.step))

    @property
    def description(self) -> str:
        """See :attr:`NeighborIndex.description`."""
        if self.axes_DP is not None:
            return f"approximate, candidates from {self.axes_DP.shape[1]} of {self.bank_MD.shape[1]} dimensions"
        cause = "too small" if len(self.bank_MD) < SMALLEST_BANK else "varied in too many directions"
        return f"{super().description}: {cause} to gain by approximation"

    def settle(self, query_QD: Tensor, k: int) -> tuple[Neighbors, Tensor]:
        """See :meth:`NeighborIndex.settle`."""
        if self.axes_DP is None:
            return super().settle(query_QD, k)
        centred_QD = query_QD - self.centre_D
        short_QE = shorten_on_grid(centred_QD, self.axes_DP, self.step)
        count = min(max(CANDIDATES, 4 * k), len(self.bank_MD))
        found = rerank(query_QD, self.bank_MD, self.compressed.nearest(short_QE, count).indices, k)
        within_Q = torch.linalg.vector_norm(centred_QD, dim=1) <= 2 * self.largest_norm
        return self.settle_open(query_QD, k, found, within_Q)
