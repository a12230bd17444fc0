"""Exact search in plain torch, on any device."""

import torch
from torch import Tensor

from .exact import Neighbors
from .index import NeighborIndex

_BLOCK_ELEMENTS = 1 << 22  # distances held at once: 16 MiB, so that a block stays near the cache


class TorchIndex(NeighborIndex):
    """Brute force by blocks of queries: one matrix product and one top-k each."""

    def __init__(self, bank_MD: Tensor) -> None:
        super().__init__(bank_MD)
        self.half_norm_M = self.centred_MD.square().sum(dim=1) / 2

    def candidates(self, query_QD: Tensor, count: int) -> Neighbors:
        """See :meth:`NeighborIndex.candidates`."""
        rows = max(1, _BLOCK_ELEMENTS // len(self.half_norm_M))
        squared, indices = [], []
        for query in query_QD.split(rows):
            half = torch.addmm(self.half_norm_M, query, self.centred_MD.T, alpha=-1)
            nearest = half.topk(count, dim=1, largest=False, sorted=True)
            squared.append(2 * nearest.values + query.square().sum(dim=1, keepdim=True))
            indices.append(nearest.indices)
        if not indices:
            return Neighbors(query_QD.new_empty(0, count), query_QD.new_empty(0, count, dtype=torch.int64))
        return Neighbors(torch.cat(squared), torch.cat(indices))
