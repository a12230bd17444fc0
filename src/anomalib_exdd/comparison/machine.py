"""Description of the machine and the versions that made result files."""

import platform
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("anomalib-exdd", "anomalib", "torch", "torchvision", "timm", "lightning", "faiss-cpu", "faiss-gpu", "numpy")


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
