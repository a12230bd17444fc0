"""The runs of a comparison: which are still to do, and doing them, each in a fresh process.

A process of its own measures its own memory, and what kills it, the operating system or a fault in a library, does not
kill the others.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anomalib_exdd.comparison.results import Run, write_json

from .allocation import run_environment
from .progress import PROGRESS_NAME
from .worker import RUN_NAME, SETTINGS_NAME

LOG_NAME = "log.txt"
PROGRAM = """
import sys
from pathlib import Path
import anomalib_exdd
anomalib_exdd.register()
from anomalib_exdd.comparison.worker import main
main(Path(sys.argv[1]))
"""
"""What the process of a run does: it knows the names of this package's classes, whether or not Python told it."""

_PATIENCE = 10  # seconds that an interrupted process has to end by itself


@dataclass(frozen=True)
class PlannedRun:
    """A run to do.

    Attributes:
        folder: Folder of its files.
        place: The same, relative to that of the comparison.
        settings: Everything it depends on: `run`, `data` (fingerprint of the images) and `environment`.
    """

    folder: Path
    place: str
    settings: dict[str, Any]

    @property
    def method(self) -> str:
        """Name of its method."""
        return str(self.settings["run"]["method"])

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.settings["run"]["seed"])

    def finished(self) -> Run | None:
        """Return what an earlier call has finished with the same settings; None if there is nothing, or it failed."""
        run = self._read(RUN_NAME)
        if run is None or run.get("error") or self._read(SETTINGS_NAME) != self.settings:
            return None
        return Run(**run)

    def changes(self) -> list[str]:
        """Name the settings that an earlier run of this folder had otherwise; none if there was no such run."""
        before = self._read(SETTINGS_NAME)
        if before is None or self._read(RUN_NAME) is None:
            return []
        return sorted(_changed(before, self.settings))

    def execute(self) -> "subprocess.Popen[bytes]":
        """Start the process of the run in an emptied folder; its output goes to `log.txt`."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_json(self.settings, self.folder / SETTINGS_NAME)
        paths = os.pathsep.join(path for path in sys.path if path)  # the process finds what this one has found
        with (self.folder / LOG_NAME).open("wb") as log:
            return subprocess.Popen(  # noqa: S603  this Python and the text above
                [sys.executable, "-c", PROGRAM, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, **run_environment()},
            )

    def result(self, returncode: int) -> Run:
        """Read what a process left, or write down why it left nothing."""
        found = self._read(RUN_NAME)
        if found is not None:
            return Run(**found)
        self.clean()
        run = Run(self.method, self.seed, self.place, error=_why(returncode, self.folder / LOG_NAME))
        write_json(asdict(run), self.folder / RUN_NAME)
        return run

    def clean(self) -> None:
        """Remove what a process that was ended left of its training."""
        (self.folder / PROGRESS_NAME).unlink(missing_ok=True)
        for left in self.folder.glob("training-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return content


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process, gently first."""
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait(process: "subprocess.Popen[bytes]", tick: Any) -> int:
    """Wait for a process, calling `tick` all the time.

    Returns:
        Its exit code.
    """
    while process.poll() is None:
        time.sleep(0.2)
        tick()
    return int(process.returncode)


def _why(returncode: int, log: Path) -> str:
    """Say in a line why a process ended without a result."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = ": most likely out of memory" if name == "SIGKILL" else ""
        return f"The process was ended by {name}{hint}."
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"The process ended with code {returncode}: {lines[-1].strip() if lines else 'it said nothing'}"


def _changed(before: Any, now: Any, prefix: str = "") -> list[str]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [prefix.removesuffix(".")]
    return [name for key in {*before, *now} for name in _changed(before.get(key), now.get(key), f"{prefix}{key}.")]
