"""The files of a comparison: what `anomalib compare` writes, and its bootstrap, report and tables read.

`results.json` is a :class:`Comparison`. The other files, in JSON, CSV and NumPy's format without pickled objects:

| file | content |
|---|---|
| `data.csv` | every image and mask of the data with its split, label and SHA-256 |
| `runs/<method>/<seed>/run.json` | :class:`Run`, written when it has ended |
| `runs/<method>/<seed>/images.csv` | :class:`ImageResult`, a line for every test image |
| `runs/<method>/<seed>/maps.npz` | `maps`: float16, shape (images, height, width), in the order of `images.csv` |
| `runs/<method>/<seed>/explanations.json` | nearest training patches of the worst 100 images of either label |
| `runs/<method>/<seed>/histograms.npz` | pixels of every test image by score, for the confidence intervals |
| `runs/<method>/<seed>/settings.json` | everything that the run depends on; an equal one is not run again |
| `runs/<method>/<seed>/log.txt` | output of its process |
| `runs/<method>/<seed>/progress.txt` | its progress, only while it runs |

An explanation, by the path of its image, has the centre of the highest patch in shares of height and width (`row`,
`column`), the nearest patch of a `normal` and of a `defect` training image (`source`, `row`, `column`, `distance`; null
without a positive bank), and the `reason` why the image is not accepted (null if it is, or the model gives none).
"""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.utils.files import write_atomically, write_file

SCHEMA = 1
"""Version of the files; a changed meaning or a removed field raises it."""
RESULTS_NAME = "results.json"
HISTOGRAMS_NAME = "histograms.npz"
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
    """A method of the comparison."""

    name: str  # unique
    class_path: str  # of the model
    arguments: dict[str, Any] = field(default_factory=dict)  # of the model
    notes: list[str] = field(default_factory=list)  # what is not the same as for the other methods
    published: dict[str, float] = field(default_factory=dict)  # metrics on the same data, by their names in METRICS
    published_source: str = ""


@dataclass(frozen=True)
class Run:
    """One method with one seed; what does not apply is None."""

    method: str
    seed: int
    folder: str  # of the run's files, relative to that of `results.json`
    error: str = ""  # why it failed, in a line; a failed run has none of the following
    metrics: dict[str, float] = field(default_factory=dict)  # by the names of METRICS, 0 to 1
    fit_seconds: float | None = None
    peak_memory_mb: float | None = None  # largest resident memory of the run's process
    peak_gpu_memory_mb: float | None = None
    images_per_second: float | None = None  # in batches, without loading and metrics
    latency_ms: float | None = None  # median of single images
    model_mb: float | None = None  # size of the checkpoint
    negative_entries: int | None = None  # of the bank of normal patches
    positive_entries: int | None = None  # of the bank of defective patches
    epochs: int | None = None
    # Score from which an image counts as defective: best F1 on validation images; without any, the model's own.
    threshold: float | None = None
    accept: float | None = None  # images of lower scores are accepted
    reject: float | None = None  # images of at least this score are rejected

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
class Difference:
    """Mean of method minus baseline over the seeds of both, with its 95 % confidence interval."""

    method: str
    baseline: str
    metric: str
    mean: float
    low: float
    high: float
    seeds: int

    @property
    def includes_zero(self) -> bool:
        """Whether the interval does not tell which of the two is better."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """A whole comparison: `results.json`."""

    title: str
    command: str  # that reproduces it
    created: str  # date, ISO 8601
    configuration: dict[str, Any]  # every setting, resolved
    machine: dict[str, str]  # processor, accelerator, versions, and how runs allocate memory
    data: dict[str, Any]  # name, root, `sha256` of `data.csv`, and numbers of images (`train_normal`, ...)
    methods: list[Method]  # in the order of the table
    runs: list[Run]  # that have ended, including failed ones, by method and seed
    differences: list[Difference]  # to the baseline
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
        return [run for run in self.runs if run.method == method and not run.error]


@dataclass(frozen=True, kw_only=True)
class RunResults(Run):
    """A run that did not fail, with the path of its folder and its test images."""

    path: Path
    images: Sequence[ImageResult]

    @cached_property
    def labels(self) -> NDArray[np.bool_]:
        """Which images are defective, shape (images,)."""
        return np.array([image.label != 0 for image in self.images], dtype=bool)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Image scores, shape (images,)."""
        return np.array([image.score for image in self.images], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class MethodResults(Method):
    """A method with its runs."""

    number: int  # position in the comparison, which gives colour and line style
    runs: Sequence[RunResults]  # that did not fail, by seed
    failed: Sequence[Run]

    def values(self, quantity: str) -> list[float]:
        """Collect a metric, or another quantity of :class:`Run`, over the seeds that have it."""
        found = [run.metrics.get(quantity, getattr(run, quantity, None)) for run in self.runs]
        return [float(value) for value in found if value is not None and math.isfinite(value)]

    def mean(self, quantity: str) -> float | None:
        """Return the mean of a quantity over the seeds; None if no run has it."""
        values = self.values(quantity)
        return float(np.mean(values)) if values else None

    def deviation(self, quantity: str) -> float | None:
        """Return the sample standard deviation over the seeds; None with fewer than two."""
        values = self.values(quantity)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Results:
    """What a comparison's folder holds: `results.json`, and the methods in the order of the table."""

    comparison: Comparison
    methods: Sequence[MethodResults]

    @property
    def first_runs(self) -> list[tuple[MethodResults, RunResults]]:
        """The methods that have finished, each with the run whose images are shown: that of the lowest seed."""
        return [(method, method.runs[0]) for method in self.methods if method.runs]

    @property
    def differences(self) -> list[Difference]:
        """The paired differences whose intervals are finite: a resample may have no defective pixel."""
        found = self.comparison.differences
        return [each for each in found if all(map(math.isfinite, (each.mean, each.low, each.high)))]


def read_results(folder: Path) -> Results:
    """Read a comparison's folder, except for maps and explanations.

    Raises:
        FileNotFoundError: If there is no `results.json`.
        ValueError: If it is of another version.
    """
    comparison = read_comparison(folder)
    methods = []
    for number, method in enumerate(comparison.methods):
        runs = [read_run(run, folder) for run in comparison.of(method.name)]
        failed = [run for run in comparison.runs if run.method == method.name and run.error]
        methods.append(MethodResults(**vars(method), number=number, runs=runs, failed=failed))
    return Results(comparison, methods)


def read_run(run: Run, folder: Path) -> RunResults:
    """Read the test images of a run of a comparison's folder."""
    path = folder / run.folder
    return RunResults(**vars(run), path=path, images=read_images(path))


def read_comparison(folder: Path) -> Comparison:
    """Read `results.json` of a folder, see :func:`read_results`."""
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
    arrays = read_arrays(folder / "maps.npz")
    return arrays["maps"] if arrays else None


def read_explanations(folder: Path) -> dict[str, dict[str, Any]]:
    """Read a run's explanations by path of the image; empty if the model gives none."""
    path = folder / "explanations.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays atomically in NumPy's compressed format."""
    with write_atomically(path) as partial:
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]  # no array is called `allow_pickle`


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read arrays by their names; none if there is no such file."""
    if not path.is_file():
        return {}
    with np.load(path) as archive:
        return dict(archive)


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file atomically."""
    write_file(path, json.dumps(content, indent=1) + "\n")


def write_csv(rows: Iterable[dict[str, Any]], columns: list[str], path: Path) -> None:
    """Write a CSV file atomically; what a row lacks is left empty."""
    with write_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
