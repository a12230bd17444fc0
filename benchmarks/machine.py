"""Result files of the benchmarks: how they are read and written."""

import json
import statistics
from pathlib import Path
from typing import Any

from anomalib_exdd.comparison.environment import describe, processor
from anomalib_exdd.comparison.report.tables import markdown_table

__all__ = ["describe", "known_results", "markdown_table", "processor", "save_results", "spread"]


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


def spread(values: list[float], digits: int) -> str:
    """Format the mean and the sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
