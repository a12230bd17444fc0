"""Fixtures for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, find_browser

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process for every core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder beside the repository with real images and weights; skips the test where there is none."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: real images and weights are needed")
    return SHARED


@pytest.fixture(scope="module")  # Playwright's event loop is that of the thread while it runs
def browser() -> Iterator[Browser]:
    """A real browser; skips the test where none is installed."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed: pages are not looked at")
    started = Browser(program)
    yield started
    started.close()


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small version of the generated surfaces: 12 normal and 16 defective training, 3 and 3 test images."""
    from anomalib_exdd.data.surfaces import generate_sample  # noqa: PLC0415  only tests that train pay for the import

    root = tmp_path_factory.mktemp("sample") / "surfaces"
    generate_sample(root, train=(12, 16), test=(3, 3))
    return root
