"""The training patches that calibration is fitted on, kept in the checkpoint.

Of every calibration image these are the patches that may be among its highest, and a sample: of a normal image from all
its patches, of a defective one from its defect patches. Boundary and calibration can be learnt anew from them, without
any image, whenever the banks change.

Shape suffixes: I images, C patches kept of all images together, P patches of an image, D features, M bank entries.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from anomalib.models.components import DynamicBufferMixin
from numpy.typing import NDArray
from torch import Tensor

from anomalib_exdd.search.torch_index import TorchIndex
from anomalib_exdd.utils.precision import Float32Buffers

from .boundary import BoundaryData, Folds, LearntBoundary, name_hash
from .calibration import ImagePatches
from .memory_bank import MemoryBank, Origins, SharedSources
from .patches import Outline, evenly_spaced
from .scoring import CALIBRATED_NEIGHBORS, EPSILON

if TYPE_CHECKING:
    from .torch_model import ExDDModel

MAX_IMAGES = 200
"""Calibration images of each kind, at most: their number bounds the time and the checkpoint, not the accuracy."""
SAMPLED_PATCHES = 32  # patches sampled from every image, whatever their score
_BLOCK_ROWS = 1024  # queries compared with a bank at a time
_OF_PATCHES = {"features": torch.float16, "image": torch.int64, "sampled": torch.bool}
_OF_IMAGES = {"defective": torch.bool, "patches": torch.int64, "population": torch.int64}
_OF_CELLS = {"outline_features": torch.float16, "outline_defective": torch.bool, "outline_image": torch.int64}


class KeptPatches(NamedTuple):
    """What is kept of one training image."""

    path: str
    features: Tensor  # of the patches kept, float16, shape (C, D)
    sampled: Tensor  # whether each is in the sample, instead of kept for its score, boolean, shape (C,)
    defective: bool
    patches: int  # of the whole image
    population: int  # number of patches that the sample stands for: all of them, or the defect patches
    outline: Outline | None = None

    @classmethod
    def of(
        cls, path: str, features_PD: Tensor, high: Tensor, defects_QD: Tensor | None, outline: Outline | None = None
    ) -> "KeptPatches":
        """Keep the patches of an image that may be among its highest, and an evenly spaced sample.

        Args:
            path: Path of the image.
            features_PD: All its patch features, float32.
            high: Rows of the patches that may be among the highest, int64.
            defects_QD: Features of its defect patches, float32; None for a normal image.
            outline: Cells in and beside its defects, if any are known.
        """
        population = features_PD if defects_QD is None else defects_QD
        sample = population[evenly_spaced(len(population), SAMPLED_PATCHES)]
        return cls(
            path,
            torch.cat([features_PD[high], sample]).to(torch.float16),
            torch.arange(len(high) + len(sample)) >= len(high),
            defects_QD is not None,
            len(features_PD),
            len(population),
            outline,
        )


def choose_images(paths: Sequence[str], count: int = MAX_IMAGES) -> list[str]:
    """Choose calibration images by the hash of their names: the same ones whatever the order and the folder."""
    return sorted(sorted(paths, key=name_hash)[:count])


class CalibrationSet(DynamicBufferMixin, Float32Buffers):
    """Patches of training images, half precision, with the image of each."""

    features: Tensor  # float16, shape (C, D)
    image: Tensor  # row in `sources` that each patch comes from, int64, shape (C,)
    sampled: Tensor  # whether it is in its image's sample, instead of kept for its score, boolean, shape (C,)
    defective: Tensor  # whether each image is, boolean, shape (I,)
    patches: Tensor  # of each whole image, int64, shape (I,)
    population: Tensor  # number of patches that each image's sample stands for, int64, shape (I,)
    outline_features: Tensor  # of cells in and beside defects, float16, shape (O, F)
    outline_defective: Tensor  # whether each of these cells is defect, boolean, shape (O,)
    outline_image: Tensor  # row in `sources` that it comes from, int64, shape (O,)
    sources: list[str]  # paths of the images

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.sources)

    def clear(self) -> None:
        """Forget all images."""
        device = self.features.device if "features" in self._buffers else None
        self.sources = []
        for name, dtype in (_OF_PATCHES | _OF_IMAGES | _OF_CELLS).items():
            self.register_buffer(name, torch.empty(0, dtype=dtype, device=device))

    def add(self, images: Sequence[KeptPatches]) -> None:
        """Keep the patches of images; an image that is there already is replaced."""
        for image in images:
            self.remove(image.path)
        rows = list(enumerate(images, start=len(self)))
        outlines = [(row, image.outline) for row, image in rows if image.outline is not None]
        added = {
            "features": [image.features for image in images],
            "image": [torch.full((len(image.features),), row) for row, image in rows],
            "sampled": [image.sampled for image in images],
            **{name: [torch.tensor([getattr(image, name) for image in images])] for name in _OF_IMAGES},
            "outline_features": [outline.features for _, outline in outlines],
            "outline_defective": [outline.defective for _, outline in outlines],
            "outline_image": [torch.full((len(outline.defective),), row) for row, outline in outlines],
        }
        for name, values in added.items():
            present: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([present, *(value.to(present) for value in values)]))
        self.sources = [*self.sources, *(image.path for image in images)]

    def remove(self, path: str) -> None:
        """Forget an image; nothing happens if it is not there."""
        if path not in self.sources:
            return
        row = self.sources.index(path)
        other_images = torch.arange(len(self), device=self.image.device) != row
        kept = ((_OF_PATCHES, self.image != row), (_OF_IMAGES, other_images), (_OF_CELLS, self.outline_image != row))
        for names, stays in kept:
            for name in names:
                setattr(self, name, getattr(self, name)[stays])
        self.image = self.image - (self.image > row).to(torch.int64)
        self.outline_image = self.outline_image - (self.outline_image > row).to(torch.int64)
        self.sources = [source for source in self.sources if source != path]

    def sample_of(self, *, defective: bool) -> tuple[Tensor, list[str]]:
        """Return the samples of all normal or all defective images, (C, D), and the image of each patch."""
        rows_C = self.sampled & (self.defective[self.image] == defective)
        return self.features[rows_C], [self.sources[image] for image in self.image[rows_C].tolist()]

    def outline_data(self, weights: Mapping[str, float], networks: int) -> BoundaryData:
        """Return the cells in and beside defects, all of them for each network; images count 1 but for ``weights``."""
        return BoundaryData(
            self.outline_features.float(),
            self.outline_defective,
            self.outline_image,
            torch.tensor([weights.get(path, 1.0) for path in self.sources]),
            torch.zeros(len(self), networks, dtype=torch.bool),
        )

    def measure(
        self, negative: MemoryBank, positive: MemoryBank, boundary: LearntBoundary, folds: Folds
    ) -> ImagePatches | None:
        """Measure the patches' evidence out of fold; None if the negative bank comes from a single image.

        Distances leave out the entries that share content with the image, and the boundary's log-odds are those of the
        network that was not trained on it.
        """
        log_negative = self._log_distances(negative, positive.origins)
        if log_negative is None:
            return None
        log_odds = None
        if boundary.is_fitted:
            log_odds = torch.empty(len(self.features), dtype=torch.float64)
            fold_C = torch.tensor([folds.of(path) for path in self.sources])[self.image.cpu()]
            for fold in range(boundary.folds):
                rows = (fold_C == fold).to(self.features.device)
                log_odds[fold_C == fold] = boundary.of_fold(self.features[rows].float(), fold).double().cpu()
        return ImagePatches(
            log_negative=log_negative,
            log_positive=self._log_distances(positive, positive.origins),
            log_odds=log_odds,
            # Copies: NumPy's views would fix the size of the buffers, which a checkpoint may change.
            **{name: getattr(self, name).cpu().clone() for name in ("image", "sampled", *_OF_IMAGES)},
            synthetic=torch.tensor([path in positive.origins for path in self.sources], dtype=torch.bool),
        )

    def _log_distances(self, bank: MemoryBank, origins: Origins) -> Tensor | None:
        """Return log-distances, shape (C, 2); None if for some image no entry of other images is there."""
        entries = bank.source.bincount(minlength=len(bank.sources)).tolist()
        shared = SharedSources(bank.sources, origins)
        left_out = [shared.rows(path) for path in self.sources]
        most = max((sum(entries[row] for row in rows) for rows in left_out), default=0)
        if most == len(bank) or sum(count > 0 for count in entries) < 2:
            return None
        distances = others_distances(
            self.features.float(), self.image, left_out, bank.vectors, bank.source, max(CALIBRATED_NEIGHBORS)
        )
        chosen = torch.stack([distances[:, k - 1] for k in CALIBRATED_NEIGHBORS], dim=1)
        return chosen.clamp_min(EPSILON).log().double().cpu()

    def get_extra_state(self) -> dict[str, Any]:
        """Return what is saved beside the buffers."""
        return {"sources": self.sources}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what was saved beside the buffers."""
        self.sources = list(state["sources"])


