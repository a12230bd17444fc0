"""The choice of a search index by name."""

from typing import Literal, get_args

from torch import Tensor

from .faiss_loader import faiss_available
from .index import NeighborIndex
from .torch_index import TorchIndex

SearchBackend = Literal["auto", "torch", "faiss"]


def create_index(bank_MD: Tensor, search: SearchBackend = "auto") -> NeighborIndex:
    """Build the search index of a bank on the device where the bank lies.

    Args:
        bank_MD: Bank, float32, shape (M, D), M >= 1.
        search: ``"torch"``, ``"faiss"``, or ``"auto"``: FAISS on the CPU if it is installed; on a GPU FAISS if its GPU
            flavour is installed, else torch; torch on every other device.

    Returns:
        An index; all of them return the same neighbours.

    Raises:
        ValueError: If ``search`` is none of the three, or FAISS cannot search on the bank's device.
        ImportError: If FAISS is asked for and not installed, or two flavours of it are.
    """
    if search not in get_args(SearchBackend):
        msg = f"Argument `search` has to be one of {get_args(SearchBackend)}, but got {search!r}."
        raise ValueError(msg)
    if bank_MD.ndim != 2 or len(bank_MD) == 0:
        msg = f"A bank to search has to be of shape (M, D) with M >= 1, but got {tuple(bank_MD.shape)}."
        raise ValueError(msg)
    if search == "torch" or (search == "auto" and not _faiss_serves(bank_MD)):
        return TorchIndex(bank_MD)
    from .faiss_index import FaissIndex  # noqa: PLC0415  FAISS is loaded only by whoever uses it

    return FaissIndex(bank_MD)


def _faiss_serves(bank_MD: Tensor) -> bool:
    """Tell whether FAISS is installed and can search where the bank lies."""
    if bank_MD.device.type not in {"cpu", "cuda"} or not faiss_available():
        return False
    if bank_MD.device.type == "cpu":
        return True
    from .faiss_index import gpu_search_available  # noqa: PLC0415

    return gpu_search_available()
