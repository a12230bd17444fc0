"""Gaussian random projection (Johnson & Lindenstrauss, 1984), used for selection only."""

import numpy as np
import torch
from torch import Tensor


def gaussian_projection(dimension: int, projected: int, seed: int) -> Tensor:
    """Draw the matrix that projects features before the coreset is selected (paper, section 3.2.3).

    The columns are Gaussian directions of unit length, so that a projected coordinate has the scale of the original
    ones. NumPy draws them, whose streams are the same on every machine.

    Args:
        dimension: Feature dimension D.
        projected: Dimension to project to, d*.
        seed: Seed of the draw.

    Returns:
        Matrix of shape (D, d*), float32; the identity of shape (D, D) if D <= d*, where projecting would only lose.
    """
    if dimension <= projected:
        return torch.eye(dimension, dtype=torch.float32)  # trainers in true precision change the default
    matrix = np.random.default_rng(seed).standard_normal((dimension, projected))
    matrix /= np.linalg.norm(matrix, axis=0, keepdims=True)
    return torch.from_numpy(matrix.astype(np.float32))
