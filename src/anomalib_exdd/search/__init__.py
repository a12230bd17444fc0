"""Nearest-neighbour search in a memory bank: one small interface; torch and FAISS exactly, torch approximately too."""

from .exact import Neighbors, dense_search
from .factory import SearchBackend, create_index

__all__ = ["Neighbors", "SearchBackend", "create_index", "dense_search"]
