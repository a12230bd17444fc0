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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from anomalib_exdd.utils.files import write_file

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
        return self._read(name, 0, rows).float()

    def projected(self, name: str) -> Tensor:
        """Return the projections of an image's patches, float32, shape (P, S)."""
        return self._read(name, 1)

    def positions(self, name: str) -> Tensor:
        """Return the positions of an image's patches, int64, shape (P, 2)."""
        return self._read(name, 2).long()

    @abstractmethod
    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """Keep the patches of an image that is not there yet: features and projections float32, positions int64."""

    @abstractmethod
    def _read(self, name: str, column: int, rows: Tensor | None = None) -> Tensor:
        """Return features, projections or positions (columns 0, 1, 2), in the type in which they are kept."""


class MemoryStore(FeatureStore):
    """Keeps everything in memory, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._images: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """See :meth:`FeatureStore.add`."""
        self._images[name] = (features_PD, projected_PS, position_P2)
        self.lengths[name] = len(features_PD)

    def _read(self, name: str, column: int, rows: Tensor | None = None) -> Tensor:
        values = self._images[name][column]
        return values if rows is None else values[rows]


class DiskStore(FeatureStore):
    """Keeps everything in three files of plain numbers; a fourth lists the images that are complete.

    A store that was interrupted is opened again as it was after its last complete image.

    Args:
        folder: Folder of its own; made if it is not there.
        dimension: Number of features, D.
        projected_dimension: Dimension of the projections, S.
    """

    def __init__(self, folder: Path, dimension: int, projected_dimension: int) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._columns = {  # a row of each file
            folder / "features.f16": np.dtype((np.float16, dimension)),
            folder / "projected.f32": np.dtype((np.float32, projected_dimension)),
            folder / "positions.i32": np.dtype((np.int32, 2)),
        }
        self._index = folder / "images.jsonl"
        self._starts: dict[str, int] = {}
        self._rows = 0
        self._restore()

    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """See :meth:`FeatureStore.add`.

        Raises:
            ValueError: If a feature is beyond the range of half precision.
        """
        half_PD = features_PD.half()
        if not bool(torch.isfinite(half_PD).all()):
            msg = (
                f"A feature of {name} is {float(features_PD.abs().max()):.3g}, beyond the range of half precision, in "
                "which features are kept on disk. Keep them in memory: `--model.feature_store memory`."
            )
            raise ValueError(msg)
        for path, values in zip(self._columns, (half_PD, projected_PS, position_P2.int()), strict=True):
            with path.open("ab") as file:
                file.write(values.numpy().tobytes())
        with self._index.open("a", encoding="utf-8") as file:  # last: what is listed is complete
            file.write(_index_line(name, len(half_PD)))
        self._register(name, len(half_PD))

    def _read(self, name: str, column: int, rows: Tensor | None = None) -> Tensor:
        path, row = [*self._columns.items()][column]
        mapped = np.memmap(path, row, "r", self._starts[name] * row.itemsize, self.lengths[name])
        return torch.from_numpy(np.array(mapped if rows is None else mapped[rows.numpy()]))

    def _register(self, name: str, rows: int) -> None:
        self.lengths[name], self._starts[name] = rows, self._rows
        self._rows += rows

    def _restore(self) -> None:
        """Read the list of complete images, and cut off what was written after them."""
        for path in self._columns:
            path.touch()
        lines = self._index.read_text(encoding="utf-8").splitlines(keepends=True) if self._index.is_file() else []
        held = min(path.stat().st_size // row.itemsize for path, row in self._columns.items())
        for line in lines:
            image = json.loads(line) if line.endswith("\n") else None  # the last may have been interrupted
            if image is None or self._rows + image["rows"] > held:  # a power cut may lose data that is listed already
                break
            self._register(image["name"], image["rows"])
        for path, row in self._columns.items():
            os.truncate(path, self._rows * row.itemsize)
        write_file(self._index, "".join(_index_line(*image) for image in self.lengths.items()))


def _index_line(name: str, rows: int) -> str:
    return json.dumps({"name": name, "rows": rows}) + "\n"


def default_folder() -> Path:
    """Return the place of all store folders: the user's cache, which is on disk where /tmp may be memory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "anomalib_exdd" / "feature_stores"


class StoreFolder:
    """A folder for the stores of one training, named by what its features depend on, and locked while it is used.

    The operating system releases the lock when the process ends, however it ends. A training of the same name finds the
    folder and resumes. Folders that are not used for a while are removed, and at once where their space is needed.

    Args:
        place: Folder of all store folders.
        identity: What the features depend on; a training of equal identity resumes where this one was interrupted.
        needed: Bytes that the stores will take.

    Attributes:
        path: The folder.

    Raises:
        OSError: If the disk is too small, or the place cannot be written to.
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
                f"{self._free(place) / 1e9:.1f} GB free. Name a folder on a larger disk "
                "(`--model.feature_store_dir`), lower `--model.image_size`, or train on fewer images."
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
        """Return how many bytes the stores may take: those that are free, and those that they have already."""
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
