"""Exact search through FAISS: ``IndexFlatL2`` on the CPU, its GPU twin where faiss-gpu and a GPU are there."""

import threading
from contextlib import nullcontext

import torch
from torch import Tensor

from .exact import Neighbors
from .faiss_loader import load_faiss
from .index import NeighborIndex


class FaissIndex(NeighborIndex):
    """FAISS proposes the candidates; what is returned is computed as for every other index.

    On a GPU the index lives on the bank's device and takes torch's tensors on torch's current stream. On the CPU the
    tensors' memory is shared with FAISS, nothing is copied.

    Raises:
        ImportError: If FAISS is not installed, or two flavours of it are.
        ValueError: If the bank lies on a device that this FAISS cannot search.
    """

    def build(self, centred_MD: Tensor) -> None:
        """See :meth:`NeighborIndex.build`."""
        faiss = load_faiss()
        self._alone = threading.Lock()  # an index on a GPU takes one search at a time
        device = centred_MD.device
        index = faiss.IndexFlatL2(centred_MD.shape[1])
        if device.type == "cuda":
            if not gpu_search_available():
                msg = (
                    "Argument `search` is 'faiss', but the installed FAISS has no GPU support and the model is on "
                    f"{device}. Install the extra `gpu` instead of `cpu`, or use search 'auto' or 'torch'."
                )
                raise ValueError(msg)
            self._resources = faiss.StandardGpuResources()
            index = faiss.index_cpu_to_gpu(self._resources, device.index or 0, index)
        elif device.type != "cpu":
            msg = f"FAISS searches on the CPU or CUDA, but the model is on {device}. Use search 'torch'."
            raise ValueError(msg)
        index.add(centred_MD.contiguous())
        self._index = index

    def candidates(self, query_QD: Tensor, count: int) -> Neighbors:
        """See :meth:`NeighborIndex.candidates`."""
        if len(query_QD) == 0:
            return Neighbors(query_QD.new_empty(0, count), query_QD.new_empty(0, count, dtype=torch.int64))
        with self._alone if query_QD.device.type == "cuda" else nullcontext():
            squared_QC, index_QC = self._index.search(query_QD.contiguous(), count)
        return Neighbors(squared_QC, index_QC)


def gpu_search_available() -> bool:
    """Tell whether the installed FAISS can search on a GPU of this machine."""
    faiss = load_faiss()
    # The GPU wheel imports on machines without a GPU as well, so that the count decides, not the class's presence.
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
