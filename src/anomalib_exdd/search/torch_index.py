"""Exact search in plain torch, on any device."""

import threading

from torch import Tensor

from .bounds import BoundedSearch
from .exact import Neighbors
from .index import NeighborIndex
from .table import Table

_BUILDING = threading.Lock()


class TorchIndex(NeighborIndex):
    """Lower bounds where they save work, and products over all dimensions for what they do not settle."""

    def build(self, centred_MD: Tensor) -> None:
        """See :meth:`NeighborIndex.build`."""
        self.bounds = BoundedSearch.of(self.bank_MD, self.centre_D, centred_MD)
        self.table = Table(centred_MD) if self.bounds is None else None

    @property
    def description(self) -> str:
        """See :attr:`NeighborIndex.description`."""
        if self.bounds is None:
            return super().description
        return f"exact, by bounds from {self.bounds.axes_DP.shape[1]} of {self.bank_MD.shape[1]} dimensions"

    def settle(self, query_QD: Tensor, k: int) -> tuple[Neighbors, Tensor]:
        """See :meth:`NeighborIndex.settle`."""
        if self.bounds is None or len(query_QD) == 0:
            return super().settle(query_QD, k)
        return self.settle_open(query_QD, k, *self.bounds.search(query_QD, k))

    def settle_open(self, query_QD: Tensor, k: int, found: Neighbors, settled_Q: Tensor) -> tuple[Neighbors, Tensor]:
        """Search in all dimensions for the queries that are not settled; results are written into the arguments."""
        open_Q = (~settled_Q).nonzero().squeeze(1)
        if len(open_Q):
            rest, settled_Q[open_Q] = NeighborIndex.settle(self, query_QD[open_Q], k)
            found.distances[open_Q], found.indices[open_Q] = rest
        return found, settled_Q

    def candidates(self, query_QD: Tensor, count: int) -> Neighbors:
        """See :meth:`NeighborIndex.candidates`."""
        with _BUILDING:
            if self.table is None:  # as large as the bank, and seldom needed
                self.table = Table(self.bank_MD - self.centre_D)
        return self.table.nearest(query_QD, count)
