"""The few directions in which a bank varies, and vectors shortened to them.

A *short* vector has the coordinates on the leading principal axes of the bank and, as one number more, the norm of the
rest. Its norm is that of the whole vector.

Shape suffixes: N vectors, D feature dimension, P principal axes.
"""

import threading

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

GRID = 2048
"""Steps of the grid in the largest norm of a bank's short vectors: products of two still add up exactly in float32."""

_SAMPLE = 8192  # entries that the axes are computed from
_SAMPLE_SCALE = 2.0**19  # their largest coordinate as an integer: 8192 squares of it add up exactly in float64
_FINER = 2.0**10  # inner steps in a step of the grid
_AXIS_SCALE = 2.0**20  # an axis' largest possible coordinate as an integer
_ONE_THREAD = threading.Lock()  # the number of BLAS threads is the process's: it is changed and restored in turn
_BLOCK_ROWS = 4096  # vectors shortened at a time: 50 MB at 1536 dimensions


def principal_axes(centred_ND: Tensor, largest_rest: float) -> Tensor | None:
    """Find the fewest leading principal axes that leave at most a given share of the variance.

    The same bank gives the same axes on one machine, whatever the number of threads: the covariance is a sum of
    integers, and its eigenvectors are computed by one thread (which is also the fastest way at these sizes). That is
    NumPy's, because ``torch.set_num_threads`` would also count for every thread that meanwhile uses torch for the first
    time, and for good.

    Args:
        centred_ND: Centred bank, float32, shape (N, D).
        largest_rest: Largest share of the variance outside of the axes, between 0 and 1.

    Returns:
        Orthonormal axes, float64, shape (D, P), on the bank's device; ``None`` where they would not help: if short
        vectors were longer than half the feature dimension, if all entries are the same, and where there may be no
        float64.
    """
    dimension = centred_ND.shape[1]
    if centred_ND.device.type not in {"cpu", "cuda"}:
        return None
    sample_ND = centred_ND[:: -(-len(centred_ND) // _SAMPLE)].to("cpu", torch.float64)
    largest = float(sample_ND.abs().max())
    if not 0 < largest < float("inf"):
        return None
    sample_ND = (sample_ND * (_SAMPLE_SCALE / largest)).round_()
    covariance_DD = (sample_ND.T @ sample_ND).numpy()
    with _ONE_THREAD, threadpool_limits(1, user_api="blas"):
        variance_D, axes_DD = map(torch.from_numpy, np.linalg.eigh(covariance_DD))
    kept_D = variance_D.flip(0).cumsum(0)
    count = int((kept_D < (1 - largest_rest) * kept_D[-1]).sum()) + 1
    if count + 1 > dimension / 2:
        return None
    return axes_DD.flip(1)[:, :count].contiguous().to(centred_ND.device)


def shorten(centred_ND: Tensor, axes_DP: Tensor) -> Tensor:
    """Compute short vectors.

    Float64 inside: the squared norm of the rest is a small difference of large numbers.

    Args:
        centred_ND: Centred vectors, float32, shape (N, D).
        axes_DP: Orthonormal axes, float64, shape (D, P).

    Returns:
        Coordinates on the axes and norm of the rest, float32, shape (N, P + 1).
    """
    blocks = []
    for centred in centred_ND.split(_BLOCK_ROWS):
        exact_ND = centred.double()
        head_NP = exact_ND @ axes_DP
        squared_N1, head_squared_N1 = (
            torch.linalg.vector_norm(part, dim=1, keepdim=True).square() for part in (exact_ND, head_NP)
        )
        blocks.append(torch.cat([head_NP, (squared_N1 - head_squared_N1).clamp_min(0).sqrt()], dim=1).float())
    return torch.cat(blocks)


def shorten_on_grid(centred_ND: Tensor, axes_DP: Tensor, step: float) -> Tensor:
    """Compute short vectors in whole steps of a grid, to the same bit by any library, thread or batch.

    Rounding makes the sums of a matrix product depend on their order, hence on all of these. Here all factors are
    integers, and so small that float64 holds every sum exactly.

    Args:
        centred_ND: Centred vectors, float32, shape (N, D). Exact for norms up to ``2 * GRID * step``.
        axes_DP: Orthonormal axes, float64, shape (D, P).
        step: Length of a step.

    Returns:
        Coordinates on the axes and norm of the rest in steps, integers as float32, shape (N, P + 1).
    """
    axes_DP = (axes_DP * _AXIS_SCALE).round()
    blocks = []
    for centred in centred_ND.split(_BLOCK_ROWS):
        inner_ND = (centred.double() * (_FINER / step)).round_()
        head_NP = (inner_ND @ axes_DP).div_(_AXIS_SCALE).round_()
        squared_N1, head_squared_N1 = ((part * part).sum(dim=1, keepdim=True) for part in (inner_ND, head_NP))
        rest_N1 = (squared_N1 - head_squared_N1).clamp_min_(0).sqrt_()
        blocks.append((torch.cat([head_NP, rest_N1], dim=1) / _FINER).round_().float())
    return torch.cat(blocks)
