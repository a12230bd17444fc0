"""What a run keeps of its pixels: for every test image, how many of them have which score.

Bins are the run's own. Their edges are quantiles of the defective pixels' scores and of the normal pixels' scores, 512
of each, so that both recall and false-positive rate are known in steps of 0.2 % and the few high scores that precision
depends on are told apart. Within a bin scores count as equal.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anomalib.utils.cv import connected_components_cpu
from numpy.typing import NDArray
from torch import Tensor

from anomalib_exdd.utils.files import write_atomically

from .curves import Array

QUANTILES = 512
HISTOGRAMS_NAME = "histograms.npz"
_MOST_VALUES = 4_000_000  # that quantiles are taken of


@dataclass(frozen=True)
class PixelHistograms:
    """Pixels by score: N images, B bins, bins ascending.

    Attributes:
        normal_NB: Number of normal pixels.
        defect_NB: Number of defective pixels.
        regions_NB: Defective pixels, each divided by the size of its connected region.
        regions_N: Number of regions.
    """

    normal_NB: Array
    defect_NB: Array
    regions_NB: Array
    regions_N: Array

    def save(self, folder: Path) -> None:
        """Write them to a run's folder; an old file stays until the new one is complete."""
        with write_atomically(folder / HISTOGRAMS_NAME) as partial:
            np.savez_compressed(
                partial,
                normal=self.normal_NB.astype(np.uint32),
                defect=self.defect_NB.astype(np.uint32),
                regions=self.regions_NB.astype(np.float32),
                region_counts=self.regions_N.astype(np.uint32),
            )

    @classmethod
    def load(cls, folder: Path) -> "PixelHistograms | None":
        """Read those of a run's folder; None if it has none, as without masks or maps."""
        path = folder / HISTOGRAMS_NAME
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as archive:
            names = ("normal", "defect", "regions", "region_counts")
            return cls(*(archive[name].astype(np.float64) for name in names))


def pixel_histograms(maps_NHW: Tensor, masks_NHW: Tensor) -> PixelHistograms:
    """Count pixels by score.

    Args:
        maps_NHW: Anomaly maps, float32, on the CPU.
        masks_NHW: Defects, bool.
    """
    maps, masks = maps_NHW.numpy(), masks_NHW.numpy()
    edges = _edges(maps, masks)
    bins = len(edges) + 1
    shape = (len(maps), bins)
    normal, defect, regions, counts = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(len(maps))
    for number, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        places = np.searchsorted(edges, scores, side="right")
        normal[number] = np.bincount(places[~mask], minlength=bins)
        if mask.any():
            labels = connected_components_cpu(masks_NHW[number][None, None].float()).long().numpy()[0, 0]
            sizes = np.bincount(labels[mask])
            defect[number] = np.bincount(places[mask], minlength=bins)
            regions[number] = np.bincount(places[mask], weights=1 / sizes[labels[mask]], minlength=bins)
            counts[number] = (sizes > 0).sum()
    return PixelHistograms(normal, defect, regions, counts)


def _edges(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    levels = np.linspace(0, 1, QUANTILES)
    parts = [np.quantile(_some(maps[chosen]), levels) for chosen in (masks, ~masks) if chosen.any()]
    return np.unique(np.concatenate(parts)).astype(np.float32)


def _some(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take every n-th of too many values."""
    return values[:: -(-len(values) // _MOST_VALUES)]
