"""The choice of a search index by name."""

import logging
import time
from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from .approximate_index import SMALLEST_BANK, ApproximateIndex
from .faiss_loader import faiss_available
from .index import NeighborIndex
from .torch_index import TorchIndex

logger = logging.getLogger(__name__)

SearchBackend = Literal["auto", "torch", "faiss", "approximate"]

_said: set[str] = set()  # messages logged so far: a bank's index is built again whenever the bank moves or changes


def create_index(bank_MD: Tensor, search: SearchBackend = "auto") -> NeighborIndex:
    """Build the search index of a bank on the device where the bank lies, and log what was chosen.

    Args:
        bank_MD: Bank, float32, shape (M, D), M >= 1.
        search: One of

            - ``"torch"``: exact search in torch, by bounds where the bank is large and varies in few directions;
            - ``"faiss"``: exact search through FAISS;
            - ``"auto"``: one of these two: torch, but on a GPU FAISS if its GPU flavour is installed;
            - ``"approximate"``: as ``"torch"``, but the nearest entry is missed now and then (see
              :class:`.ApproximateIndex`); exact where a bank is too small to gain by that.

    Returns:
        An index; all but the approximate one return the same neighbours.

    Raises:
        ValueError: If ``search`` is none of the four, or FAISS cannot search on the bank's device.
        ImportError: If FAISS is asked for and not installed, or two flavours of it are.
    """
    if search not in get_args(SearchBackend):
        msg = f"Argument `search` has to be one of {get_args(SearchBackend)}, but got {search!r}."
        raise ValueError(msg)
    if bank_MD.ndim != 2 or len(bank_MD) == 0:
        msg = f"A bank to search has to be of shape (M, D) with M >= 1, but got {tuple(bank_MD.shape)}."
        raise ValueError(msg)
    start = time.perf_counter()
    chosen, reason = _choose(bank_MD) if search == "auto" else (search, "as asked for")
    index = _INDEXES[chosen](bank_MD)
    message = (
        f"Bank of {bank_MD.shape[0]} x {bank_MD.shape[1]} features on {bank_MD.device}: "
        f"search '{chosen}' ({reason}), {index.description}."
    )
    if search == "auto" and len(bank_MD) >= SMALLEST_BANK:
        message += " Search 'approximate' is faster, and misses the nearest entry now and then."
    if message not in _said:
        _said.add(message)
        logger.info("%s Index built in %.1f s.", message, time.perf_counter() - start)
    return index


def _faiss_index(bank_MD: Tensor) -> NeighborIndex:
    from .faiss_index import FaissIndex  # noqa: PLC0415  FAISS is loaded only by whoever uses it

    return FaissIndex(bank_MD)


_INDEXES: dict[str, Callable[[Tensor], NeighborIndex]] = {
    "torch": TorchIndex,
    "faiss": _faiss_index,
    "approximate": ApproximateIndex,
}


def _choose(bank_MD: Tensor) -> tuple[str, str]:
    """Choose an exact search by device and installation; tell why."""
    device = bank_MD.device.type
    available = faiss_available()  # asked on every device: two flavours of FAISS are a broken installation
    if device == "cpu":
        return "torch", "on a CPU it is as fast as FAISS in small banks and faster in large ones"
    if device != "cuda":
        return "torch", "FAISS cannot search there"
    if not available:
        return "torch", "FAISS is not installed"
    from .faiss_index import gpu_search_available  # noqa: PLC0415

    if gpu_search_available():
        return "faiss", "its GPU flavour is installed"
    return "torch", "the GPU flavour of FAISS is not installed"
