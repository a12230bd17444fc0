"""What result files say of the machine and the versions that made them, and how they write tables."""

import platform
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = (
    "anomalib-exdd",
    "anomalib",
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
)


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe() -> dict[str, str]:
    """Return date, processor, threads, accelerator and package versions."""
    installed = {str(found.metadata["Name"]).lower(): found.version for found in metadata.distributions()}
    versions = {package: installed[package] for package in _PACKAGES if package in installed}
    return {
        "date": date.today().isoformat(),  # noqa: DTZ011  the day where it runs
        "processor": f"{processor()} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **versions,
    }


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows of equal keys as a Markdown table."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[row[name].replace("|", "\\|") for name in header] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
