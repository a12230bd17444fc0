"""Squared distances by one matrix product."""

import torch
from torch import Tensor


def expanded_distances(query_QD: Tensor, point_MD: Tensor, norm_M: Tensor | None = None) -> Tensor:
    """Compute squared distances less the squared norms of the queries, ``|m|^2 - 2 q.m``, shape (Q, M).

    They order the points of each query as distances do. The rounding errors grow with the norms: centre first.
    ``norm_M`` are the squared norms of the points, if they are known; infinite for points that are left out.
    """
    if norm_M is None:
        norm_M = point_MD.square().sum(dim=1)
    return torch.addmm(norm_M, query_QD, point_MD.T, alpha=-2)
