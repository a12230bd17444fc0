"""The data of a comparison: the same test images for all methods, which nothing else uses."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, ValSplitMode
from tqdm import tqdm

from anomalib_exdd.utils.files import sha256_of_file

from .config import find_class, instantiate, merge, resolve_arguments
from .results import write_csv

DATA_NAME = "data.csv"


class DataImage(NamedTuple):
    """An image of the data, its mask (empty without one), label (1: defective) and split (train, val, test)."""

    image: str
    mask: str
    label: int
    split: str


def resolve_data(shared: Mapping[str, Any], changes: Mapping[str, Any], seed: int, owner: str) -> dict[str, Any]:
    """Return the shared data module with all its arguments: those that the method changes, and the seed of the run.

    A data module within another, such as the real images of `SyntheticDefects`, keeps its own seed.
    """
    arguments = merge(shared.get("init_args") or {}, changes)
    resolved = resolve_arguments(find_class(shared["class_path"], AnomalibDataModule), arguments, owner)
    if "seed" in resolved:
        resolved["seed"] = seed
    return {"class_path": shared["class_path"], "init_args": resolved}


def build_data(data: Mapping[str, Any]) -> AnomalibDataModule:
    """Build a data module from what :func:`resolve_data` returned."""
    return instantiate(find_class(data["class_path"], AnomalibDataModule), data["init_args"])


def without_defective_training_images(datamodule: AnomalibDataModule) -> AnomalibDataModule:
    """Drop defective training images, for models that take every training image for normal."""
    setup = datamodule.setup

    def setup_normal_only(stage: str | None = None) -> None:
        setup(stage)
        samples = datamodule.train_data.samples
        datamodule.train_data.samples = samples[samples["label_index"] == LabelName.NORMAL]

    datamodule.setup = setup_normal_only  # type: ignore[method-assign]
    return datamodule


class DataFiles:
    """Lists the images of data modules and hashes their files, each once."""

    def __init__(self) -> None:
        self._images: dict[str, list[DataImage]] = {}
        self._hashes: dict[str, str] = {"": ""}

    def images(self, data: Mapping[str, Any]) -> list[DataImage]:
        """List the images of a data module, which downloads or generates them first where it does so.

        Raises:
            ValueError: If it validates with test images, or has none to train or test with.
        """
        key = json.dumps(data, sort_keys=True)
        if key not in self._images:
            datamodule = build_data(data)
            datamodule.prepare_data()
            datamodule.setup()
            self._images[key] = _list_images(datamodule, data["class_path"])
        return self._images[key]

    def fingerprint(self, data: Mapping[str, Any]) -> str:
        """Return a SHA-256 over contents, labels and splits of all images of a data module."""
        rows = [
            (image.image, self.sha256(image.image), self.sha256(image.mask), image.label, image.split)
            for image in self.images(data)
        ]
        return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file; empty for no file."""
        if path not in self._hashes:
            self._hashes[path] = sha256_of_file(path)
        return self._hashes[path]

    def write(self, runs: Sequence[Mapping[str, Any]], folder: Path) -> str:
        """Write `data.csv`: every image of runs with its label, hashes and use with each seed; return its SHA-256."""
        splits: dict[tuple[str, str, int], dict[str, str]] = {}
        for run in runs:
            for image in self.images(run["data"]):
                splits.setdefault(image[:3], {})[f"seed_{run['seed']}"] = image.split
        rows = [
            {
                "image": image,
                "mask": mask,
                "label": label,
                "split": "test" if next(iter(used.values())) == "test" else "train",
                "sha256": self.sha256(image),
                "mask_sha256": self.sha256(mask),
                **used,
            }
            for (image, mask, label), used in tqdm(sorted(splits.items()), desc="Hashing the data", disable=None)
        ]
        columns = ["image", "mask", "label", "split", "sha256", "mask_sha256"]
        columns += dict.fromkeys(f"seed_{run['seed']}" for run in runs)
        write_csv(rows, columns, folder / DATA_NAME)
        return sha256_of_file(folder / DATA_NAME)


def test_images(images: Iterable[DataImage]) -> list[str]:
    """Return the paths of the test images, sorted."""
    return sorted(image.image for image in images if image.split == "test")


def counts(images: Sequence[DataImage]) -> dict[str, int]:
    """Count the images by split and label."""
    return {
        f"{name}_{word}": sum(image.split == split and image.label == label for image in images)
        for split, name in (("train", "train"), ("val", "validation"), ("test", "test"))
        for label, word in enumerate(("normal", "defective"))
    }


def _list_images(datamodule: AnomalibDataModule, name: str) -> list[DataImage]:
    found: list[DataImage] = []
    for split in ("train", "val", "test"):
        data = getattr(datamodule, f"{split}_data", None)
        # Anomalib generates such validation images anew every time, in a temporary folder.
        if data is None or (split == "val" and datamodule.val_split_mode == ValSplitMode.SYNTHETIC):
            continue
        samples = data.samples
        masks = samples["mask_path"] if "mask_path" in samples else [""] * len(samples)
        for image, mask, label in zip(samples["image_path"], masks, samples["label_index"], strict=True):
            exists = isinstance(mask, str) and Path(mask).is_file()
            found.append(DataImage(str(image), mask if exists else "", int(label), split))
    tested = set(test_images(found))
    if not tested or not any(image.split == "train" for image in found):
        msg = f"The data {name} have no {'training' if tested else 'test'} images, and a comparison needs both."
        raise ValueError(msg)
    if leaked := sum(image.split != "test" and image.image in tested for image in found):
        msg = (
            f"The data {name} use {leaked} test images for validation or training, so thresholds would know them. Give "
            "`--data.val_split_mode from_train` (or `from_test`)."
        )
        raise ValueError(msg)
    return found
