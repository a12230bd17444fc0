"""The only place where FAISS is imported, because how it is imported decides whether it is fast and sound.

Measured on x86-64 with AVX-512: the wheels' OpenBLAS falls back to an SSE kernel on recent processors, which makes
``IndexFlatL2`` four to five times slower than it can be, unless ``OPENBLAS_CORETYPE`` names a better kernel *before*
the library is loaded. And torch has to be imported first, so that both share one OpenMP runtime.
"""

import logging
import os
import platform
import sys
from functools import lru_cache
from importlib import import_module, metadata, util
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

FLAVOURS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
_KERNEL_OF = {"AVX512": "SkylakeX", "AVX2": "Haswell"}


def installed_flavours() -> list[str]:
    """Return the names of the installed distributions that provide the module ``faiss``."""
    found = []
    for name in FLAVOURS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def faiss_available() -> bool:
    """Tell whether FAISS is installed.

    Raises:
        ImportError: If two flavours are installed, which overwrite each other's files.
    """
    flavours = installed_flavours()
    if len(flavours) > 1:
        listed = " and ".join(flavours)
        msg = (
            f"{listed} are installed together, but they overwrite each other's files. Uninstall all of them "
            f"(`pip uninstall {' '.join(flavours)}`), then install one: `anomalib-exdd[cpu]` or `anomalib-exdd[gpu]`."
        )
        raise ImportError(msg)
    return util.find_spec("faiss") is not None


@lru_cache(maxsize=1)
def load_faiss() -> ModuleType:
    """Import FAISS with its fast kernel and with torch tensors as arguments.

    Returns:
        The module ``faiss``, whose indexes take and return torch tensors.

    Raises:
        ImportError: If FAISS is not installed, or two flavours of it are.
        RuntimeError: In a worker of a data loader, where a forked FAISS can hang.
    """
    if not faiss_available():
        msg = (
            "Argument `search` is 'faiss', but FAISS is not installed. Install `anomalib-exdd[cpu]` or "
            "`anomalib-exdd[gpu]`, or use search 'auto' or 'torch'."
        )
        raise ImportError(msg)
    if torch.utils.data.get_worker_info() is not None:
        msg = "FAISS cannot be used inside a data loader's worker: a search in a forked process can hang."
        raise RuntimeError(msg)
    kernel = (
        _KERNEL_OF.get(torch.backends.cpu.get_cpu_capability()) if platform.machine() in {"x86_64", "AMD64"} else None
    )
    chosen = os.environ.get("OPENBLAS_CORETYPE")
    if "faiss" in sys.modules:
        if kernel and not chosen:
            logger.warning(
                "FAISS was imported before anomalib-exdd and may use a slow matrix kernel. Set the environment "
                "variable OPENBLAS_CORETYPE=%s, or import anomalib_exdd's model first.",
                kernel,
            )
        faiss = sys.modules["faiss"]
    else:
        try:
            if kernel and not chosen:
                os.environ["OPENBLAS_CORETYPE"] = kernel
            logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every kernel that it does not find
            faiss = import_module("faiss")
        finally:
            if kernel and not chosen:  # the library has read it; other programs need not inherit it
                del os.environ["OPENBLAS_CORETYPE"]
    if platform.system() == "Darwin":  # two OpenMP runtimes in one process crash there
        faiss.omp_set_num_threads(1)
    import_module("faiss.contrib.torch_utils")  # teaches indexes to take torch tensors, without copies
    return faiss
