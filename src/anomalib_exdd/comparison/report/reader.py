"""A comparison's folder, read for the report: methods with their runs, and every run with its images.

The large files, the anomaly maps, are read on demand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.comparison.results import (
    Comparison,
    ImageResult,
    Method,
    Run,
    read_comparison,
    read_images,
    read_maps,
)


@dataclass(frozen=True)
class RunResults:
    """A run that did not fail, with its folder and test images (none if `images.csv` is missing)."""

    run: Run
    folder: Path
    images: Sequence[ImageResult]

    @cached_property
    def labels(self) -> NDArray[np.bool_]:
        """Which images are defective, shape (images,)."""
        return np.array([image.label != 0 for image in self.images], dtype=bool)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Image scores, shape (images,); NaN and infinity as they are in the file."""
        return np.array([image.score for image in self.images], dtype=np.float64)

    @property
    def has_both_labels(self) -> bool:
        """Whether there are normal and defective images."""
        return 0 < int(self.labels.sum()) < len(self.images)

    def maps(self) -> NDArray[np.float16] | None:
        """Read the anomaly maps, float16, shape (images, height, width); None if there are none.

        Raises:
            ValueError: If their number is not that of the images.
        """
        maps = read_maps(self.folder)
        if maps is None or not self.images:
            return None
        if maps.ndim != 3 or len(maps) != len(self.images):
            msg = (
                f"{self.folder / 'maps.npz'} has maps of shape {maps.shape}, but images.csv beside it lists "
                f"{len(self.images)} images. Remove that folder and run the comparison again."
            )
            raise ValueError(msg)
        return maps


@dataclass(frozen=True)
class MethodResults:
    """A method with its runs."""

    method: Method
    number: int  # position in the comparison, which gives colour and line style
    runs: Sequence[RunResults]  # that did not fail, by seed
    failed: Sequence[Run]  # by seed

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.method.name

    @property
    def first(self) -> RunResults | None:
        """The run whose images are shown: the lowest seed that has images."""
        return next((run for run in self.runs if run.images), None)

    def values(self, quantity: str) -> list[float]:
        """Collect a metric, or another quantity of :class:`.Run`, over the seeds that have it."""
        found = [run.run.metrics.get(quantity, getattr(run.run, quantity, None)) for run in self.runs]
        return [float(value) for value in found if value is not None and np.isfinite(value)]

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
    """A comparison's folder: `results.json`, and the methods in the order of the table."""

    folder: Path
    comparison: Comparison
    methods: Sequence[MethodResults]

    @property
    def with_images(self) -> list[tuple[MethodResults, RunResults]]:
        """Methods that have images, each with its first run."""
        return [(method, method.first) for method in self.methods if method.first is not None]

    def find_image(self, path: str) -> Path | None:
        """Find an image or mask that a file names; None if it is missing.

        Relative paths are looked up in the comparison's folder, the root of the data and the working directory; and
        below the root, if the name of the root is part of the path.
        """
        if not path:
            return None
        root, parts = Path(str(self.comparison.data.get("root") or "")), Path(path).parts
        candidates = [self.folder / path, root / path, Path(path)]
        if root.name in parts:
            candidates.append(root.joinpath(*parts[parts.index(root.name) + 1 :]))
        return next((candidate for candidate in candidates if _is_file(candidate)), None)


def read_results(folder: Path) -> Results:
    """Read the folder that `anomalib compare` wrote, except for the maps.

    Raises:
        FileNotFoundError: If there is no `results.json`.
        ValueError: If its schema is another version's.
    """
    comparison = read_comparison(folder)
    methods = []
    for number, method in enumerate(comparison.methods):
        runs = [_read_run(run, folder / run.folder) for run in comparison.of(method.name)]
        failed = [run for run in comparison.runs if run.method == method.name and run.error]
        methods.append(MethodResults(method, number, runs, sorted(failed, key=lambda run: run.seed)))
    return Results(folder, comparison, methods)


def _read_run(run: Run, folder: Path) -> RunResults:
    return RunResults(run, folder, read_images(folder) if (folder / "images.csv").is_file() else [])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no permission, or a name that this system cannot have
        return False
