"""Exact nearest-neighbour search from candidates that are found quickly.

Expanding ``|q - m|^2 = |q|^2 + |m|^2 - 2 q.m`` turns distances into a matrix multiplication, but cancels up to all
digits where a query lies close to an entry. Here the expansion only proposes candidates. Their distances are computed
by direct difference, and a bound on the rounding error tells which queries have to be searched by brute force.

Shape suffixes: Q queries, M bank entries, D feature dimension, K neighbours, C candidates (C >= K), N pairs.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.precision import full_float32, mean_of_rows

EXTRA_CANDIDATES = 3
"""Candidates beyond k. More make brute force rarer and the ranking slower; with 3 it is under 1 query in 10^4."""
_BRUTE_FORCE_ELEMENTS = 1 << 22  # distances held at once: 16 MiB
_CPU_DIFFERENCES = 1 << 20  # differences held at once on a CPU: 4 MiB, so that they stay near its cache
_ACCELERATOR_DIFFERENCES = 1 << 26  # 256 MiB elsewhere: few and large launches


class Neighbors(NamedTuple):
    """The k nearest bank entries of each query, nearest first."""

    distances: Tensor  # Euclidean, float32, shape (Q, K)
    indices: Tensor  # rows of the bank, int64, shape (Q, K)


class Proposal(NamedTuple):
    """Candidates for the nearest entries of each query."""

    indices: Tensor  # rows of the bank, int64, shape (Q, C)
    bound: Tensor  # distance that no other entry is nearer than, float32, shape (Q,)


class NeighborIndex(ABC):
    """Exact k-nearest-neighbour search in one bank.

    Subclasses propose candidates from the bank centred on its mean, which makes the rounding errors of expanded
    distances small. Results agree between subclasses, batch sizes and devices to float32 rounding.

    Args:
        bank_MD: Bank, float32, shape (M, D), M >= 1. It is referenced, not copied.
    """

    extra_candidates: tuple[int, ...] = (EXTRA_CANDIDATES,)
    """Candidates beyond k, and again for queries that these leave undecided."""

    def __init__(self, bank_MD: Tensor) -> None:
        self.bank_MD = bank_MD
        self.mean_D = mean_of_rows(bank_MD)
        self.description = f"exact, in all {bank_MD.shape[1]} dimensions"
        centred_MD = bank_MD - self.mean_D
        self._largest_norm = float(torch.linalg.vector_norm(centred_MD, dim=1).max())
        with full_float32(bank_MD.device):
            self.build(centred_MD)

    @abstractmethod
    def build(self, centred_MD: Tensor) -> None:
        """Prepare for proposing candidates from the centred bank, float32, shape (M, D), contiguous."""

    @abstractmethod
    def candidates(self, centred_QD: Tensor, count: int, excluded_QM: Tensor | None) -> Proposal:
        """Propose the ``count`` nearest entries of centred queries, float32, shape (Q, D), in any order."""

    def search(self, query_QD: Tensor, k: int, excluded_QM: Tensor | None = None) -> Neighbors:
        """Find the k nearest entries of queries.

        Args:
            query_QD: Queries on the bank's device, floating point, shape (Q, D).
            k: Number of neighbours, 1 <= k <= M.
            excluded_QM: Entries that each query is not compared with, boolean, for a search in torch. Where fewer than
                k are left, the last distances are infinite.
        """
        if len(query_QD) == 0:
            return Neighbors(query_QD.new_empty(0, k).float(), query_QD.new_empty(0, k).long())
        query_QD = query_QD.float()
        with torch.no_grad(), full_float32(query_QD.device):
            found, undecided_Q = self._search_candidates(query_QD, k, self.extra_candidates[0], excluded_QM)
            for extra in (*self.extra_candidates[1:], None):
                rest_Q = undecided_Q.nonzero().squeeze(1)
                if len(rest_Q):
                    arguments = query_QD[rest_Q], k, extra, None if excluded_QM is None else excluded_QM[rest_Q]
                    nearest, undecided_Q[rest_Q] = self._search_candidates(*arguments)
                    found.distances[rest_Q], found.indices[rest_Q] = nearest
        return found

    def _search_candidates(
        self, query_QD: Tensor, k: int, extra: int | None, excluded_QM: Tensor | None
    ) -> tuple[Neighbors, Tensor]:
        """Find the nearest of ``k + extra`` candidates, without ``extra`` those of a brute-force search.

        Returns:
            Neighbours, and for which queries another entry could be nearer, boolean, shape (Q,).
        """
        size = len(self.bank_MD)
        count = size if extra is None else min(k + extra, size)
        if extra is None:
            index_QC, bound_Q = _brute_force(query_QD, self.bank_MD, k, excluded_QM), None
        else:
            index_QC, bound_Q = self.candidates(query_QD - self.mean_D, count, excluded_QM)
        found = rerank(query_QD, self.bank_MD, index_QC, k, excluded_QM)
        last_Q = found.distances[:, -1]
        if bound_Q is None or count == size:
            return found, torch.zeros_like(last_Q, dtype=torch.bool)
        return found, ~(last_Q <= bound_Q)  # what is not a number is undecided too

    def rounding_error(self, centred_QD: Tensor) -> Tensor:
        """Bound the rounding error of the queries' expanded squared distances, shape (Q,).

        The bound is ``2 sqrt(D) eps (|q| + max|m|)^2``, twice the usual probabilistic one of a float32 dot product
        (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019).
        """
        scale_Q = (torch.linalg.vector_norm(centred_QD, dim=1) + self._largest_norm).square()
        return 2 * math.sqrt(centred_QD.shape[1]) * torch.finfo(torch.float32).eps * scale_Q


def direct_distances(query_QD: Tensor, bank_MD: Tensor, index_QC: Tensor) -> Tensor:
    """Compute Euclidean distances of queries, float32, to their own entries of a float32 or float16 bank, shape (Q, C).

    They are computed by direct difference: the distance of an exact duplicate is exactly 0.
    """
    if torch.compiler.is_compiling():  # a traced graph has no data-dependent loop
        return torch.linalg.vector_norm(query_QD.unsqueeze(1) - bank_MD[index_QC], dim=-1)
    elements = _CPU_DIFFERENCES if query_QD.device.type == "cpu" else _ACCELERATOR_DIFFERENCES
    rows = max(1, elements // max(1, index_QC.shape[1] * query_QD.shape[1]))
    blocks = [query_QD.new_empty(0, index_QC.shape[1])]
    for query, index in zip(query_QD.split(rows), index_QC.split(rows), strict=True):
        # One selected copy, changed in place: indexing and a second copy take three times as long.
        difference = bank_MD.index_select(0, index.flatten()).float().unflatten(0, index.shape)
        blocks.append(torch.linalg.vector_norm(difference.sub_(query.unsqueeze(1)), dim=-1))
    return torch.cat(blocks)


def rerank(
    query_QD: Tensor, bank_MD: Tensor, candidate_QC: Tensor, k: int, excluded_QM: Tensor | None = None
) -> Neighbors:
    """Order candidates by their directly computed distance and keep the k nearest; the excluded are infinitely far."""
    distance_QC = direct_distances(query_QD, bank_MD, candidate_QC)
    if excluded_QM is not None:
        distance_QC = distance_QC.masked_fill(excluded_QM.gather(1, candidate_QC), torch.inf)
    distance_QK, column_QK = distance_QC.topk(k, dim=1, largest=False)
    return Neighbors(distance_QK, candidate_QC.gather(1, column_QK))


def dense_search(query_QD: Tensor, bank_MD: Tensor, k: int) -> Neighbors:
    """Search with one matrix product and no branch on data: the form that is exported to ONNX and OpenVINO."""
    mean_D = bank_MD.mean(dim=0)
    # From here on the centred bank alone, so that an export holds one bank and not two.
    query_QD, bank_MD = query_QD - mean_D, bank_MD - mean_D
    expanded_QM = expanded_distances(query_QD, bank_MD)
    candidate_QC = expanded_QM.topk(min(k + EXTRA_CANDIDATES, len(bank_MD)), dim=1, largest=False).indices
    return rerank(query_QD, bank_MD, candidate_QC, k)


def _brute_force(query_QD: Tensor, bank_MD: Tensor, k: int, excluded_QM: Tensor | None) -> Tensor:
    """Find the k nearest entries by direct differences to all of them, int64, shape (Q, K)."""
    rows = max(1, _BRUTE_FORCE_ELEMENTS // len(bank_MD))
    indices = []
    for start in range(0, len(query_QD), rows):
        query = query_QD[start : start + rows]
        distance_QM = torch.cdist(query, bank_MD, compute_mode="donot_use_mm_for_euclid_dist")
        if excluded_QM is not None:
            distance_QM = distance_QM.masked_fill_(excluded_QM[start : start + rows], torch.inf)
        indices.append(distance_QM.topk(k, dim=1, largest=False).indices)
    return torch.cat(indices)
