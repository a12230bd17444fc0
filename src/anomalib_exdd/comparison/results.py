"""The files of a comparison: what `anomalib compare` writes, and its report and tables read.

`results.json` is a :class:`Comparison`. The other files, in JSON, CSV and NumPy's format without pickled objects:

| file | content |
|---|---|
| `data.csv` | every image and mask of the data with its split, label and SHA-256 |
| `runs/<method>/<seed>/run.json` | :class:`Run`, written when it has ended |
| `runs/<method>/<seed>/images.csv` | :class:`ImageResult`, a line for every test image |
| `runs/<method>/<seed>/maps.npz` | `maps`: float16, shape (images, height, width), in the order of `images.csv` |
| `runs/<method>/<seed>/explanations.json` | image -> :class:`NearestPatches`, for the worst 100 of either label |
| `runs/<method>/<seed>/histograms.npz` | pixels of every test image by score, for the confidence intervals |
| `runs/<method>/<seed>/settings.json` | everything that the run depends on; an equal one is not run again |
| `runs/<method>/<seed>/log.txt` | output of its process |
| `runs/<method>/<seed>/progress.json` | its progress, only while it runs |
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
"""Version of the files; a changed meaning or a removed field raises it."""
RESULTS_NAME = "results.json"
METRICS = {
    "image_AUROC": "image AUROC",
    "image_AP": "image AP",
    "image_F1": "image best F1",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "AUPRO": "AUPRO",
}
"""Metrics of a run, all 0 to 1 and the higher the better, and their names in tables."""


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: Its unique name.
        class_path: Class of the model.
        arguments: Arguments of the model.
        notes: What is not the same as for the other methods: another input size, backbone or training set.
        published: Published metrics on the same data, 0 to 1, by their names in :data:`METRICS`.
        published_source: Where they were published.
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
        folder: Folder of the run's files, relative to that of `results.json`.
        error: Why it failed, in a line; empty if it did not. A failed run has none of the following.
        metrics: By the names of :data:`METRICS`, 0 to 1.
        peak_memory_mb: Largest resident memory of the run's process.
        peak_gpu_memory_mb: Largest memory allocated on the GPU; None without one.
        images_per_second: Throughput in batches, without loading and metrics.
        latency_ms: Median time of a single image.
        model_mb: Size of the checkpoint.
        negative_entries: Entries of the bank of normal patches, if the model has one.
        positive_entries: Entries of the bank of defective patches, if the model has one.
        threshold: Score from which an image counts as defective: the best F1 on validation images; without any, what
            the model finds itself, or None.
        accept: Score below which an image is accepted, for a model that decides.
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

    def __str__(self) -> str:
        """Return method, seed and metrics, or the error, in a line."""
        values = "  ".join(f"{METRICS[name]} {100 * value:.1f}" for name, value in self.metrics.items())
        outcome = f"FAILED. {self.error}" if self.error else f"{values}  fit {self.fit_seconds:.1f} s"
        return f"{self.method}, seed {self.seed}: {outcome}"


@dataclass(frozen=True)
class ImageResult:
    """One test image of a run: its path and mask (empty without one), label (1: defective) and raw score."""

    image: str
    mask: str
    label: int
    score: float


@dataclass(frozen=True)
class NearestPatches:
    """An image's highest patch and the training patches nearest to it.

    Attributes:
        row: Row of the patch's centre, as a share of the image's height.
        column: Column of the patch's centre, as a share of its width.
        normal: Nearest normal patch: `source`, `row`, `column` (shares again) and `distance`.
        defect: Nearest defect patch, the same; None without a positive bank.
        reason: Why the image is not accepted; None if it is, or the model gives no reasons.
    """

    row: float
    column: float
    normal: dict[str, Any]
    defect: dict[str, Any] | None
    reason: str | None = None


@dataclass(frozen=True)
class Difference:
    """Mean of method minus baseline over the seeds of both, with its 95 % confidence interval."""

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
        command: Command that reproduces it.
        created: Date, ISO 8601.
        configuration: Every setting, resolved.
        machine: Processor, accelerator, versions, and how runs allocate memory.
        data: Name and root of the data, `sha256` of `data.csv`, and numbers of images (`train_normal`,
            `train_defective`, `validation_normal`, ..., `test_defective`).
        methods: Methods, in the order of the table.
        runs: Runs that have ended, including failed ones.
        differences: Paired differences to the baseline.
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
        """What the thresholds are without validation images; empty with them."""
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
    """Write `results.json`."""
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


def write_images(images: Iterable[ImageResult], folder: Path) -> None:
    """Write a run's `images.csv`."""
    write_csv(map(asdict, images), [each.name for each in fields(ImageResult)], folder / "images.csv")


def read_images(folder: Path) -> list[ImageResult]:
    """Read a run's `images.csv`."""
    with (folder / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [ImageResult(row["image"], row["mask"], int(row["label"]), float(row["score"])) for row in rows]


def read_maps(folder: Path) -> NDArray[np.float16] | None:
    """Read a run's anomaly maps, float16, shape (images, height, width); None if it has none."""
    path = folder / "maps.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as archive:
        maps: NDArray[np.float16] = archive["maps"]
    return maps


def read_explanations(folder: Path) -> dict[str, NearestPatches]:
    """Read a run's explanations by path of the image; empty if the model gives none."""
    path = folder / "explanations.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {image: NearestPatches(**patches) for image, patches in content.items()}


def write_json(content: Any, path: Path) -> Path:
    """Write a JSON file atomically."""
    write_file(path, json.dumps(content, indent=1) + "\n")
    return path


def write_csv(rows: Iterable[dict[str, Any]], columns: list[str], path: Path) -> Path:
    """Write a CSV file atomically; what a row lacks is left empty."""
    with write_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
