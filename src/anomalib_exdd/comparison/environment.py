"""What results depend on besides settings and data: machine, versions, and memory allocation.

glibc returns memory blocks above a threshold to the operating system at once and keeps smaller ones for later. It
raises that threshold itself, up to 32 MiB. A loop that allocates megabytes in every step, such as the coreset of
Anomalib's Patchcore, may then leave a gap per step that the next block does not fit into, until memory is full. The
processes of all runs therefore train with a fixed threshold; but fresh memory costs time, so speed is measured after
it, as with glibc's own.
"""

import ctypes
import os
import platform
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("anomalib-exdd", "anomalib", "torch", "torchvision", "timm", "lightning", "faiss-cpu", "faiss-gpu", "numpy")
VARIABLE = "MALLOC_MMAP_THRESHOLD_"
THRESHOLD = 1_000_000
"""Bytes from which a block is returned at once, unless the variable is set already."""
_LARGEST = 32 << 20  # bytes to which glibc raises the threshold; at twice as many it returns kept memory
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt


def describe() -> dict[str, str]:
    """Return date, processor, threads, accelerator and package versions."""
    installed = {str(found.metadata["Name"]).lower(): found.version for found in metadata.distributions()}
    return {
        "date": date.today().isoformat(),  # noqa: DTZ011  the day where it runs
        "processor": f"{processor()} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{package: installed[package] for package in PACKAGES if package in installed},
    }


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def run_environment() -> dict[str, str]:
    """Return the environment variable for the process of a run; nothing without glibc."""
    return {VARIABLE: os.environ.get(VARIABLE) or str(THRESHOLD)} if platform.libc_ver()[0] == "glibc" else {}


def describe_allocation() -> dict[str, str]:
    """Describe the effect of :func:`run_environment` for the results."""
    value = run_environment().get(VARIABLE)
    speed = f"; {_LARGEST} while speed and latency are measured" if value == str(THRESHOLD) else ""
    return {"memory allocation": f"{VARIABLE}={value} in the process of every run{speed}"} if value else {}


def keep_freed_memory() -> None:
    """Let glibc keep freed memory from now on, as it does by default, if this process has our threshold."""
    if os.environ.get(VARIABLE) == str(THRESHOLD) and run_environment():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)
