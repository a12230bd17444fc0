"""A record of what a model said, what people answered and how the model changed, in one SQLite file.

Events are appended and never changed. Every event is on disk when :meth:`Record.add` returns, whatever becomes of the
process then, and several processes may write into one file.
"""

import csv
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from anomalib_exdd.utils.files import write_atomically

from .weights import fingerprint

_TABLE = """CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, action TEXT NOT NULL, model TEXT NOT NULL, path TEXT NOT NULL,
    content TEXT NOT NULL)"""
_COLUMNS = "time, action, model, path, content"


class Event(NamedTuple):
    """One line of the record."""

    time: str  # ISO 8601, UTC
    action: str  # "model", "prediction", "answer", "teach", "teach good" or "forget"
    model: str  # its version: see `model_version`
    path: str  # of the image; of an event "model" the checkpoint
    content: dict[str, Any]  # of a prediction its `PredictionRow`


class Record:
    """An open record; a file that is not there is made.

    Raises:
        ValueError: If the file is something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(_TABLE)
            self._connection.execute(f"SELECT {_COLUMNS} FROM events LIMIT 1")  # noqa: S608  constant
        except sqlite3.DatabaseError as error:
            self._connection.close()
            msg = f"The file {path} is no record of predictions ({error}). Give another path: a new file is made."
            raise ValueError(msg) from error

    def add(self, action: str, model: str, path: str, content: dict[str, Any]) -> None:
        """Append an event; its content is anything that JSON can express."""
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        # Names of files may hold bytes that are no UTF-8; JSON escapes them.
        row = (time, action, model, path.encode(errors="replace").decode(), json.dumps(content, allow_nan=False))
        with self._lock:
            self._connection.execute(f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)", row)  # noqa: S608  constant

    def events(self, *actions: str) -> Iterator[Event]:
        """Yield all events, or those of some actions, the oldest first; those that are added meanwhile are left out."""
        # A connection of its own: it reads one state of the file, in constant memory, and nobody waits for it.
        with closing(sqlite3.connect(self.path)) as reading:
            rows = reading.execute(f"SELECT {_COLUMNS} FROM events ORDER BY id")  # noqa: S608  constant
            for time, action, model, path, content in rows:
                if not actions or action in actions:
                    yield Event(time, action, model, path, json.loads(content))

    def write_csv(self, path: Path) -> None:
        """Write all events as a table, with a column for everything that any of them has; lists are JSON."""
        columns = dict.fromkeys(name for event in self.events() for name in event.content if name != "path")
        with (
            write_atomically(path) as partial,
            partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            table = csv.DictWriter(file, [*Event._fields[:-1], *columns])
            table.writeheader()
            for event in self.events():
                values = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in event.content.items()}
                table.writerow(values | {name: getattr(event, name) for name in Event._fields[:-1]})

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def model_version(module: Any) -> str:
    """Return what tells a state of a model from others: the beginning of the SHA-256 of its weights and banks."""
    return fingerprint(module.state_dict().values())[:12]
