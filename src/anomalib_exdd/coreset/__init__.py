"""Reducing many patch features to a representative few: where they wait, how they are projected and selected."""

from .feature_store import DiskStore, FeatureStore, MemoryStore
from .k_center import Shard, greedy_k_center
from .projection import gaussian_projection
from .store_folder import StoreFolder, default_folder

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