def others_distances(
    query_CD: Tensor, image_C: Tensor, left_out: Sequence[Sequence[int]], bank_MD: Tensor, source_M: Tensor, k: int
) -> Tensor:
    """Find the distances to the k nearest entries of other images, float32, shape (C, k), nearest first.

    Where other images have fewer than k entries, the last distance is repeated.

    Args:
        query_CD: Queries, float32, those of an image next to each other.
        image_C: Image of each query, int64.
        left_out: For every image, the sources whose entries it is not compared with; some entry has to be left.
        bank_MD: Bank, float32.
        source_M: Source of each entry.
        k: Number of neighbours.
    """
    index = TorchIndex(bank_MD)
    found = []
    for query, image in zip(query_CD.split(_BLOCK_ROWS), image_C.split(_BLOCK_ROWS), strict=True):
        images, place = image.unique(return_inverse=True)
        own_IM = torch.stack([entries_of(left_out[number], source_M) for number in images.tolist()])
        distances = index.search(query, min(k, len(bank_MD)), own_IM[place]).distances
        last = distances.isfinite().sum(dim=1, keepdim=True) - 1
        distances = torch.where(distances.isfinite(), distances, distances.gather(1, last))
        found.append(torch.cat([distances, distances[:, -1:].expand(-1, k - distances.shape[1])], dim=1))
    return torch.cat(found)


