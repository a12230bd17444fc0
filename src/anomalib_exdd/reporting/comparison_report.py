"""The report of a comparison."""

from pathlib import Path

REPORT_NAME = "report.html"


def write_report(folder: Path) -> Path:
    """Return where the report of a comparison's folder belongs."""
    return folder / REPORT_NAME
