"""The folder of a training's on-disk feature stores: found again after an interruption, removed when done.

Every training has a folder of its own, named by what its features depend on. While it is in use it is locked; the
operating system lifts the lock when the process ends, however it ends. A training of the same name finds the folder and
goes on. Folders that nobody has used for a while are removed, and at once where their space is needed.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_PREFIX = "training-"
_FORGET_AFTER = 7 * 24 * 3600.0  # seconds that an interrupted training can be resumed


def default_folder() -> Path:
    """Return the place of all store folders: the user's cache, which is on disk where /tmp may be memory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "anomalib_exdd" / "feature_stores"


class StoreFolder:
    """A locked folder for the stores of one training.

    Args:
        place: Folder of all store folders.
        identity: What the features depend on; a training of equal identity goes on where this one was interrupted.
        needed: Bytes that the stores will take.

    Attributes:
        path: The folder.

    Raises:
        OSError: If the disk is too small, or the place cannot be written to.
    """

    def __init__(self, place: Path, identity: Mapping[str, Any], needed: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        number = 0
        while True:  # the same training may be running twice
            self.path = place / f"{_PREFIX}{digest}{f'-{number}' if number else ''}"
            self._lock = FileLock(_lock_path(self.path))
            try:
                self._lock.acquire(timeout=0)
                break
            except Timeout:
                number += 1
        _remove_forgotten(place, self.path, _FORGET_AFTER)
        held = _size(self.path)
        free = shutil.disk_usage(place).free + held
        if free < needed:
            _remove_forgotten(place, self.path, 0.0)
            free = shutil.disk_usage(place).free + held
        if free < needed:
            self._lock.release()
            msg = (
                f"Features of the training images take {needed / 1e9:.1f} GB on disk, but {place} has {free / 1e9:.1f} "
                "GB free. Name a folder on a larger disk (`--model.feature_store_dir`), lower `--model.image_size`, or "
                "train on fewer images."
            )
            raise OSError(msg)
        self.path.mkdir(exist_ok=True)
        os.utime(self.path)

    def remove(self) -> None:
        """Remove the folder with all that is in it, and give the lock back."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()
        Path(_lock_path(self.path)).unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lock back and leave the folder as it is, for a training that goes on later."""
        self._lock.release()


def _lock_path(folder: Path) -> str:
    return f"{folder}.lock"


def _remove_forgotten(place: Path, own: Path, age: float) -> None:
    """Remove folders that no process uses and that are older than so many seconds."""
    for folder in place.glob(f"{_PREFIX}*"):
        if folder == own or not folder.is_dir() or time.time() - folder.stat().st_mtime < age:
            continue
        lock = FileLock(_lock_path(folder))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue  # in use
        logger.info("Removing the features of a training that was interrupted: %s", folder)
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(_lock_path(folder)).unlink(missing_ok=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
