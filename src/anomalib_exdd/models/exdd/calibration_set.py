"""The training patches that calibration is fitted on, kept in the checkpoint.

For every calibration image the patches that may be among its highest are kept, and a sample: of a normal image from all
its patches, of a defective one from its defect patches. That is enough to learn the boundary and to fit the calibration
again, without any image, whenever the banks change.

Shape suffixes: I images, C patches kept of all images together, P patches of an image, D features, M bank entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

from anomalib_exdd.search.exact import EXTRA_CANDIDATES, direct_distances
from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.precision import Float32Buffers, full_float32

from .boundary import BoundaryData, Folds, LearntBoundary, name_hash
from .calibration import ImagePatches
from .memory_bank import MemoryBank, Origins, SharedSources
from .patches import outline_cells
from .scoring import CALIBRATED_NEIGHBORS, EPSILON

MAX_IMAGES = 200
"""Calibration images of each kind, at most: their number bounds the time and the checkpoint, not the accuracy."""
SAMPLED_PATCHES = 32
"""Patches sampled from every image, whatever their score."""
_BLOCK_ROWS = 512  # queries compared with a bank at a time


class Outline(NamedTuple):
    """Cells of an image's fine grid, in and beside its defects.

    Attributes:
        features: Fine features, float16, shape (O, F).
        defective: Whether each cell is defect, boolean, shape (O,).
    """

    features: Tensor
    defective: Tensor


class KeptPatches(NamedTuple):
    """What is kept of one training image.

    Attributes:
        path: Path of the image.
        features: Features of the patches kept, float16, shape (C, D).
        sampled: Whether each is in the sample, instead of kept for its score, boolean, shape (C,).
        defective: Whether the image is.
        patches: Number of patches of the whole image.
        population: Number of patches that the sample stands for: all of them, or the defect patches.
        outline: Fine features of cells in and beside its defects, if any.
    """

    path: str
    features: Tensor
    sampled: Tensor
    defective: bool
    patches: int
    population: int
    outline: "Outline | None" = None


@dataclass(frozen=True)
class CalibrationImage:
    """All patches of one training image.

    Attributes:
        path: Path of the image.
        features: Patch features, float32, shape (P, D).
        defects: Features of its defect patches, float32, shape (Q, D), for a defective image; None for a normal one.
        outline: Cells in and beside its defects, if they are known that finely.
    """

    path: str
    features: Tensor
    defects: Tensor | None = None
    outline: Outline | None = None

    def keep(self, high: Tensor) -> KeptPatches:
        """Keep the patches that may be among the highest, and a sample, evenly spaced.

        Args:
            high: Rows of the former, int64.
        """
        population = self.features if self.defects is None else self.defects
        count = min(SAMPLED_PATCHES, len(population))
        spaced = (torch.arange(count) * 2 + 1) * len(population) // max(1, 2 * count)
        return KeptPatches(
            self.path,
            torch.cat([self.features[high], population[spaced]]).to(torch.float16),
            torch.arange(len(high) + count) >= len(high),
            self.defects is not None,
            len(self.features),
            len(population),
            self.outline,
        )


def outline_of(fine_Fhw: Tensor, mask_HW: Tensor) -> Outline:
    """Take fine features in and beside an image's defects.

    Args:
        fine_Fhw: Fine features, float32, shape (F, h, w).
        mask_HW: Mask of the pre-processed image, non-zero on defects, shape (H, W).
    """
    cells, defective = outline_cells(mask_HW, (fine_Fhw.shape[-2], fine_Fhw.shape[-1]))
    return Outline(fine_Fhw.flatten(1).T[cells.to(fine_Fhw.device)].half().cpu(), defective)


def drawn(paths: Sequence[str], count: int = MAX_IMAGES) -> list[str]:
    """Draw calibration images by the hash of their names: the same ones whatever the order and the folder."""
    return sorted(sorted(paths, key=name_hash)[:count])


class CalibrationSet(DynamicBufferMixin, Float32Buffers):
    """Patches of training images, half precision, with the image of each.

    Attributes:
        features: Float16, shape (C, D).
        image: Row of :attr:`sources` that each patch comes from, int64, shape (C,).
        sampled: Whether it is in its image's sample, instead of kept for its score, boolean, shape (C,).
        defective: Whether each image is, boolean, shape (I,).
        patches: Number of patches of each whole image, int64, shape (I,).
        population: Number of patches that each image's sample stands for, int64, shape (I,).
        outline_features: Fine features of cells in and beside defects, float16, shape (O, F).
        outline_defective: Whether each of these cells is defect, boolean, shape (O,).
        outline_image: Row of :attr:`sources` that it comes from, int64, shape (O,).
        sources: Paths of the images.
    """

    features: Tensor
    image: Tensor
    sampled: Tensor
    defective: Tensor
    patches: Tensor
    population: Tensor
    outline_features: Tensor
    outline_defective: Tensor
    outline_image: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self._set([], self._nothing())

    @staticmethod
    def _nothing() -> dict[str, Tensor]:
        kinds = {
            "features": torch.float16,
            "image": torch.int64,
            "sampled": torch.bool,
            "defective": torch.bool,
            "patches": torch.int64,
            "population": torch.int64,
            "outline_features": torch.float16,
            "outline_defective": torch.bool,
            "outline_image": torch.int64,
        }
        return {name: torch.empty(0, dtype=kind) for name, kind in kinds.items()}

    def _set(self, sources: list[str], values: dict[str, Tensor]) -> None:
        self.sources = sources
        for name, value in values.items():
            self.register_buffer(name, value)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.sources)

    def clear(self) -> None:
        """Forget all images."""
        device = self.features.device
        self._set([], {name: value.to(device) for name, value in self._nothing().items()})

    def add(self, images: Sequence[KeptPatches]) -> None:
        """Keep the patches of images; an image that is there already is replaced."""
        for image in images:
            self.remove(image.path)
        if not images:
            return
        numbers = torch.arange(len(images)) + len(self)
        outlines = [image.outline or Outline(torch.empty(0), torch.empty(0, dtype=torch.bool)) for image in images]
        added = {
            "features": torch.cat([image.features for image in images]),
            "image": numbers.repeat_interleave(torch.tensor([len(image.features) for image in images])),
            "sampled": torch.cat([image.sampled for image in images]),
            **{
                name: torch.tensor([getattr(image, name) for image in images])
                for name in ("defective", "patches", "population")
            },
            "outline_image": numbers.repeat_interleave(torch.tensor([len(outline.defective) for outline in outlines])),
            "outline_defective": torch.cat([outline.defective for outline in outlines]),
        }
        if fine := [outline.features for outline in outlines if len(outline.defective)]:
            added["outline_features"] = torch.cat(fine)
        found = {}
        for name, value in self._buffers.items():
            present, new = cast("Tensor", value), added.get(name)
            if new is not None:
                present = torch.cat([present.reshape(-1, *new.shape[1:]), new.to(present)])
            found[name] = present
        self._set([*self.sources, *(image.path for image in images)], found)

    def remove(self, path: str) -> None:
        """Forget an image; nothing happens if it is not there."""
        if path not in self.sources:
            return
        index = self.sources.index(path)
        stays = {
            "image": torch.arange(len(self), device=self.image.device) != index,
            "patch": self.image != index,
            "cell": self.outline_image != index,
        }
        owner = {"defective": "image", "patches": "image", "population": "image"}
        owner |= {name: "cell" for name in self._buffers if name.startswith("outline")}
        found = {}
        for name, value in self._buffers.items():
            kept = cast("Tensor", value)[stays[owner.get(name, "patch")]]
            found[name] = kept - (kept > index).to(kept.dtype) if name in {"image", "outline_image"} else kept
        self._set([source for source in self.sources if source != path], found)

    def sample_of(self, *, defective: bool) -> tuple[Tensor, list[str]]:
        """Return the samples of all normal or all defective images, (C, D), and the image of each patch."""
        rows_C = self.sampled & (self.defective[self.image] == defective)
        return self.features[rows_C], [self.sources[image] for image in self.image[rows_C].tolist()]

    def outline_data(self, weights: Mapping[str, float], networks: int) -> BoundaryData:
        """Return the cells in and beside defects, all of them for each of some networks.

        Args:
            weights: How much images count, where it is not 1.
            networks: How many networks are to be learnt.
        """
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
        """Measure the patches' evidence, by what does not know their images.

        Distances leave out the entries that share content with the image, and the boundary's log-odds are those of the
        network that has not seen it.

        Returns:
            The evidence; None if the negative bank comes from a single image, so that nothing would be left of it.
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
        # Copies: NumPy's views would fix the size of the buffers, which a checkpoint may change.
        image, sampled, defective, patches, population = (
            value.cpu().clone() for value in (self.image, self.sampled, self.defective, self.patches, self.population)
        )
        return ImagePatches(
            log_negative=log_negative,
            log_positive=self._log_distances(positive, positive.origins),
            log_odds=log_odds,
            image=image,
            sampled=sampled,
            defective=defective,
            patches=patches,
            population=population,
            synthetic=torch.tensor([path in positive.origins for path in self.sources], dtype=torch.bool),
        )

    def _log_distances(self, bank: MemoryBank, origins: Origins) -> Tensor | None:
        """Return log-distances, shape (C, 2); None if for some image no entry of others is there to compare with."""
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
    """Find the distances to the k nearest entries of images other than a query's own.

    Args:
        query_CD: Queries, float32, shape (C, D), those of an image next to each other.
        image_C: Image of each query, int64, shape (C,).
        left_out: For every image, the sources whose entries it is not compared with; some entry has to be left.
        bank_MD: Bank, float32, shape (M, D).
        source_M: Source of each entry, shape (M,).
        k: Number of neighbours.

    Returns:
        Euclidean distances, computed by direct difference, float32, shape (C, k), nearest first. Where other images
        have fewer than k entries, the last is repeated.
    """
    found = []
    with full_float32(query_CD.device):
        centre_D = bank_MD.mean(dim=0)
        centred_MD = bank_MD - centre_D
        norm_M = centred_MD.square().sum(dim=1)
        for query, image in zip(query_CD.split(_BLOCK_ROWS), image_C.split(_BLOCK_ROWS), strict=True):
            images, place = image.unique(return_inverse=True)
            own_IM = torch.stack([entries_of(left_out[number], source_M) for number in images.tolist()])
            expanded = expanded_distances(query - centre_D, centred_MD, norm_M).masked_fill_(own_IM[place], torch.inf)
            nearest = expanded.topk(min(k + EXTRA_CANDIDATES, len(bank_MD)), dim=1, largest=False)
            distances = direct_distances(query, bank_MD, nearest.indices).masked_fill_(
                nearest.values.isinf(), torch.inf
            )
            distances = distances.sort(dim=1).values[:, :k]
            last = distances.isfinite().sum(dim=1, keepdim=True) - 1
            distances = torch.where(distances.isfinite(), distances, distances.gather(1, last))
            found.append(torch.cat([distances, distances[:, -1:].expand(-1, k - distances.shape[1])], dim=1))
    return torch.cat(found)


def entries_of(sources: Sequence[int], source_M: Tensor) -> Tensor:
    """Tell which entries come from one of some sources, boolean, shape (M,)."""
    own_M = torch.zeros_like(source_M, dtype=torch.bool)
    for source in sources:
        own_M |= source_M == source
    return own_M


def high_patches(log_negative_P: Tensor, log_positive_P: Tensor | None, count: int) -> Tensor:
    """Choose the patches of an image that may be among its highest by the distances, whatever their weights.

    Args:
        log_negative_P: Roughly measured log-distances to the negative bank, shape (P,).
        log_positive_P: The same to the positive bank, if there is one.
        count: How many to choose by each of two rankings.

    Returns:
        Rows, ascending, int64: the farthest from normal, and those with the highest log-ratio.
    """
    count = min(len(log_negative_P), count)
    rows = [log_negative_P.topk(count).indices]
    if log_positive_P is not None:
        rows.append((log_negative_P - log_positive_P).topk(count).indices)
    return torch.cat(rows).unique()
