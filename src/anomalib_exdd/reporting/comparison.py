"""What a comparison of methods leaves behind: the folder's files, as data.

`anomalib compare` writes them, the report and the tables read them, and so may you: everything is JSON, CSV or NumPy
arrays without pickled objects. `results.json` is :class:`Comparison`; what it says of images lies beside it, one folder
for every run:

| file | what |
|---|---|
| `results.json` | :class:`Comparison`: methods, runs, metrics, and everything needed to do it again |
| `runs/<method>/<seed>/run.json` | :class:`Run`: one method with one seed, written when it has ended |
| `runs/<method>/<seed>/images.csv` | :class:`ImageResult`, a line for every test image |
| `runs/<method>/<seed>/maps.npz` | `maps`: float16, shape (images, height, width), in the order of `images.csv` |
| `runs/<method>/<seed>/explanations.json` | image -> :class:`NearestPatches`, for the worst 100 of either label |
| `runs/<method>/<seed>/histograms.npz` | pixels of every test image by score, which the intervals are drawn from |
| `runs/<method>/<seed>/settings.json` | everything that the run depends on; an equal one is not run again |
| `runs/<method>/<seed>/log.txt` | what its process said |
| `runs/<method>/<seed>/progress.json` | how far it is, only while it runs |
| `data.csv` | every image and mask of the data with its split, label and SHA-256 |
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.utils.files import write_atomically, write_file

SCHEMA = 1
"""Version of the files; a change of meaning or a removed field raises it."""
RESULTS_NAME = "results.json"
METRICS = {
    "image_AUROC": "image AUROC",
    "image_AP": "image AP",
    "image_F1": "image best F1",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "AUPRO": "AUPRO",
}
"""Metrics of a run, all 0 to 1 and the higher the better, and what tables call them."""


@dataclass(frozen=True)
class Method:
    """A method that takes part.

    Attributes:
        name: Name in tables, unique.
        class_path: Class of the model.
        arguments: Arguments that it was built with.
        notes: What is not the same as for the others: another input size, a backbone of its own, no use of defects.
        published: Published metrics on the same data, 0 to 1, by their names in :data:`METRICS`.
        published_source: Where those are from.
    """

    name: str
    class_path: str
    arguments: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    published_source: str = ""


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        method: Name of the method.
        seed: Seed of data splits, model and training.
        folder: Folder of the run's files, relative to that of `results.json`.
        error: Why it failed, in a line; empty if it did not. A failed run has none of what follows.
        metrics: By the names of :data:`METRICS`, 0 to 1.
        fit_seconds: Seconds of training.
        peak_memory_mb: Largest resident memory of the run's process, MB; on a GPU also `peak_gpu_memory_mb`.
        peak_gpu_memory_mb: Largest memory allocated on the GPU; None without one.
        images_per_second: Test images a second, in batches, without loading and metrics.
        latency_ms: Median time of a single image, milliseconds.
        model_mb: Size of the checkpoint, MB.
        negative_entries: Entries of the bank of normal patches; None for a method without one.
        positive_entries: Entries of the bank of defective patches; None for a method without one.
        epochs: Epochs that it trained.
        threshold: Score from which Anomalib calls an image defective (best F1 on validation images; without any, what
            the model finds itself), if it has one.
        accept: Score below which an image is accepted, for a method that decides.
        reject: Score from which an image is rejected.
    """

    method: str
    seed: int
    folder: str
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    fit_seconds: float | None = None
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None
    images_per_second: float | None = None
    latency_ms: float | None = None
    model_mb: float | None = None
    negative_entries: int | None = None
    positive_entries: int | None = None
    epochs: int | None = None
    threshold: float | None = None
    accept: float | None = None
    reject: float | None = None


@dataclass(frozen=True)
class ImageResult:
    """What a run says of one test image.

    Attributes:
        image: Path of the image.
        mask: Path of its mask; empty if it has none.
        label: 1 for defective, 0 for normal.
        score: Raw image score; higher is more defective.
    """

    image: str
    mask: str
    label: int
    score: float


@dataclass(frozen=True)
class NearestPatches:
    """An image's highest patch and the training patches nearest to it.

    Attributes:
        row: Row of the patch's centre, as a share of the image's height, 0 to 1.
        column: Column of the patch's centre, as a share of the width.
        normal: Nearest normal patch: `source`, `row`, `column` (shares again) and `distance`.
        defect: Nearest defect patch, the same; None without one.
        reason: Why the image is not accepted, in words; None if it is, or the method gives no reasons.
    """

    row: float
    column: float
    normal: dict[str, Any]
    defect: dict[str, Any] | None
    reason: str | None = None


