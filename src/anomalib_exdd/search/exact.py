"""What makes a search exact, whatever proposed the candidates.

Fast searches expand ``|q - m|^2 = |q|^2 + |m|^2 - 2 q.m`` and compute the products with a matrix multiplication. That
loses up to all digits where a query lies close to a bank entry, and the loss depends on the batch size and the library.
Here the expansion only proposes candidates. Their distances are then computed by direct difference, and a bound on the
expansion's error tells whether an entry that was not proposed could be nearer; the few queries for which it could are
searched entirely by direct difference.

Shape suffixes: Q queries, M bank entries, D feature dimension, K neighbours, C candidates (C >= K).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EXTRA_CANDIDATES = 3
"""Candidates fetched beyond k. More make the fall-back rarer and the re-ranking dearer; 3 keep it under 1 in 10^4."""

_BLOCK_ELEMENTS = 1 << 22  # distances held at once by a search by direct differences: 16 MiB
_CPU_DIFFERENCES = 1 << 18  # differences held at once on a CPU: 1 MiB, so that they stay in its cache
_ACCELERATOR_DIFFERENCES = 1 << 26  # 256 MiB elsewhere: few and large launches


class Neighbors(NamedTuple):
    """The k nearest bank entries of each query, nearest first.

    Attributes:
        distances: Euclidean distances, float32, shape (Q, K).
        indices: Rows of the bank, int64, shape (Q, K).
    """

    distances: Tensor
    indices: Tensor


def direct_distances(query_QD: Tensor, bank_MD: Tensor, index_QC: Tensor) -> Tensor:
    """Compute the distance of every query to its own list of bank entries by direct difference.

    Args:
        query_QD: Queries, float32, shape (Q, D).
        bank_MD: Bank, float32 or float16, shape (M, D).
        index_QC: Rows of the bank for every query, integer, shape (Q, C).

    Returns:
        Euclidean distances, float32, shape (Q, C). The distance of an exact duplicate is exactly 0.
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


def pair_distances(query_QD: Tensor, bank_MD: Tensor, row_N: Tensor, index_N: Tensor) -> Tensor:
    """Compute distances of pairs of a query and a bank entry, to the bit those of :func:`direct_distances`.

    Args:
        query_QD: Queries, float32, shape (Q, D).
        bank_MD: Bank, float32, shape (M, D).
        row_N: Query of every pair, int64, shape (N,).
        index_N: Bank entry of every pair, int64, shape (N,).

    Returns:
        Euclidean distances, float32, shape (N,).
    """
    elements = _CPU_DIFFERENCES if query_QD.device.type == "cpu" else _ACCELERATOR_DIFFERENCES
    pairs = max(1, elements // query_QD.shape[1])
    blocks = [query_QD.new_empty(0)]
    for row, index in zip(row_N.split(pairs), index_N.split(pairs), strict=True):
        difference = bank_MD.index_select(0, index).sub_(query_QD.index_select(0, row))
        blocks.append(torch.linalg.vector_norm(difference, dim=-1))
    return torch.cat(blocks)


def rerank(query_QD: Tensor, bank_MD: Tensor, candidate_QC: Tensor, k: int) -> Neighbors:
    """Order candidates by their directly computed distance and keep the k nearest."""
    distance_QC = direct_distances(query_QD, bank_MD, candidate_QC)
    distance_QK, column_QK = distance_QC.topk(k, dim=1, largest=False, sorted=True)
    return Neighbors(distance_QK, candidate_QC.gather(1, column_QK))


def expansion_error(query_norm_Q: Tensor, largest_bank_norm: float, dimension: int) -> Tensor:
    """Bound the rounding error of expanded squared distances.

    It is modelled as ``2 sqrt(D) eps (|q| + max|m|)^2``: the usual probabilistic bound of a float32 dot product (Higham
    & Mary, SIAM J. Sci. Comput. 41(5), 2019), doubled.

    Args:
        query_norm_Q: Norms of the (centred) queries, float32, shape (Q,).
        largest_bank_norm: Largest norm of a (centred) bank entry.
        dimension: Feature dimension D.

    Returns:
        Bounds of shape (Q,).
    """
    scale_Q = (query_norm_Q + largest_bank_norm).square()
    return 2 * math.sqrt(dimension) * torch.finfo(torch.float32).eps * scale_Q


def certified(
    found: Neighbors,
    last_squared_Q: Tensor,
    query_norm_Q: Tensor,
    largest_bank_norm: float,
    dimension: int,
) -> Tensor:
    """Tell for which queries no entry outside the candidates can be nearer than the k-th one found.

    Args:
        found: Re-ranked neighbours of the Q queries.
        last_squared_Q: Expanded squared distance of the farthest candidate, float32, shape (Q,).
        query_norm_Q: Norms of the (centred) queries, float32, shape (Q,).
        largest_bank_norm: Largest norm of a (centred) bank entry.
        dimension: Feature dimension D.

    Returns:
        Boolean tensor of shape (Q,).
    """
    error_Q = expansion_error(query_norm_Q, largest_bank_norm, dimension)
    return found.distances[:, -1].square() <= last_squared_Q - error_Q


def brute_force(query_QD: Tensor, bank_MD: Tensor, k: int) -> Neighbors:
    """Search by direct difference alone: slow, exact to float32 rounding."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, bank_MD.shape[0]))
    distances, indices = [], []
    for query in query_QD.split(rows):
        distance = torch.cdist(query, bank_MD, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.topk(k, dim=1, largest=False, sorted=True)
        distances.append(nearest.values)
        indices.append(nearest.indices)
    return Neighbors(torch.cat(distances), torch.cat(indices))


def dense_search(query_QD: Tensor, bank_MD: Tensor, k: int) -> Neighbors:
    """Search with one matrix product and no branch on data: the form that is exported to ONNX and OpenVINO.

    Args:
        query_QD: Queries, float32, shape (Q, D).
        bank_MD: Bank, float32, shape (M, D), M known while tracing.
        k: Number of neighbours, at most M.

    Returns:
        The k nearest entries, their distances computed by direct difference.
    """
    bank_size = bank_MD.shape[0]
    centre_D = bank_MD.mean(dim=0)
    centred_MD = bank_MD - centre_D
    half_norm_M = centred_MD.square().sum(dim=1) / 2
    half_squared_QM = half_norm_M - (query_QD - centre_D) @ centred_MD.T
    candidate_QC = half_squared_QM.topk(min(k + EXTRA_CANDIDATES, bank_size), dim=1, largest=False).indices
    return rerank(query_QD, bank_MD, candidate_QC, k)
