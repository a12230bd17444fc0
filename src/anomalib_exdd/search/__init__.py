"""Exact nearest-neighbour search in a memory bank, in torch or through FAISS."""

import logging
import time
from typing import Literal, get_args

import torch
from torch import Tensor

from .exact import NeighborIndex, Neighbors, dense_search
from .faiss_index import FaissIndex, faiss_available, gpu_search_available
from .torch_index import TorchIndex

__all__ = ["NeighborIndex", "Neighbors", "SearchBackend", "choose_backend", "create_index", "dense_search"]

logger = logging.getLogger(__name__)

SearchBackend = Literal["auto", "torch", "faiss"]

_logged: set[str] = set()  # a bank's index is built again whenever the bank moves or changes


def create_index(bank_MD: Tensor, search: SearchBackend = "auto") -> NeighborIndex:
    """Build the search index of a bank on the device where the bank lies, and log once what was chosen.

    Args:
        bank_MD: Bank, float32, shape (M, D), M >= 1.
        search: "torch", "faiss", or "auto": torch, but on a GPU FAISS if its GPU flavour is installed. All find the
            same neighbours.

    Raises:
        ValueError: If ``search`` is none of these, or FAISS cannot search on the bank's device.
        ImportError: If FAISS is asked for and not installed, or two flavours of it are.
    """
    if search not in get_args(SearchBackend):
        msg = f"Argument `search` has to be one of {get_args(SearchBackend)}, but got {search!r}."
        raise ValueError(msg)
    start = time.perf_counter()
    backend, reason = choose_backend(bank_MD.device) if search == "auto" else (search, "as asked for")
    index = FaissIndex(bank_MD) if backend == "faiss" else TorchIndex(bank_MD)
    size = f"{bank_MD.shape[0]} x {bank_MD.shape[1]}"
    message = f"Bank of {size} features on {bank_MD.device}: search '{backend}' ({reason}), {index.description}."
    if message not in _logged:
        _logged.add(message)
        logger.info("%s Index built in %.1f s.", message, time.perf_counter() - start)
    return index


def choose_backend(device: torch.device) -> tuple[str, str]:
    """Choose "torch" or "faiss" by device and installation, and tell why."""
    available = faiss_available()  # asked on every device: two flavours of FAISS are a broken installation
    if device.type == "cpu":
        return "torch", "on a CPU it is as fast as FAISS in small banks and faster in large ones"
    if device.type != "cuda":
        return "torch", "FAISS cannot search there"
    if not available:
        return "torch", "FAISS is not installed"
    if gpu_search_available():
        return "faiss", "its GPU flavour is installed"
    return "torch", "the GPU flavour of FAISS is not installed"