@dataclass(frozen=True)
class Difference:
    """A method against another one, paired by seed and image.

    Attributes:
        method: Name of the method.
        baseline: Name of the one it is compared with.
        metric: Name of the metric.
        mean: Mean of method minus baseline over the seeds that both have.
        low: Lower end of the 95 % confidence interval.
        high: Upper end.
        seeds: Number of seeds.
    """

    method: str
    baseline: str
    metric: str
    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """A whole comparison: `results.json`.

    Attributes:
        title: What was compared.
        command: Command that reproduces it.
        created: Date, ISO 8601.
        configuration: Every setting, resolved.
        machine: Processor, accelerator and versions, and how runs were given memory.
        data: Name and root of the data, `sha256` of `data.csv`, and its counts (`train_normal`, `train_defective`,
            `validation_normal`, …, `test_defective`).
        methods: Methods, in the order of the table.
        runs: Runs that have ended, failed ones too.
        differences: Paired differences to the baseline.
        schema: See :data:`SCHEMA`.
    """

    title: str
    command: str
    created: str
    configuration: dict[str, Any]
    machine: dict[str, str]
    data: dict[str, Any]
    methods: list[Method]
    runs: list[Run]
    differences: list[Difference]
    schema: int = SCHEMA

    @property
    def threshold_note(self) -> str:
        """What a reader has to know of the thresholds; empty where they come from validation images."""
        counts = [count for name, count in self.data.items() if name.startswith("validation_")]
        arguments = self.configuration.get("data", {}).get("init_args") or {}
        if not counts or any(counts) or arguments.get("val_split_mode") == "synthetic":  # those are not counted
            return ""
        return (
            "There are no validation images: the threshold of ExDD's calibrated score is the one that it finds on its "
            "training images, that of DefectClassifier a probability of 0.5, and all others have none."
        )

    def of(self, method: str) -> list[Run]:
        """Return a method's runs that did not fail, by seed."""
        found = [run for run in self.runs if run.method == method and not run.error]
        return sorted(found, key=lambda run: run.seed)


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write `results.json`; an old one stays until the new one is complete."""
    return write_json(asdict(comparison), folder / RESULTS_NAME)


def read_comparison(folder: Path) -> Comparison:
    """Read `results.json` of a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of another version.
    """
    path = folder / RESULTS_NAME
    if not path.is_file():
        msg = f"{folder} has no {RESULTS_NAME}: it is no folder of a comparison, or none of its runs has ended."
        raise FileNotFoundError(msg)
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        msg = f"{path} has schema {content.get('schema')!r}, but this version reads {SCHEMA}. Run the comparison again."
        raise ValueError(msg)
    content["methods"] = [Method(**each) for each in content["methods"]]
    content["runs"] = [Run(**each) for each in content["runs"]]
    content["differences"] = [Difference(**each) for each in content["differences"]]
    return Comparison(**content)


def write_images(images: Iterable[ImageResult], folder: Path) -> Path:
    """Write a run's `images.csv`."""
    path = folder / "images.csv"
    with write_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(ImageResult)])
        writer.writeheader()
        writer.writerows(asdict(image) for image in images)
    return path


def read_images(folder: Path) -> list[ImageResult]:
    """Read a run's `images.csv`."""
    with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
        return [
            ImageResult(row["image"], row["mask"], int(row["label"]), float(row["score"]))
            for row in csv.DictReader(file)
        ]


def read_maps(folder: Path) -> NDArray[np.float16] | None:
    """Read a run's anomaly maps, float16, shape (images, height, width); None if it has none."""
    path = folder / "maps.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as archive:
        maps: NDArray[np.float16] = archive["maps"]
    return maps


def read_explanations(folder: Path) -> dict[str, NearestPatches]:
    """Read what a run explains, by path of the image; empty for a method that does not explain itself."""
    path = folder / "explanations.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {image: NearestPatches(**patches) for image, patches in content.items()}


def write_json(content: Any, path: Path) -> Path:
    """Write a JSON file; an old one stays until the new one is complete."""
    write_file(path, json.dumps(content, indent=1) + "\n")
    return path
