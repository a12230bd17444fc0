"""Paired bootstrap over test images and seeds: how far two methods differ, with 95 % confidence intervals.

A resample draws test images with replacement, normal and defective ones separately, and seeds with replacement; both
methods are measured on the same draw. Seeds with the same test images share the draw of images, because images that
happen to be easy are so for all of them. The interval is that of the percentiles. With few seeds it says little about
seeds: three cannot show how far a fourth might be.

Images and pixels are counted in bins of ascending scores. A resample of the test images is a weighted sum of their
histograms, and a metric of all resamples a few operations on arrays. Shapes: N images, R resamples, B bins, S seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from anomalib.utils.cv import connected_components_cpu
from numpy.typing import NDArray
from torch import Tensor

from anomalib_exdd.utils.files import write_atomically

from .results import METRICS, Difference, ImageResult

Array = NDArray[np.float64]
FPR_LIMIT = 0.3  # of AUPRO, as in Anomalib
QUANTILES = 512
HISTOGRAMS_NAME = "histograms.npz"
INTERVAL = (2.5, 97.5)
_MAX_VALUES = 4_000_000  # that quantiles are computed of


def auroc(normal_RB: Array, defect_RB: Array) -> Array:
    """Area under the ROC curve, shape (R,), from the weights of normal and defective samples; ties count half."""
    below = np.cumsum(normal_RB, axis=-1) - normal_RB
    pairs = (defect_RB * (below + normal_RB / 2)).sum(axis=-1)
    return np.asarray(pairs / (normal_RB.sum(axis=-1) * defect_RB.sum(axis=-1)))


def average_precision(normal_RB: Array, defect_RB: Array) -> Array:
    """Average precision, shape (R,): precision at every threshold, weighted by the gain in recall."""
    true, false = _from_the_top(defect_RB), _from_the_top(normal_RB)
    called = true + false
    precision = np.divide(true, called, out=np.zeros_like(called), where=called > 0)
    gain = defect_RB[..., ::-1] / true[..., -1:]
    return np.asarray((precision * gain).sum(axis=-1))


def best_f1(normal_RB: Array, defect_RB: Array) -> Array:
    """F1 at the best threshold, shape (R,)."""
    true, false = _from_the_top(defect_RB), _from_the_top(normal_RB)
    return np.asarray((2 * true / (true + false + true[..., -1:])).max(axis=-1))


def aupro(normal_RB: Array, regions_RB: Array, count_R: Array) -> Array:
    """Area under the per-region overlap up to a false-positive rate of 0.3, divided by 0.3, shape (R,).

    Args:
        normal_RB: Number of normal pixels.
        regions_RB: Pixels of defect regions, each divided by the size of its region.
        count_R: Number of regions.
    """
    false = _from_the_top(normal_RB)
    rate = np.insert(false / false[..., -1:], 0, 0, axis=-1)
    overlap = np.insert(_from_the_top(regions_RB) / np.asarray(count_R)[..., None], 0, 0, axis=-1)
    start, end = rate[..., :-1], np.minimum(rate[..., 1:], FPR_LIMIT)
    width = rate[..., 1:] - start
    share = np.divide(end - start, width, out=np.zeros_like(width), where=width > 0)
    at_end = overlap[..., :-1] + share * (overlap[..., 1:] - overlap[..., :-1])
    area = np.maximum(end - start, 0) * (overlap[..., :-1] + at_end) / 2
    return np.asarray(area.sum(axis=-1) / FPR_LIMIT)


def _from_the_top(weights_RB: Array) -> Array:
    """Cumulate from the highest bin down: what is called defective as the threshold falls."""
    return np.asarray(np.cumsum(weights_RB[..., ::-1], axis=-1, dtype=np.float64))


@dataclass(frozen=True)
class PixelHistograms:
    """Pixels of a run's test images by score.

    The edges of the bins are 512 quantiles of the defective pixels' scores and 512 of the normal pixels', which
    resolves recall and false-positive rate in steps of 0.2 %. Within a bin scores count as equal.
    """

    normal_NB: Array  # number of normal pixels
    defect_NB: Array  # number of defective pixels
    regions_NB: Array  # defective pixels, each divided by the size of its connected region
    regions_N: Array  # number of regions

    def save(self, folder: Path) -> None:
        """Write them to a run's folder."""
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
        """Read them from a run's folder; None if it has none, as without masks or maps."""
        path = folder / HISTOGRAMS_NAME
        if not path.is_file():
            return None
        with np.load(path) as archive:
            names = ("normal", "defect", "regions", "region_counts")
            return cls(*(archive[name].astype(np.float64) for name in names))


