"""The data of a comparison: the same images for all methods, and none of the test images anywhere else."""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, ValSplitMode
from tqdm import tqdm

from anomalib_exdd.utils.files import sha256_of_file, write_atomically

from .classes import build, find_class, merge, resolve_arguments

DATA_NAME = "data.csv"
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DataImage:
    """An image of the data.

    Attributes:
        image: Its path.
        mask: Path of its mask; empty if it has none.
        label: 1 for defective, 0 for normal.
        split: `train`, `val` or `test`.
    """

    image: str
    mask: str
    label: int
    split: str


def resolve_data(shared: Mapping[str, Any], changes: Mapping[str, Any], seed: int, owner: str) -> dict[str, Any]:
    """Return a method's data module with all its arguments.

    Args:
        shared: `class_path` and `init_args` of the comparison.
        changes: Arguments that the method has otherwise.
        seed: Seed of the run, which becomes that of the data module if it has one. A data module within another, as
            the real images of `SyntheticDefects`, keeps its own.
        owner: Whose data it is, for errors.
    """
    arguments = merge(shared.get("init_args") or {}, changes)
    resolved = resolve_arguments(data_class(shared["class_path"]), arguments, set(), owner)
    if "seed" in resolved:
        resolved["seed"] = seed
    return {"class_path": shared["class_path"], "init_args": resolved}


def data_class(class_path: str) -> type:
    """Find a data module by its name."""
    return find_class(class_path, AnomalibDataModule, "anomalib.data")


def build_data(described: Mapping[str, Any]) -> AnomalibDataModule:
    """Build a data module from what :func:`resolve_data` returned."""
    return build(data_class(described["class_path"]), described["init_args"])


def without_defective_training_images(datamodule: AnomalibDataModule) -> AnomalibDataModule:
    """Make a data module train with normal images only, for models that take every training image for normal.

    Validation and test images stay as they are.
    """
    setup = datamodule.setup

    def setup_normal_only(stage: str | None = None) -> None:
        setup(stage)
        data = datamodule.train_data
        normal = np.flatnonzero(data.samples["label_index"] == LabelName.NORMAL)
        if len(normal) < len(data.samples):
            attributes = dict(data.samples.attrs)
            data.subsample(normal.tolist(), inplace=True)
            data.samples.attrs.update(attributes)

    datamodule.setup = setup_normal_only  # type: ignore[method-assign]
    return datamodule


class DataFiles:
    """Lists the images of data modules, and knows the hashes of their files."""

    def __init__(self) -> None:
        self._images: dict[str, list[DataImage]] = {}
        self._hashes: dict[str, str] = {}

    def images(self, described: Mapping[str, Any]) -> list[DataImage]:
        """List the images of a data module, downloading or generating them where it does so.

        Raises:
            ValueError: If it validates with test images, or has none to train or test with.
        """
        key = json.dumps(described, sort_keys=True)
        if key not in self._images:
            datamodule = build_data(described)
            datamodule.prepare_data()
            datamodule.setup()
            self._images[key] = _images_of(datamodule, described["class_path"])
        return self._images[key]

    def fingerprint(self, described: Mapping[str, Any]) -> str:
        """Return the SHA-256 of everything that the images of a data module are: contents, labels and splits."""
        rows = [
            (image.image, self.sha256(image.image), self.sha256(image.mask), image.label, image.split)
            for image in self.images(described)
        ]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file, read once; empty for no file."""
        if not path:
            return ""
        if path not in self._hashes:
            self._hashes[path] = sha256_of_file(path)
        return self._hashes[path]

    def read_all(self, described: Iterable[Mapping[str, Any]]) -> None:
        """Hash the files of data modules, with a progress bar."""
        found = {path for each in described for image in self.images(each) for path in (image.image, image.mask)}
        todo = sorted(path for path in found if path and path not in self._hashes)
        for path in tqdm(todo, desc="Hashing the data", unit="file", disable=len(todo) < 500):
            self.sha256(path)

    def write(self, by_seed: Mapping[int, Sequence[Mapping[str, Any]]], folder: Path) -> str:
        """Write `data.csv`: every image with its label, hashes, and what it is used for with each seed.

        Args:
            by_seed: Data modules of each seed.
            folder: Folder of the comparison.

        Returns:
            SHA-256 of the file.
        """
        rows: dict[str, dict[str, Any]] = {}
        for seed, modules in by_seed.items():
            for image in (image for each in modules for image in self.images(each)):
                row = rows.setdefault(
                    image.image,
                    {
                        "image": image.image,
                        "mask": image.mask,
                        "label": image.label,
                        "split": "test" if image.split == "test" else "train",
                        "sha256": self.sha256(image.image),
                        "mask_sha256": self.sha256(image.mask),
                    },
                )
                row[f"seed_{seed}"] = image.split
        columns = ["image", "mask", "label", "split", "sha256", "mask_sha256", *(f"seed_{seed}" for seed in by_seed)]
        path = folder / DATA_NAME
        with write_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows[image] for image in sorted(rows))
        return sha256_of_file(path)


def test_images(images: Iterable[DataImage]) -> list[str]:
    """Return the paths of the test images, sorted."""
    return sorted(image.image for image in images if image.split == "test")


def counts(images: Sequence[DataImage]) -> dict[str, int]:
    """Count the images by use and label."""
    names = {"train": "train", "val": "validation", "test": "test"}
    return {
        f"{names[split]}_{word}": sum(image.split == split and image.label == label for image in images)
        for split in _SPLITS
        for label, word in enumerate(("normal", "defective"))
    }


def _images_of(datamodule: AnomalibDataModule, name: str) -> list[DataImage]:
    found: list[DataImage] = []
    for split in _SPLITS:
        data = getattr(datamodule, f"{split}_data", None)
        # Anomalib draws such validation images anew every time, into a temporary folder.
        if data is None or (split == "val" and datamodule.val_split_mode == ValSplitMode.SYNTHETIC):
            continue
        samples = data.samples
        masks = samples["mask_path"] if "mask_path" in samples else [""] * len(samples)
        for image, mask, label in zip(samples["image_path"], masks, samples["label_index"], strict=True):
            present = isinstance(mask, str) and bool(mask) and Path(mask).is_file()
            found.append(DataImage(str(image), mask if present else "", int(label), split))
    tested = set(test_images(found))
    if not tested or not any(image.split == "train" for image in found):
        msg = f"The data {name} have no {'training' if tested else 'test'} images, and a comparison needs both."
        raise ValueError(msg)
    leaked = sum(image.split != "test" and image.image in tested for image in found)
    if leaked:
        msg = (
            f"The data {name} use {leaked} test images for validation or training, so thresholds would know them. Give "
            "`--data.val_split_mode from_train` (or `from_test`)."
        )
        raise ValueError(msg)
    return found
