"""The interface of a search index, and the steps that all of them share."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from anomalib_exdd.precision import full_float32

from .exact import EXTRA_CANDIDATES, Neighbors, brute_force, certified, rerank


class NeighborIndex(ABC):
    """Exact k-nearest-neighbour search in one bank.

    A subclass proposes candidates from the bank *centred on its mean*, which makes norms, and with them the rounding
    errors of expanded distances, small. This class computes the true distances and makes sure that nothing was missed,
    so that results agree between subclasses, batch sizes and devices to float32 rounding.

    Args:
        bank_MD: Bank, float32, shape (M, D), M >= 1. It is referenced, not copied.
    """

    def __init__(self, bank_MD: Tensor) -> None:
        self.bank_MD = bank_MD
        self.centre_D = bank_MD.mean(dim=0)
        self.centred_MD = bank_MD - self.centre_D
        self.largest_norm = float(torch.linalg.vector_norm(self.centred_MD, dim=1).max())

    @abstractmethod
    def candidates(self, query_QD: Tensor, count: int) -> Neighbors:
        """Propose the ``count`` nearest entries of centred queries.

        Args:
            query_QD: Centred queries, float32, shape (Q, D).
            count: Number of candidates C, at most M.

        Returns:
            Entries by ascending *expanded squared* distance, both of shape (Q, C); the order need not be exact.
        """

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
        count = min(k + EXTRA_CANDIDATES, bank_size)
        with full_float32(query_QD.device):
            centred_QD = query_QD - self.centre_D
            proposed = self.candidates(centred_QD, count)
            found = rerank(query_QD, self.bank_MD, proposed.indices, k)
            if count == bank_size:
                return found
            norm_Q = torch.linalg.vector_norm(centred_QD, dim=1)
            doubtful_Q = ~certified(found, proposed.distances[:, -1], norm_Q, self.largest_norm, dimension)
            if doubtful_Q.any():
                exact = brute_force(query_QD[doubtful_Q], self.bank_MD, k)
                found.indices[doubtful_Q] = exact.indices
                # The same arithmetic as for every other query, so that a score cannot depend on who found it.
                found.distances[doubtful_Q] = rerank(query_QD[doubtful_Q], self.bank_MD, exact.indices, k).distances
        return found
