"""Coreset selection: how features are projected, and which of them are kept."""

from .k_center import Shard, gaussian_projection, greedy_k_center

__all__ = ["Shard", "gaussian_projection", "greedy_k_center"]
