"""How the C library hands out large blocks of memory: the same for every run of a comparison.

glibc takes blocks above a threshold from the operating system and gives them back at once; smaller ones it keeps for
later. By itself it moves that threshold up to 32 MiB. A loop that allocates megabytes in every step, such as the
coreset of Anomalib's Patchcore, may then leave a hole in each step that the next block does not fit into, until memory
is full. A fixed threshold prevents that; but fresh memory costs time, so speed is measured as without it.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "MALLOC_MMAP_THRESHOLD_"
THRESHOLD = 1_000_000
"""Bytes from which a block is taken from the operating system, unless the variable says otherwise."""
_LARGEST = 32 << 20  # bytes to which glibc moves the threshold by itself, and at twice as many it gives memory back
_TRIM = 128 << 10  # bytes from which it gives memory back where the threshold is fixed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt


def run_environment() -> dict[str, str]:
    """Return the variable for the process of a run; the user's value where there is one, nothing without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return {}
    return {VARIABLE: os.environ.get(VARIABLE) or str(THRESHOLD)}


def conditions() -> dict[str, str]:
    """Say for the results what :func:`run_environment` sets."""
    value = run_environment().get(VARIABLE)
    if value is None:
        return {}
    speed = f"; {_LARGEST} while speed and latency are measured" if value == str(THRESHOLD) else ""
    return {"memory allocation": f"{VARIABLE}={value} in the process of every run{speed}"}


@contextmanager
def usual_threshold() -> Iterator[None]:
    """Keep freed memory for later, as glibc does by itself, where this process has our threshold."""
    if os.environ.get(VARIABLE) != str(THRESHOLD) or not run_environment():
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    library.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM)
