"""Where the patches of training images wait until the coreset is selected: in memory, or on disk in half precision.

Selection works on the projections, which are kept in full precision in both places, so that the same patches are
selected. What is read back from disk is rounded to float16.

Shape suffixes: P patches of an image, D features, S dimensions of the projection.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_exdd.utils.files import write_file


class FeatureStore(ABC):
    """Patches of images, by the images' names.

    Attributes:
        lengths: Number of patches of every image.
    """

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}

    @abstractmethod
    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """Keep the patches of an image that is not there yet: features and projections float32, positions int64."""

    @abstractmethod
    def features(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return the features of an image's patches, or of some of them, float32, shape (P, D)."""

    @abstractmethod
    def projected(self, name: str) -> Tensor:
        """Return the projections of an image's patches, float32, shape (P, S)."""

    @abstractmethod
    def positions(self, name: str) -> Tensor:
        """Return the positions of an image's patches, int64, shape (P, 2)."""

    def __contains__(self, name: str) -> bool:
        """Tell whether an image is there."""
        return name in self.lengths


class MemoryStore(FeatureStore):
    """Keeps everything in memory, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._images: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """See :meth:`FeatureStore.add`."""
        self._images[name] = (features_PD, projected_PS, position_P2)
        self.lengths[name] = len(features_PD)

    def features(self, name: str, rows: Tensor | None = None) -> Tensor:
        """See :meth:`FeatureStore.features`."""
        features = self._images[name][0]
        return features if rows is None else features[rows]

    def projected(self, name: str) -> Tensor:
        """See :meth:`FeatureStore.projected`."""
        return self._images[name][1]

    def positions(self, name: str) -> Tensor:
        """See :meth:`FeatureStore.positions`."""
        return self._images[name][2]


class DiskStore(FeatureStore):
    """Keeps everything in three files of plain numbers; a fourth lists the images that are complete.

    A store that was interrupted is opened again as it was after its last complete image.

    Args:
        folder: Folder of its own; made if it is not there.
        dimension: Number of features, D.
        projected_dimension: Dimension of the projections, S.
    """

    def __init__(self, folder: Path, dimension: int, projected_dimension: int) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._columns = {
            "features": _Column(folder / "features.f16", np.dtype(np.float16), dimension),
            "projected": _Column(folder / "projected.f32", np.dtype(np.float32), projected_dimension),
            "positions": _Column(folder / "positions.i32", np.dtype(np.int32), 2),
        }
        self._starts: dict[str, int] = {}
        self._rows = 0
        self._index = folder / "images.jsonl"
        self._restore()

    def add(self, name: str, features_PD: Tensor, projected_PS: Tensor, position_P2: Tensor) -> None:
        """See :meth:`FeatureStore.add`.

        Raises:
            ValueError: If a feature is beyond the range of half precision.
        """
        half = features_PD.half()
        if not bool(torch.isfinite(half).all()):
            msg = (
                f"A feature of {name} is {float(features_PD.abs().max()):.3g}, beyond the range of half precision, in "
                "which features are kept on disk. Keep them in memory: `--model.feature_store memory`."
            )
            raise ValueError(msg)
        for column, values in zip(self._columns.values(), (half, projected_PS, position_P2.int()), strict=True):
            column.append(values.numpy())
        with self._index.open("a", encoding="utf-8") as file:  # last: what is listed is complete
            file.write(json.dumps({"name": name, "rows": len(half)}) + "\n")
        self._note(name, len(half))

    def features(self, name: str, rows: Tensor | None = None) -> Tensor:
        """See :meth:`FeatureStore.features`."""
        return self._read("features", name, rows).float()

    def projected(self, name: str) -> Tensor:
        """See :meth:`FeatureStore.projected`."""
        return self._read("projected", name)

    def positions(self, name: str) -> Tensor:
        """See :meth:`FeatureStore.positions`."""
        return self._read("positions", name).long()

    def _read(self, column: str, name: str, rows: Tensor | None = None) -> Tensor:
        start = self._starts[name]
        if rows is None:
            return torch.from_numpy(self._columns[column].read(start, self.lengths[name]))
        single = [self._columns[column].read(start + row, 1) for row in rows.tolist()]
        return torch.from_numpy(np.concatenate(single)) if single else self._read(column, name)[:0]

    def _note(self, name: str, rows: int) -> None:
        self.lengths[name], self._starts[name] = rows, self._rows
        self._rows += rows

    def _restore(self) -> None:
        """Read the list of complete images, and cut off what was written after them."""
        lines = self._index.read_text(encoding="utf-8").splitlines(keepends=True) if self._index.is_file() else []
        known = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been interrupted
        held = min(column.rows for column in self._columns.values())
        for image in known:
            if self._rows + image["rows"] > held:  # a power cut may lose data that the list already names
                break
            self._note(image["name"], image["rows"])
        for column in self._columns.values():
            column.cut(self._rows)
        content = "".join(json.dumps({"name": name, "rows": rows}) + "\n" for name, rows in self.lengths.items())
        write_file(self._index, content)


class _Column:
    """A file of rows of numbers."""

    def __init__(self, path: Path, kind: np.dtype[Any], width: int) -> None:
        self.path, self.kind, self.width = path, kind, width
        self._row_bytes = kind.itemsize * width
        path.touch()

    @property
    def rows(self) -> int:
        return self.path.stat().st_size // self._row_bytes

    def append(self, values: NDArray[Any]) -> None:
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(values, dtype=self.kind).tobytes())

    def read(self, start: int, count: int) -> NDArray[Any]:
        found = np.fromfile(self.path, self.kind, count * self.width, offset=start * self._row_bytes)
        return found.reshape(count, self.width)

    def cut(self, rows: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(rows * self._row_bytes)
