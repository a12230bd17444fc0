"""Projections of features to fewer dimensions, for selections only: at random, or on principal axes."""

import threading

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

_SAMPLE = 8192  # entries that the axes are computed from
_SAMPLE_SCALE = 2.0**19  # their largest coordinate as an integer: 8192 squares of it add up exactly in float64
_ONE_THREAD = threading.Lock()  # the number of BLAS threads is the process's: it is changed and restored in turn


def gaussian_projection(dimension: int, projected: int, seed: int) -> Tensor:
    """Draw the matrix that projects features before the coreset is selected (paper, section 3.2.3).

    The columns are Gaussian directions (Johnson & Lindenstrauss, 1984) of unit length, so that a projected coordinate
    has the scale of the original ones. NumPy draws them, whose streams are the same on every machine.

    Returns:
        Matrix of shape (dimension, projected), float32; the identity if ``dimension`` is not larger, where projecting
        would only lose.
    """
    if dimension <= projected:
        return torch.eye(dimension, dtype=torch.float32)  # trainers in true precision change the default
    matrix = np.random.default_rng(seed).standard_normal((dimension, projected))
    matrix /= np.linalg.norm(matrix, axis=0, keepdims=True)
    return torch.from_numpy(matrix.astype(np.float32))


def principal_axes(centred_ND: Tensor, residual_variance: float) -> Tensor | None:
    """Find the fewest leading principal axes of a centred bank that leave at most a given share of the variance.

    They are the same for any number of threads: the covariance is a sum of integers, and its eigenvectors are computed
    by one thread, which is fastest at these sizes; by NumPy's, because ``torch.set_num_threads`` would change, for
    good, every thread that meanwhile uses torch for the first time.

    Returns:
        Orthonormal axes, float64, shape (D, P), on the bank's device; ``None`` where they save nothing: if P would
        reach D / 2, if all entries are equal, or on devices without float64.
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
    count = int((kept_D < (1 - residual_variance) * kept_D[-1]).sum()) + 1
    if count + 1 > dimension / 2:
        return None
    return axes_DD.flip(1)[:, :count].contiguous().to(centred_ND.device)
