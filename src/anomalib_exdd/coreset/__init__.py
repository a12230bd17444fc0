"""Coreset selection: where patch features wait for it, how they are projected, and which of them are kept."""

from .feature_store import DiskStore, FeatureStore, MemoryStore, StoreFolder, default_folder
from .k_center import Shard, greedy_k_center
from .projection import gaussian_projection

__all__ = [
    "DiskStore",
    "FeatureStore",
    "MemoryStore",
    "Shard",
    "StoreFolder",
    "default_folder",
    "gaussian_projection",
    "greedy_k_center",
]
