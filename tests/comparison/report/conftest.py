"""Fixtures for the tests of reports."""

from pathlib import Path

import pytest

from anomalib_exdd.comparison.report import write_report
from made_up_comparison import make_comparison
from page_tree import Element, read_page


@pytest.fixture(scope="session")
def comparison_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of four methods over two seeds, one of them failed, with its report; only to be read."""
    folder = make_comparison(tmp_path_factory.mktemp("made_up"))
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def report(comparison_folder: Path) -> Element:
    """The page of that report."""
    return read_page((comparison_folder / "report.html").read_text(encoding="utf-8"))
