"""Principal axes of a bank, shape (D, P), and vectors compressed to them."""

import threading

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

_SAMPLE = 8192  # entries that the axes are computed from
_SAMPLE_SCALE = 2.0**19  # their largest coordinate as an integer: 8192 squares of it add up exactly in float64
_BLOCK_ROWS = 4096  # vectors compressed at a time: 50 MB at 1536 dimensions
_ONE_THREAD = threading.Lock()  # the number of BLAS threads is the process's: it is changed and restored in turn


def principal_axes(centred_ND: Tensor, residual_variance: float) -> Tensor | None:
    """Find the fewest leading principal axes of a centred bank that leave at most a given share of the variance.

    They are the same for any number of threads: the covariance is a sum of integers, and its eigenvectors are computed
    by one thread, which is fastest at these sizes; by NumPy's, because ``torch.set_num_threads`` would change, for
    good, every thread that meanwhile uses torch for the first time.

    Returns:
        Orthonormal axes, float64, shape (D, P), on the bank's device; ``None`` where they save nothing: if compressed
        vectors had more than D / 2 numbers, if all entries are equal, or on devices without float64.
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


def compress(centred_ND: Tensor, axes_DP: Tensor) -> Tensor:
    """Compute coordinates on orthonormal axes, float64, and as one more the norm of the residual.

    The norm stays the same. In float64, because the residual's squared norm is a small difference of large numbers.

    Returns:
        Float32, shape (N, P + 1).
    """
    blocks = []
    for centred in centred_ND.split(_BLOCK_ROWS):
        exact_ND = centred.double()
        coordinate_NP = exact_ND @ axes_DP
        squared_N1, kept_N1 = (
            torch.linalg.vector_norm(part, dim=1, keepdim=True).square() for part in (exact_ND, coordinate_NP)
        )
        blocks.append(torch.cat([coordinate_NP, (squared_N1 - kept_N1).clamp_min(0).sqrt()], dim=1).float())
    return torch.cat(blocks)
