"""Execute the runs of a comparison one after another, each in a process of its own, unless they are finished.

Every process measures its own memory, and one that is killed leaves the other runs alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .environment import run_environment
from .progress import PROGRESS_NAME, read_progress
from .results import Run, write_json
from .worker import RUN_NAME, SETTINGS_NAME, save_run

LOG_NAME = "log.txt"
WORKER = ("-m", "anomalib_exdd.comparison.worker")
"""Arguments of Python that start the process of a run."""
_INTERVAL = 0.2  # seconds between two looks at the process
_PATIENCE = 10  # seconds that a process has to end after SIGTERM


@dataclass(frozen=True)
class PlannedRun:
    """A run to execute."""

    folder: Path  # of its files
    settings: dict[str, Any]  # all it depends on: `run`, `data` (fingerprint of the images), `environment`, as JSON

    def __str__(self) -> str:
        """Return method and seed."""
        return f"{self.settings['run']['method']}, seed {self.settings['run']['seed']}"

    def finished(self) -> Run | None:
        """Return the result of an earlier call with the same settings; None without one, or if it failed."""
        run = self._read(RUN_NAME)
        return Run(**run) if run and not run["error"] and not self.changes() else None

    def changes(self) -> list[str]:
        """Name the settings that differ from those of an earlier run in this folder; empty without one."""
        before = self._read(SETTINGS_NAME)
        return sorted(changed(before, self.settings)) if before and self._read(RUN_NAME) else []

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the process of the run in an emptied folder; its output goes to `log.txt`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_json(self.settings, self.folder / SETTINGS_NAME)
        paths = os.pathsep.join(path for path in sys.path if path)  # the process imports from where this one does
        with (self.folder / LOG_NAME).open("wb") as log:
            return subprocess.Popen(  # noqa: S603  this Python and our module
                [sys.executable, *WORKER, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": paths, **run_environment()},
            )

    def result(self, returncode: int) -> Run:
        """Read the result of a process that has ended, or write why there is none."""
        if found := self._read(RUN_NAME):
            return Run(**found)
        self.clean()
        return save_run(self.folder, self.settings["run"], error=_reason(returncode, self.folder / LOG_NAME))

    def clean(self) -> None:
        """Remove what a killed process has left of its training."""
        (self.folder / PROGRESS_NAME).unlink(missing_ok=True)
        for left in self.folder.glob("training-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def execute_all(planned: Sequence[PlannedRun], finished: list[Run]) -> None:
    """Execute the runs that are not finished, with a progress bar.

    `finished` gets the results as they come, so that the caller has them after an interruption.
    """
    known = [run.finished() for run in planned]
    finished += [run for run in known if run is not None]
    if finished:
        print(f"{len(finished)} of {len(planned)} runs are there already and are kept.")
    bar = tqdm(
        total=len(planned),
        initial=len(finished),
        smoothing=0,
        mininterval=1 if sys.stderr.isatty() else 60,  # seconds; a file keeps every state of the bar
        miniters=0,
        bar_format="{desc}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )
    with bar:
        for run in (run for run, result in zip(planned, known, strict=True) if result is None):
            if changes := run.changes():
                bar.write(f"{run}: run again, because of {', '.join(changes)}.")
            bar.set_description(str(run))
            process = run.start()
            try:
                while process.poll() is None:
                    time.sleep(_INTERVAL)
                    bar.set_postfix_str(read_progress(run.folder), refresh=False)
                    bar.update(0)
            except BaseException:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
                process.kill()
                run.clean()
                raise
            bar.set_postfix_str("", refresh=False)
            finished.append(run.result(process.returncode))
            bar.write(str(finished[-1]))
            bar.update()


def changed(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Name the settings that differ in two nested mappings, such as `run.seed`."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [prefix.removesuffix(".")]
    return [name for key in {*before, *now} for name in changed(before.get(key), now.get(key), f"{prefix}{key}.")]


def _reason(returncode: int, log: Path) -> str:
    """Explain in a line why a process ended without a result."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return f"The process was ended by {name}{': most likely out of memory' if name == 'SIGKILL' else ''}."
    said = log.read_text(encoding="utf-8", errors="replace").strip() or "it said nothing"
    return f"The process ended with code {returncode}: {said.splitlines()[-1]}"