def pixel_histograms(maps_NHW: Tensor, masks_NHW: Tensor) -> PixelHistograms:
    """Count pixels by score, from anomaly maps (float32, on the CPU) and masks (bool)."""
    maps, masks = maps_NHW.numpy(), masks_NHW.numpy()
    levels = np.linspace(0, 1, QUANTILES)
    # Of too many values, every n-th is enough.
    thinned = [values[:: -(-len(values) // _MAX_VALUES)] for values in (maps[masks], maps[~masks]) if len(values)]
    edges = np.unique(np.concatenate([np.quantile(values, levels) for values in thinned])).astype(np.float32)
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


@dataclass(frozen=True)
class RunScores:
    """Scores of a run: test images, histograms of pixels (None without maps or masks), and exact metrics by name."""

    images: Sequence[ImageResult]
    pixels: PixelHistograms | None
    metrics: Mapping[str, float]

    def resampled(self, weights_RN: Array) -> dict[str, Array]:
        """Return every metric of the run for every resample, shape (R,), given how often each image was drawn."""
        labels = np.array([image.label for image in self.images])
        values, places = np.unique([image.score for image in self.images], return_inverse=True)
        chosen_NB = np.eye(len(values))[places]
        normal, defect = weights_RN @ (chosen_NB * (labels == 0)[:, None]), weights_RN @ (chosen_NB * labels[:, None])
        measured = {
            "image_AUROC": auroc(normal, defect),
            "image_AP": average_precision(normal, defect),
            "image_F1": best_f1(normal, defect),
        }
        if self.pixels is not None:
            normal, defect = weights_RN @ self.pixels.normal_NB, weights_RN @ self.pixels.defect_NB
            regions, counts = weights_RN @ self.pixels.regions_NB, weights_RN @ self.pixels.regions_N
            measured["pixel_AUROC"] = auroc(normal, defect)
            measured["pixel_AP"] = average_precision(normal, defect)
            measured["AUPRO"] = aupro(normal, regions, counts)
        return {name: values for name, values in measured.items() if name in self.metrics}


def paired_differences(
    runs: Mapping[str, Mapping[int, RunScores]], baseline: str, resamples: int = 1000, seed: int = 0
) -> list[Difference]:
    """Compare every method with the baseline by every metric that both have.

    Args:
        runs: Runs by method and seed.
        baseline: Name of the method that the others are compared with.
        resamples: Number of resamples, the same for all methods.
        seed: Seed of the draws.
    """
    if baseline not in runs:
        return []
    others = [method for method in runs if method != baseline]
    weights: dict[tuple[str, ...], Array] = {}
    measured = {}
    for method in (*others, baseline):
        for run_seed, run in sorted(runs[method].items()):
            paths = tuple(image.image for image in run.images)
            if paths not in weights:
                weights[paths] = _draw(run.images, resamples, np.random.default_rng((seed, 0, len(weights))))
            measured[method, run_seed] = run.resampled(weights[paths])
    differences = []
    for method, metric in product(others, METRICS):
        both = [(each, measured[method, each], measured.get((baseline, each), {})) for each in sorted(runs[method])]
        seeds = [each for each, ours, theirs in both if metric in ours and metric in theirs]
        if not seeds:
            continue
        exact = [runs[method][each].metrics[metric] - runs[baseline][each].metrics[metric] for each in seeds]
        found_SR = np.stack([measured[method, each][metric] - measured[baseline, each][metric] for each in seeds])
        rng = np.random.default_rng((seed, len(seeds)))
        seed_weights = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=resamples)
        # Bins shift a metric of pixels slightly; correct it by the shift on the whole test data.
        shift = float(np.mean(exact) - np.mean(found_SR[:, 0]))
        means = (seed_weights * found_SR[:, 1:].T).sum(axis=1) / len(seeds) + shift
        low, high = np.percentile(means, INTERVAL)
        differences.append(
            Difference(method, baseline, metric, float(np.mean(exact)), float(low), float(high), len(seeds))
        )
    return differences


def _draw(images: Sequence[ImageResult], resamples: int, rng: np.random.Generator) -> Array:
    """Return how often each image is drawn: once for the whole test data, then for every resample."""
    labels = np.array([image.label for image in images])
    weights = np.ones((1 + resamples, len(labels)))
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        weights[1:, chosen] = rng.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), resamples)
    return weights