def entries_of(sources: Sequence[int], source_M: Tensor) -> Tensor:
    """Tell which entries come from one of some sources, boolean, shape (M,)."""
    return torch.isin(source_M, torch.tensor(sources, dtype=source_M.dtype, device=source_M.device))


def normal_distance(nearest_BP: Tensor) -> Tensor:
    """Return the geometric mean of a sample of each image's distances to normal patches, (B, P), shape (B,).

    It changes with lamp, camera or product. A defect changes few of an image's patches, and hardly such a mean.
    """
    rows = evenly_spaced(nearest_BP.shape[1], SAMPLED_PATCHES).to(nearest_BP.device)
    return nearest_BP[:, rows].clamp_min(EPSILON).log().mean(dim=1).exp()


def training_distances(model: "ExDDModel") -> NDArray[np.float64] | None:
    """Return the same of the normal training images, without their own entries in the bank, shape (I,).

    None if the model has one normal training image only: without its own entries, nothing is left.
    """
    measured = model.measure_training(0.0)
    if measured is None:
        return None
    rows = measured.sampled & ~measured.defective[measured.image]
    image = measured.image[rows]
    total, count = torch.bincount(image, measured.log_negative[rows, 0]), torch.bincount(image)
    return (total / count)[count > 0].exp().numpy()
