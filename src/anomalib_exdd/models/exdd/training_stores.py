"""Where the patches of training images wait until the coresets are selected: in memory, or on disk in half precision.

Selection works on the projections, which have full precision in both places, so that the same patches are selected.

Shape suffixes: P patches of an image, D features, S dimensions of the projection.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from lightning.pytorch import Callback
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anomalib_exdd.models.weights import fingerprint
from anomalib_exdd.utils.distributed import rank, world_size
from anomalib_exdd.utils.files import write_atomically

logger = logging.getLogger(__name__)

FeatureStoreName = Literal["auto", "memory", "disk"]

MEMORY_LIMIT = 2 * 1024**3  # bytes of features, in all processes together, up to which they stay in memory
KEPT_SECONDS = 7 * 24 * 3600.0  # how long an interrupted training can be resumed, where space is not short
_PREFIX = "training-"


class FeatureStore:
    """Patches of images, by the images' names: in memory as they are, or in a folder with a file for every image.

    A folder that was interrupted has all images that are complete.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.lengths: dict[str, int] = {}  # number of patches of every image
        self._images: dict[str, dict[str, Tensor]] = {}  # those in memory
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.safetensors"):
                with suppress(SafetensorError), safe_open(path, "pt") as file:  # a power cut may have damaged it
                    self.lengths[file.metadata()["name"]] = file.get_slice("positions").get_shape()[0]

    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """Keep the patches of an image that is not there yet: features and projections float32, positions int64."""
        values = {"features": features_PD, "projected": projected_PS, "positions": position_P2}
        file = self._file(name)
        if file is None:
            self._images[name] = values
        else:
            values |= {"features": features_PD.half(), "positions": position_P2.int()}
            with write_atomically(file) as partial:
                save_file(values, partial, {"name": name})
        self.lengths[name] = len(features_PD)

    def features(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return the features of an image's patches, or of some of them, float32, shape (P, D)."""
        return self._read(name, "features", rows).float()

    def projected(self, name: str) -> Tensor:
        """Return the projections of an image's patches, float32, shape (P, S)."""
        return self._read(name, "projected")

    def positions(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return the positions of an image's patches, or of some of them, int64, shape (P, 2)."""
        return self._read(name, "positions", rows).long()

    def _read(self, name: str, column: str, rows: Tensor | None = None) -> Tensor:
        file = self._file(name)
        if file is None:
            values = self._images[name][column]
        else:
            with safe_open(file, "pt") as content:
                values = content.get_tensor(column)  # mapped: only the rows that are used are read
        return values if rows is None else values[rows]

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


class TrainingStores:
    """The stores of one training.

    On disk they are in a folder that is named by what the features depend on, where a training of the same identity
    resumes. It is locked while it is used: the system releases the lock however a process ends. Folders that are not
    used for a while are removed, and at once where their space is needed.

    Args:
        choice: "memory", "disk", or "auto": in memory as long as that takes less than :data:`MEMORY_LIMIT`.
        place: Folder for the folders of stores on disk; None for the user's cache.
        expected_images: Returns the number of training images; called when the first of them comes.
        identity: Returns what their features depend on, for resuming; called if they go to disk.
    """

    def __init__(
        self,
        choice: FeatureStoreName,
        place: str | Path | None = None,
        expected_images: Callable[[], int] = int,
        identity: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        # The cache is on disk where /tmp may be memory.
        cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
        self._place = Path(place or Path(cache, "anomalib_exdd", "feature_stores")).expanduser()
        self._choice = choice
        self._expected_images, self._identity = expected_images, identity
        self._decided = False
        self._folder: Path | None = None
        self._lock: FileLock | None = None

    def open(self, kind: str, patches: int, dimension: int, projected_dimension: int) -> FeatureStore:
        """Open the store of one kind of patches, for so many of them in an image.

        Raises:
            OSError: If the disk has less space than the stores will take.
        """
        if not self._decided:
            self._decided = True
            total = self._expected_images() * patches
            if self._choice == "disk" or (self._choice == "auto" and total * dimension * 4 > MEMORY_LIMIT):
                share = total // world_size() + patches
                self._make_folder(int(share * (2 * dimension + 4 * projected_dimension + 8) * 1.05))
        if self._folder is None:
            return FeatureStore()
        store = FeatureStore(self._folder / kind)
        if store.lengths:
            logger.info("Going on with the %s patches of %d images in %s", kind, len(store.lengths), self._folder)
        return store

    def _make_folder(self, needed: int) -> None:
        """Make and lock a folder for so many bytes."""
        place = self._place
        place.mkdir(parents=True, exist_ok=True)
        identity = {**self._identity(), "process": f"{rank()} of {world_size()}"}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder, number = place / f"{_PREFIX}{digest}", 0
        while (lock := _try_lock(folder)) is None:  # the same training may be running twice
            number += 1
            folder = place / f"{_PREFIX}{digest}-{number}"
        missing = needed - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _remove_unused(place, KEPT_SECONDS)
        if shutil.disk_usage(place).free < missing:
            _remove_unused(place, 0.0)
        if (free := shutil.disk_usage(place).free) < missing:
            lock.release()
            msg = (
                f"Features of the training images take {missing / 1e9:.1f} GB on disk, but {place} has "
                f"{free / 1e9:.1f} GB free. Name a folder on a larger disk: `--model.feature_store_dir`."
            )
            raise OSError(msg)
        folder.mkdir(exist_ok=True)
        os.utime(folder)
        self._folder, self._lock = folder, lock
        size = needed / 1e9
        logger.info("Features (up to %.1f GB) wait on disk in %s, from where the same command goes on.", size, folder)

    def state(self, name: str) -> Path | None:
        """Return the file that keeps the state of a long selection; None if nothing is kept."""
        return None if self._folder is None or world_size() > 1 else self._folder / f"{name}.safetensors"

    def release(self) -> None:
        """Unlock what is on disk, for a training that resumes later."""
        if self._lock is not None:
            self._lock.release()

    def remove(self) -> None:
        """Remove what is on disk."""
        if self._folder is not None and self._lock is not None:
            _remove(self._folder, self._lock)


def _try_lock(folder: Path) -> FileLock | None:
    """Lock a folder; return None if another training uses it."""
    lock = FileLock(f"{folder}.lock")
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock if lock.is_locked else None


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


class ReleaseStores(Callback):
    """Releases the stores of an interrupted training, so that the same process can resume it."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Unlock what is on disk, and empty banks that were built from some of the images only."""
        if pl_module.builder is not None:
            pl_module.builder.stores.release()
            pl_module.clear()


def features_identity(module: Any) -> dict[str, Any]:
    """Describe all that the patches of a training of ``ExDD`` depend on: settings, weights, and the images' files."""
    names = ("layers", "tile_size", "tile_overlap", "positive_patches", "min_coverage", "projected_dimension", "seed")
    identity = {name: module.hparams[name] for name in names}
    extractor = module.model.feature_extractor
    dataset = module.trainer.train_dataloader.dataset
    files = hashlib.sha256()
    for column in ("image_path", "mask_path"):
        for path in sorted(str(path) for path in dataset.samples.get(column, ()) if path):
            status = Path(path).stat() if Path(path).is_file() else None
            files.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return identity | {
        "backbone": extractor.backbone_name,
        "padded": extractor.padded,
        "weights": fingerprint(extractor.state_dict().values()),
        "files": files.hexdigest(),
        "pre_processor": repr(module.pre_processor),
        "augmentations": repr(getattr(dataset, "augmentations", None)),
        "precision": str(module.trainer.precision),
        "white_level": module.white_level,
        "version": metadata.version("anomalib-exdd"),
    }
