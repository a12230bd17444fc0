"""Random projection of features to fewer dimensions, for selections only."""

import numpy as np
import torch
from torch import Tensor


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
