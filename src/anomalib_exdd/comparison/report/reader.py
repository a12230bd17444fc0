"""A comparison's folder, read for the report: methods with their runs, and every run with its images.

The heavy files, the anomaly maps, are read later and one run at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.comparison.results import (
    Comparison,
    ImageResult,
    Method,
    NearestPatches,
    Run,
    read_comparison,
    read_explanations,
    read_images,
    read_maps,
)


@dataclass(frozen=True)
class RunResults:
    """A run that did not fail, with what it says of the test images.

    Attributes:
        run: The run.
        folder: Its folder.
        images: Its test images; empty if `images.csv` is gone.
    """

    run: Run
    folder: Path
    images: Sequence[ImageResult]

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Which images are defective, shape (images,)."""
        return np.array([image.label != 0 for image in self.images], dtype=bool)

    @property
    def scores(self) -> NDArray[np.float64]:
        """Image scores, shape (images,); as they are in the file, so that they may hold NaN."""
        return np.array([image.score for image in self.images], dtype=np.float64)

    @property
    def has_both_classes(self) -> bool:
        """Whether curves and ranks can be drawn: there are normal and defective images."""
        return 0 < int(self.labels.sum()) < len(self.images)

    def maps(self) -> NDArray[np.float16] | None:
        """Read the anomaly maps, float16, shape (images, height, width); None if there are none.

        Raises:
            ValueError: If they are not those of the images.
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

    def explanations(self) -> dict[str, NearestPatches]:
        """Read the nearest training patches, by path of the image; empty if the method does not explain itself."""
        return read_explanations(self.folder)


@dataclass(frozen=True)
class MethodResults:
    """A method with its runs.

    Attributes:
        method: The method.
        number: Its place in the comparison; colour and line style follow from it.
        runs: Runs that did not fail, by seed.
        failed: Runs that did, by seed.
    """

    method: Method
    number: int
    runs: Sequence[RunResults]
    failed: Sequence[Run]

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.method.name

    @property
    def first(self) -> RunResults | None:
        """The run that pictures are made of: that of the lowest seed whose images are there."""
        return next((run for run in self.runs if run.images), None)

    def values(self, quantity: str) -> list[float]:
        """Collect a metric, or another quantity of :class:`Run`, over the seeds that have it."""
        found = [run.run.metrics.get(quantity, getattr(run.run, quantity, None)) for run in self.runs]
        return [float(value) for value in found if value is not None and np.isfinite(value)]

    def mean(self, quantity: str) -> float | None:
        """Average such a quantity over the seeds; None if no run has it."""
        values = self.values(quantity)
        return float(np.mean(values)) if values else None

    def spread(self, quantity: str) -> float | None:
        """Return the standard deviation over the seeds, n - 1 in the denominator; None with fewer than two."""
        values = self.values(quantity)
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Results:
    """A whole folder.

    Attributes:
        folder: The folder.
        comparison: What its `results.json` says.
        methods: The methods, in the order of the table.
    """

    folder: Path
    comparison: Comparison
    methods: Sequence[MethodResults]

    @property
    def pictured(self) -> list[tuple[MethodResults, RunResults]]:
        """Methods of which there is something to draw, each with its first run."""
        return [(method, method.first) for method in self.methods if method.first is not None]

    def find_image(self, path: str) -> Path | None:
        """Find an image or mask that a file names; None if it is gone.

        Relative paths may start at the comparison's folder, at the root of the data, or where Python runs; or where it
        ran when the comparison was made, if the root's own folder is part of the path.
        """
        if not path:
            return None
        root, parts = Path(str(self.comparison.data.get("root") or "")), Path(path).parts
        places = [self.folder / path, root / path, Path(path)]
        if root.name in parts:
            places.append(root.joinpath(*parts[parts.index(root.name) + 1 :]))
        return next((place for place in places if _is_file(place)), None)


def read_results(folder: Path) -> Results:
    """Read a comparison's folder, but for the maps.

    Args:
        folder: Folder that `anomalib compare` has written.

    Raises:
        FileNotFoundError: If there is no `results.json`.
        ValueError: If it is of another version.
    """
    comparison = read_comparison(folder)
    methods = []
    for number, method in enumerate(comparison.methods):
        runs = [_read_run(run, folder / run.folder) for run in comparison.of(method.name)]
        failed = sorted(
            (run for run in comparison.runs if run.method == method.name and run.error), key=lambda run: run.seed
        )
        methods.append(MethodResults(method, number, runs, failed))
    return Results(folder, comparison, methods)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that others own, or a name that this system cannot have
        return False


def _read_run(run: Run, folder: Path) -> RunResults:
    return RunResults(run, folder, read_images(folder) if (folder / "images.csv").is_file() else [])
