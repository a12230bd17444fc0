"""A comparison's folder, read for the report: methods with their runs, and every run with its test images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.comparison.results import (
    Comparison,
    Difference,
    ImageResult,
    Method,
    Run,
    read_comparison,
    read_images,
)


@dataclass(frozen=True)
class RunResults:
    """A run that did not fail, with its folder and test images."""

    run: Run
    folder: Path
    images: Sequence[ImageResult]

    @cached_property
    def labels(self) -> NDArray[np.bool_]:
        """Which images are defective, shape (images,)."""
        return np.array([image.label != 0 for image in self.images], dtype=bool)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Image scores, shape (images,)."""
        return np.array([image.score for image in self.images], dtype=np.float64)


@dataclass(frozen=True)
class MethodResults:
    """A method with its runs."""

    method: Method
    number: int  # position in the comparison, which gives colour and line style
    runs: Sequence[RunResults]  # that did not fail, by seed
    failed: Sequence[Run]

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.method.name

    def values(self, quantity: str) -> list[float]:
        """Collect a metric, or another quantity of :class:`.Run`, over the seeds that have it."""
        found = [run.run.metrics.get(quantity, getattr(run.run, quantity, None)) for run in self.runs]
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
    """A comparison's folder: `results.json`, and the methods in the order of the table."""

    folder: Path
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
    """Read the folder that `anomalib compare` wrote, except for the maps.

    Raises:
        FileNotFoundError: If there is no `results.json`.
        ValueError: If its schema is another version's.
    """
    comparison = read_comparison(folder)
    methods = []
    for number, method in enumerate(comparison.methods):
        finished = comparison.of(method.name)
        runs = [RunResults(run, folder / run.folder, read_images(folder / run.folder)) for run in finished]
        failed = [run for run in comparison.runs if run.method == method.name and run.error]
        methods.append(MethodResults(method, number, runs, failed))
    return Results(folder, comparison, methods)
