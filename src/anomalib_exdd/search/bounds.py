"""Exact search by lower bounds: few numbers per entry rule out nearly all entries, true distances settle the rest.

Features of patches fill few of their dimensions. Split a centred vector into its coordinates on the leading principal
axes of the bank, the *head*, and the *rest*. For a query q and an entry m

    |q - m|^2 = |head(q) - head(m)|^2 + |rest(q) - rest(m)|^2
             >= |head(q) - head(m)|^2 + (|rest(q)| - |rest(m)|)^2,

by the triangle inequality: the distance between the *short* vectors (head, |rest|) never exceeds the true one. The
entries with the smallest bounds give k true distances; whoever's bound is above the k-th of them cannot be nearer. What
remains are some ten entries per query on patch features of a ResNet, with an eighth to a third of the dimensions in the
head.

Shape suffixes: Q queries, M bank entries, D feature dimension, P principal axes, E = P + 1 numbers of a short vector,
K neighbours, C candidates, N pairs of a query and an entry.
"""

import torch
from torch import Tensor

from .exact import EXTRA_CANDIDATES, Neighbors, expansion_error, pair_distances, rerank
from .pca import principal_axes, shorten
from .table import Table

LARGEST_REST = 0.07
"""Share of the bank's variance outside of the head: less makes the products larger, more leaves more to settle."""

_SMALLEST_BANK = 4096  # below, one product over all dimensions is as cheap as the bounds and what follows them
_AFFORDABLE = 1 / 64  # share of the bank that may remain for a query; beyond, a product over all dimensions is cheaper


class BoundedSearch:
    """Nearest neighbours by lower bounds from the bank's principal axes.

    Args:
        bank_MD: Bank, float32, shape (M, D).
        centre_D: Its mean.
        centred_MD: The bank less its mean.
        axes_DP: Leading principal axes, float64, shape (D, P).
    """

    def __init__(self, bank_MD: Tensor, centre_D: Tensor, centred_MD: Tensor, axes_DP: Tensor) -> None:
        self.bank_MD, self.centre_D, self.axes_DP = bank_MD, centre_D, axes_DP
        self.largest_norm = float(torch.linalg.vector_norm(centred_MD, dim=1).max())
        self.table = Table(shorten(centred_MD, axes_DP))

    @classmethod
    def of(cls, bank_MD: Tensor, centre_D: Tensor, centred_MD: Tensor) -> "BoundedSearch | None":
        """Prepare the search if it is likely to save work: in a large bank whose entries vary in few directions."""
        if len(bank_MD) < _SMALLEST_BANK:
            return None
        axes_DP = principal_axes(centred_MD, LARGEST_REST)
        return None if axes_DP is None else cls(bank_MD, centre_D, centred_MD, axes_DP)

    def search(self, query_QD: Tensor, k: int) -> tuple[Neighbors, Tensor]:
        """Find the k nearest entries of the queries for which few entries remain.

        Args:
            query_QD: Queries, float32, shape (Q, D), Q >= 1.
            k: Number of neighbours, at most M.

        Returns:
            Neighbours, and for which queries they are the nearest, boolean, shape (Q,); the others are left to a search
            in all dimensions.
        """
        size, dimension = self.bank_MD.shape
        centred_QD = query_QD - self.centre_D
        short_QE = shorten(centred_QD, self.axes_DP)
        norm_Q = torch.linalg.vector_norm(centred_QD, dim=1)
        # A score is half the squared bound less half the query's squared norm, and it is rounded.
        slack_Q = expansion_error(norm_Q, self.largest_norm, dimension) - short_QE.square().sum(dim=1)
        distances, indices, settled = [], [], []
        for rows, scores in self.table.scores(short_QE):
            query = query_QD[rows]
            first_QC = scores.smallest(min(k + EXTRA_CANDIDATES, size)).indices
            known_Q = rerank(query, self.bank_MD, first_QC, k).distances[:, -1]
            limit_Q = (known_Q.square() + slack_Q[rows]) / 2
            settled_Q = scores.groups_up_to(limit_Q) <= _AFFORDABLE * size
            row_N, index_N = scores.up_to(limit_Q.masked_fill(~settled_Q, -torch.inf))
            found = _nearest_pairs(query, self.bank_MD, first_QC, row_N, index_N, k)
            distances.append(found.distances)
            indices.append(found.indices)
            settled.append(settled_Q)
        return Neighbors(torch.cat(distances), torch.cat(indices)), torch.cat(settled)


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
