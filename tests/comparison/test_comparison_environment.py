"""The process of every run gets the same threshold for large allocations, and measures speed without it."""

import json
import platform
import sys
from pathlib import Path

import pytest

from anomalib_exdd.comparison import environment, scheduler
from anomalib_exdd.comparison.environment import THRESHOLD, VARIABLE, describe_allocation, run_environment
from anomalib_exdd.comparison.scheduler import LOG_NAME, PlannedRun

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the threshold is glibc's")


def said_by_run(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> str:
    """Start the process of a run with another program, and return what it said."""
    monkeypatch.setattr(scheduler, "WORKER", ("-c", program))
    process = PlannedRun(folder, {"run": {"method": "x", "seed": 0}}).start()
    assert process.wait(100) == 0
    return (folder / LOG_NAME).read_text()


@GLIBC
@pytest.mark.parametrize(("given", "expected"), [(None, str(THRESHOLD)), ("5000000", "5000000")])
def test_every_process_gets_the_threshold_but_a_user_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    program = f"import json, os; print(json.dumps(os.environ[{VARIABLE!r}]))"
    for method in ("one", "other"):
        assert json.loads(said_by_run(tmp_path / method, monkeypatch, program)) == expected
    (words,) = describe_allocation().values()
    assert words.startswith(f"{VARIABLE}={expected} in the process of every run")
    assert ("while speed and latency are measured" in words) == (given is None)


def test_other_c_libraries_have_no_such_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "libc_ver", lambda: ("", ""))
    assert run_environment() == describe_allocation() == {}


# A block of 8 MB is freed between two others: the C library keeps it for later, or gives it back.
PROGRAM = """
import ctypes
from anomalib_exdd.comparison.environment import keep_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def kept():
    before = resident()
    block = library.malloc(8_000_000)
    library.memset(block, 1, 8_000_000)
    library.free(block)
    return resident() - before > 4_000_000

print(kept())
keep_freed_memory()
print(kept())
"""


@GLIBC
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("given", [None, "5000000"])
def test_freed_memory_is_kept_while_speed_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    said = said_by_run(tmp_path / "run", monkeypatch, PROGRAM)
    assert said.split() == ["False", str(given is None)]  # what a user sets holds everywhere
