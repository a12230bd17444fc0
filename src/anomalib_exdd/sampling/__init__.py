"""Reducing many patch features to a representative few: Gaussian random projection and greedy k-center."""

from .k_center import greedy_k_center
from .projection import gaussian_projection

__all__ = ["gaussian_projection", "greedy_k_center"]
