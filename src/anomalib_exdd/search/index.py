"""The interface of a search index, and the steps that all of them share."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from anomalib_exdd.utils.precision import full_float32

from .exact import EXTRA_CANDIDATES, Neighbors, brute_force, certified, rerank

_BLOCK_ROWS = 4096  # entries converted to float64 at a time


class NeighborIndex(ABC):
    """K-nearest-neighbour search in one bank, exact unless a subclass says otherwise.

    A subclass proposes candidates from the bank *centred on its mean*, which makes norms, and with them the rounding
    errors of expanded distances, small. This class computes the true distances and makes sure that nothing was missed,
    so that results agree between subclasses, batch sizes and devices to float32 rounding.

    Args:
        bank_MD: Bank, float32, shape (M, D), M >= 1. It is referenced, not copied.

    Attributes:
        exact: Whether the neighbours found are the nearest ones, and not only nearly always.
    """

    exact: ClassVar[bool] = True

    def __init__(self, bank_MD: Tensor) -> None:
        self.bank_MD = bank_MD
        # Summed in float64, where there is that: the result shows nothing of the number of threads.
        wide = torch.float64 if bank_MD.device.type in {"cpu", "cuda"} else torch.float32
        sums = [block_ND.sum(dim=0, dtype=wide) for block_ND in bank_MD.split(_BLOCK_ROWS)]
        self.centre_D = (torch.stack(sums).sum(dim=0) / len(bank_MD)).float()
        centred_MD = bank_MD - self.centre_D
        self.largest_norm = float(torch.linalg.vector_norm(centred_MD, dim=1).max())
        with full_float32(bank_MD.device):
            self.build(centred_MD)

    @property
    def description(self) -> str:
        """How the bank is searched, for the log."""
        return f"exact, in all {self.bank_MD.shape[1]} dimensions"

    @abstractmethod
    def build(self, centred_MD: Tensor) -> None:
        """Prepare what proposing candidates needs.

        Args:
            centred_MD: Bank less its mean, float32, shape (M, D), contiguous; not kept but by the subclass.
        """

    @abstractmethod
    def candidates(self, query_QD: Tensor, count: int) -> Neighbors:
        """Propose the ``count`` nearest entries of centred queries.

        Args:
            query_QD: Centred queries, float32, shape (Q, D).
            count: Number of candidates C, at most M.

        Returns:
            Entries by ascending *expanded squared* distance, both of shape (Q, C); the order need not be exact.
        """

    def settle(self, query_QD: Tensor, k: int) -> tuple[Neighbors, Tensor]:
        """Find neighbours and tell whether they are certain.

        Args:
            query_QD: Queries, float32, shape (Q, D).
            k: Number of neighbours.

        Returns:
            Neighbours, and for which queries they are to be returned, boolean, shape (Q,): those for which no other
            entry can be nearer. Only an index that is not :attr:`exact` may be content with less.
        """
        bank_size, dimension = self.bank_MD.shape
        count = min(k + EXTRA_CANDIDATES, bank_size)
        centred_QD = query_QD - self.centre_D
        proposed = self.candidates(centred_QD, count)
        found = rerank(query_QD, self.bank_MD, proposed.indices, k)
        if count == bank_size:
            return found, torch.ones_like(found.indices[:, 0], dtype=torch.bool)
        norm_Q = torch.linalg.vector_norm(centred_QD, dim=1)
        return found, certified(found, proposed.distances[:, -1], norm_Q, self.largest_norm, dimension)

    def search(self, query_QD: Tensor, k: int) -> Neighbors:
        """Find the k nearest bank entries of every query.

        Args:
            query_QD: Queries on the bank's device, floating point, shape (Q, D).
            k: Number of neighbours, 1 <= k <= M.

        Returns:
            Distances (float32) and rows of the bank (int64), nearest first.

        Raises:
            ValueError: If k or the queries' dimension do not fit the bank.
        """
        bank_size, dimension = self.bank_MD.shape
        if not 1 <= k <= bank_size:
            msg = f"Argument `k` has to be between 1 and the bank's size {bank_size}, but got {k}."
            raise ValueError(msg)
        if query_QD.ndim != 2 or query_QD.shape[1] != dimension:
            msg = f"Queries have to be of shape (Q, {dimension}), but got {tuple(query_QD.shape)}."
            raise ValueError(msg)
        query_QD = query_QD.float()
        with torch.no_grad(), full_float32(query_QD.device):
            found, sure_Q = self.settle(query_QD, k)
            doubtful_Q = (~sure_Q).nonzero().squeeze(1)
            if len(doubtful_Q):
                doubtful_QD = query_QD[doubtful_Q]
                index_QK = brute_force(doubtful_QD, self.bank_MD, k).indices
                # The same arithmetic as for every other query, so that a score cannot depend on who found it.
                found.distances[doubtful_Q], found.indices[doubtful_Q] = rerank(doubtful_QD, self.bank_MD, index_QK, k)
        return found
