"""Where the features of a training wait for the selection of the coresets."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback

from anomalib_exdd.coreset import DiskStore, FeatureStore, MemoryStore, StoreFolder, default_folder
from anomalib_exdd.models.weights import fingerprint
from anomalib_exdd.utils.distributed import rank, world_size

logger = logging.getLogger(__name__)

FeatureStoreName = Literal["auto", "memory", "disk"]

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of features, in all processes together, up to which they stay in memory."""


class TrainingStores:
    """The stores of one training.

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
        self._choice, self._place = choice, place
        self._expected_images, self._identity = expected_images, identity
        self._decided = False
        self._folder: StoreFolder | None = None

    def open(self, kind: str, patches: int, dimension: int, projected_dimension: int) -> FeatureStore:
        """Open the store of one kind of patches, for so many of them in an image."""
        if not self._decided:
            self._decided = True
            self._decide(patches, dimension, projected_dimension)
        if self._folder is None:
            return MemoryStore()
        store = DiskStore(self._folder.path / kind)
        if store.lengths:
            logger.info("Going on with the %s patches of %d images in %s", kind, len(store.lengths), self._folder.path)
        return store

    def _decide(self, patches: int, dimension: int, projected_dimension: int) -> None:
        """Make a folder on disk if the features go there."""
        total = self._expected_images() * patches
        if self._choice == "memory" or (self._choice == "auto" and total * dimension * 4 <= MEMORY_LIMIT):
            return
        share = total // world_size() + patches
        needed = int(share * (2 * dimension + 4 * projected_dimension + 8) * 1.05)
        place = default_folder() if self._place is None else Path(self._place).expanduser()
        self._folder = StoreFolder(place, {**self._identity(), "process": f"{rank()} of {world_size()}"}, needed)
        logger.info(
            "Features of the training images (up to %.1f GB) wait on disk in %s until training ends. If it is "
            "interrupted, the same command goes on from there.",
            *(needed / 1e9, self._folder.path),
        )

    def state(self, name: str) -> Path | None:
        """Return the file that keeps the state of a long selection; None if nothing is kept."""
        return None if self._folder is None or world_size() > 1 else self._folder.path / f"{name}.safetensors"

    def release(self) -> None:
        """Unlock what is on disk, for a training that resumes later."""
        if self._folder is not None:
            self._folder.release()

    def remove(self) -> None:
        """Remove what is on disk."""
        if self._folder is not None:
            self._folder.remove()


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
    identity = {name: getattr(module.settings, name) for name in names}
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
