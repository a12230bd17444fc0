"""Result files: what they say of the machine and the versions that made them, and how they are read and written."""

import json
import platform
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

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
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if info.is_file() and names else platform.processor()


def describe() -> dict[str, str]:
    """Return date, processor, threads, accelerator and package versions."""
    installed = {str(found.metadata["Name"]).lower(): found.version for found in metadata.distributions()}
    versions = {package: installed[package] for package in _PACKAGES if package in installed}
    return {
        "date": date.today().isoformat(),  # noqa: DTZ011  the day where the benchmark runs
        "processor": f"{processor()} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **versions,
    }


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Format rows of equal keys as a Markdown table."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[row[name] for name in header] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def known_results(output: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the results of an interrupted run from its result file, none if there is no such file.

    Args:
        output: Result file without ending.
        settings: What all results of a file have in common.

    Raises:
        SystemExit: If the file has results of other settings.
    """
    if output is None or not output.with_suffix(".json").is_file():
        return []
    content = json.loads(output.with_suffix(".json").read_text())
    if content["settings"] != settings:
        msg = f"{output}.json has results of other settings. Give another --output, or remove the file."
        raise SystemExit(msg)
    found: list[dict[str, Any]] = content["results"]
    return found


def save_results(output: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the results so far; the old file stays until the new one is complete."""
    content = {"machine": describe(), "settings": settings, "results": results}
    partial = output.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(output.with_suffix(".json"))
