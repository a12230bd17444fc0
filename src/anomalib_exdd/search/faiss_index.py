"""Exact search through FAISS: ``IndexFlatL2`` on the CPU, its GPU twin where faiss-gpu and a GPU are there.

This is the only file that imports FAISS, because how it is imported decides whether it is fast and sound. The wheels'
OpenBLAS falls back to an SSE kernel on recent x86-64 processors, four to five times slower in ``IndexFlatL2``, unless
``OPENBLAS_CORETYPE`` names a better kernel *before* the library is loaded. And torch has to be imported first, so that
both share one OpenMP runtime.
"""

import logging
import os
import platform
import threading
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module, metadata, util
from types import ModuleType

import torch
from torch import Tensor

from .exact import NeighborIndex, Proposal

FLAVOURS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
OPENBLAS_KERNELS = {"AVX512": "SkylakeX", "AVX2": "Haswell"}
"""Kernel for each of torch's names of what a processor can do."""


class FaissIndex(NeighborIndex):
    """FAISS proposes the candidates; what is returned is computed as for every other index."""

    def build(self, centred_MD: Tensor) -> None:
        """See :meth:`NeighborIndex.build`."""
        faiss = load_faiss()
        device = centred_MD.device
        self._lock = threading.Lock() if device.type == "cuda" else nullcontext()  # one search at a time on a GPU
        self._index = faiss.IndexFlatL2(centred_MD.shape[1])
        if device.type == "cuda":
            if not gpu_search_available():
                msg = f"This FAISS has no GPU support and the model is on {device}. Install `anomalib-exdd[gpu]`."
                raise ValueError(msg)
            self._resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._index)
        elif device.type != "cpu":
            msg = f"FAISS searches on the CPU or CUDA, but the model is on {device}. Use search 'torch'."
            raise ValueError(msg)
        self._index.add(centred_MD.contiguous())

    def candidates(self, centred_QD: Tensor, count: int, excluded_QM: Tensor | None) -> Proposal:
        """See :meth:`NeighborIndex.candidates`."""
        if excluded_QM is not None:
            msg = "FAISS cannot exclude other entries for every query. Use search 'torch'."
            raise ValueError(msg)
        with self._lock:
            squared_QC, index_QC = self._index.search(centred_QD.contiguous(), count)
        squared_Q = squared_QC[:, -1] - self.rounding_error(centred_QD)
        return Proposal(index_QC, squared_Q.clamp_min(0).sqrt())


def faiss_available() -> bool:
    """Tell whether FAISS is installed; an ImportError if two flavours are, which overwrite each other's files."""
    flavours = [name for name in FLAVOURS if any(metadata.distributions(name=name))]
    if len(flavours) > 1:
        msg = (
            f"{' and '.join(flavours)} are installed together, but they overwrite each other's files. "
            f"`pip uninstall {' '.join(flavours)}`, then install one: `anomalib-exdd[cpu]` or `anomalib-exdd[gpu]`."
        )
        raise ImportError(msg)
    return util.find_spec("faiss") is not None


def gpu_search_available() -> bool:
    """Tell whether the installed FAISS can search on a GPU of this machine."""
    faiss = load_faiss()
    # The GPU wheel imports on machines without a GPU as well, so that the count decides, not the class's presence.
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@lru_cache(maxsize=1)
def load_faiss() -> ModuleType:
    """Import FAISS with its fast kernel and with torch tensors as arguments.

    Raises:
        ImportError: If FAISS is not installed, or two flavours of it are.
    """
    if not faiss_available():
        msg = "FAISS is not installed. Install `anomalib-exdd[cpu]` or `anomalib-exdd[gpu]`, or use search 'torch'."
        raise ImportError(msg)
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every kernel that it does not find
    kernel = OPENBLAS_KERNELS.get(torch.backends.cpu.get_cpu_capability())
    if kernel is None or "OPENBLAS_CORETYPE" in os.environ:
        faiss = import_module("faiss")
    else:
        os.environ["OPENBLAS_CORETYPE"] = kernel
        try:
            faiss = import_module("faiss")
        finally:  # the library has read it; other programs need not inherit it
            del os.environ["OPENBLAS_CORETYPE"]
    if platform.system() == "Darwin":  # two OpenMP runtimes in one process crash there
        faiss.omp_set_num_threads(1)
    import_module("faiss.contrib.torch_utils")  # teaches indexes to take torch tensors, without copies
    return faiss
