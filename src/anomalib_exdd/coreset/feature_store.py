"""Where the patches of training images wait until the coreset is selected: in memory, or on disk in half precision.

Selection works on the projections, which have full precision in both places, so that the same patches are selected.

Shape suffixes: P patches of an image, D features, S dimensions of the projection.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anomalib_exdd.utils.files import write_atomically

logger = logging.getLogger(__name__)

KEPT_SECONDS = 7 * 24 * 3600.0  # how long an interrupted training can be resumed, where space is not short
_PREFIX = "training-"


class FeatureStore(ABC):
    """Patches of images, by the images' names."""

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}  # number of patches of every image

    def __contains__(self, name: str) -> bool:
        """Tell whether an image is there."""
        return name in self.lengths

    def features(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return the features of an image's patches, or of some of them, float32, shape (P, D)."""
        return self._read(name, "features", rows).float()

    def projected(self, name: str) -> Tensor:
        """Return the projections of an image's patches, float32, shape (P, S)."""
        return self._read(name, "projected")

    def positions(self, name: str) -> Tensor:
        """Return the positions of an image's patches, int64, shape (P, 2)."""
        return self._read(name, "positions").long()

    @abstractmethod
    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """Keep the patches of an image that is not there yet: features and projections float32, positions int64."""

    @abstractmethod
    def _read(self, name: str, column: str, rows: Tensor | None = None) -> Tensor:
        """Return "features", "projected" or "positions", in the type in which they are kept."""


class MemoryStore(FeatureStore):
    """Keeps everything in memory, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._images: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """See :meth:`FeatureStore.add`."""
        self._images[name] = {"features": features_PD, "projected": projected_PS, "positions": position_P2}
        self.lengths[name] = len(features_PD)

    def _read(self, name: str, column: str, rows: Tensor | None = None) -> Tensor:
        values = self._images[name][column]
        return values if rows is None else values[rows]


class DiskStore(FeatureStore):
    """Keeps every image in a file of its own; a store that was interrupted has all images that are complete."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.safetensors"):
            with suppress(SafetensorError), safe_open(path, "pt") as file:  # a power cut may have damaged it
                self.lengths[file.metadata()["name"]] = file.get_slice("positions").get_shape()[0]

    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """See :meth:`FeatureStore.add`; a ValueError if a feature is beyond the range of half precision."""
        half_PD = features_PD.half()
        if not bool(torch.isfinite(half_PD).all()):
            largest = float(features_PD.abs().max())
            msg = f"A feature of {name} is {largest:.3g}, too large for the disk: use `--model.feature_store memory`."
            raise ValueError(msg)
        values = {"features": half_PD, "projected": projected_PS, "positions": position_P2.int()}
        with write_atomically(self._path(name)) as partial:
            save_file({column: value.contiguous() for column, value in values.items()}, partial, {"name": name})
        self.lengths[name] = len(half_PD)

    def _read(self, name: str, column: str, rows: Tensor | None = None) -> Tensor:
        with safe_open(self._path(name), "pt") as file:
            values: Tensor = file.get_tensor(column)  # mapped: only the rows that are used are read
        return values if rows is None else values[rows]

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


def default_folder() -> Path:
    """Return the place of all store folders: the user's cache, which is on disk where /tmp may be memory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "anomalib_exdd" / "feature_stores"


class StoreFolder:
    """A folder for the stores of one training, named by what its features depend on, and locked while it is used.

    A training of the same identity resumes there: the system releases the lock however a process ends. Folders that are
    not used for a while are removed, and at once where their space is needed.

    Args:
        place: Folder of all store folders.
        identity: What the features depend on.
        needed: Bytes that the stores will take; an OSError if the disk has less.
    """

    def __init__(self, place: Path, identity: Mapping[str, Any], needed: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path = place / f"{_PREFIX}{digest}"
        number = 0
        while (lock := _try_lock(self.path)) is None:  # the same training may be running twice
            number += 1
            self.path = place / f"{_PREFIX}{digest}-{number}"
        self._lock = lock
        _remove_unused(place, KEPT_SECONDS)
        if self._free(place) < needed:
            _remove_unused(place, 0.0)
        if self._free(place) < needed:
            self.release()
            msg = (
                f"Features of the training images take {needed / 1e9:.1f} GB on disk, but {place} has "
                f"{self._free(place) / 1e9:.1f} GB free. Name a folder on a larger disk: `--model.feature_store_dir`."
            )
            raise OSError(msg)
        self.path.mkdir(exist_ok=True)
        os.utime(self.path)

    def remove(self) -> None:
        """Remove the folder with all that is in it, and release the lock."""
        _remove(self.path, self._lock)

    def release(self) -> None:
        """Release the lock and leave the folder as it is, for a training that resumes later."""
        self._lock.release()

    def _free(self, place: Path) -> int:
        """Return how many bytes are free for the stores, with those that they have already."""
        held = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        return shutil.disk_usage(place).free + held


def _try_lock(folder: Path) -> FileLock | None:
    """Lock a folder; return None if another training uses it."""
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def _remove_unused(place: Path, age: float) -> None:
    """Remove folders that no training uses and that are older than so many seconds."""
    for folder in place.glob(f"{_PREFIX}*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime >= age and (lock := _try_lock(folder)):
            logger.info("Removing the features of a training that was interrupted: %s", folder)
            _remove(folder, lock)
