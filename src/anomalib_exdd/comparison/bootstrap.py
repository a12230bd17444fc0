"""Paired bootstrap over test images and seeds: how far two methods differ, with 95 % confidence intervals.

A resample draws test images with replacement, normal and defective ones separately, and seeds with replacement; both
methods are measured on the same draw. Seeds with the same test images share the draw of images, because images that
happen to be easy are so for all of them. The interval is that of the percentiles. With few seeds it says little about
seeds: three cannot show how far a fourth might be.

Images and pixels are counted in bins of ascending scores. A resample of the test images is a weighted sum of their
histograms, and a metric of all resamples a few operations on arrays. Shapes: N images, R resamples, B bins, S seeds.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from anomalib.utils.cv import connected_components_cpu
from numpy.typing import NDArray
from torch import Tensor

from .results import HISTOGRAMS_NAME, METRICS, Difference, RunResults, read_arrays

Array = NDArray[np.float64]
FPR_LIMIT = 0.3  # of AUPRO, as in Anomalib
QUANTILES = 512
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


class PixelHistograms(NamedTuple):
    """Pixels of a run's N test images by score: the arrays of `histograms.npz`.

    The edges of the bins are 512 quantiles of the defective pixels' scores and 512 of the normal pixels', which
    resolves recall and false-positive rate in steps of 0.2 %. Within a bin scores count as equal.
    """

    normal: NDArray[np.uint32]  # number of normal pixels, shape (N, B)
    defect: NDArray[np.uint32]  # number of defective pixels, shape (N, B)
    regions: NDArray[np.float32]  # defective pixels, each divided by the size of its connected region, shape (N, B)
    region_counts: NDArray[np.uint32]  # number of regions, shape (N,)


def pixel_histograms(maps_NHW: Tensor, masks_NHW: Tensor) -> PixelHistograms:
    """Count pixels by score, from anomaly maps (float32, on the CPU) and masks (bool)."""
    maps, masks = maps_NHW.numpy(), masks_NHW.numpy()
    levels = np.linspace(0, 1, QUANTILES)
    # Of too many values, every n-th is enough.
    thinned = [values[:: -(-len(values) // _MAX_VALUES)] for values in (maps[masks], maps[~masks]) if len(values)]
    edges = np.unique(np.concatenate([np.quantile(values, levels) for values in thinned])).astype(np.float32)
    bins = len(edges) + 1
    rows = []
    for number, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        labels = connected_components_cpu(masks_NHW[number][None, None].float()).long().numpy()[0, 0]
        sizes = np.bincount(labels[mask])
        places = np.searchsorted(edges, scores, side="right")
        normal, defect = (np.bincount(places[chosen], minlength=bins).astype(np.uint32) for chosen in (~mask, mask))
        regions = np.bincount(places[mask], weights=1 / sizes[labels[mask]], minlength=bins).astype(np.float32)
        rows.append((normal, defect, regions, np.uint32((sizes > 0).sum())))
    return PixelHistograms(*map(np.array, zip(*rows, strict=True)))


def paired_differences(
    runs: Sequence[RunResults], baseline: str, resamples: int = 1000, seed: int = 0
) -> list[Difference]:
    """Compare every method with the baseline by every metric that both have, in the order of the runs."""
    by_method: dict[str, dict[int, RunResults]] = {}
    for run in runs:
        by_method.setdefault(run.method, {})[run.seed] = run
    if baseline not in by_method:
        return []
    theirs = by_method.pop(baseline)
    draws: dict[tuple[str, ...], Array] = {}
    measured = {}
    for method, ours in [*by_method.items(), (baseline, theirs)]:
        for run_seed, run in sorted(ours.items()):
            paths = tuple(image.image for image in run.images)
            if paths not in draws:
                draws[paths] = _draw(run.labels, resamples, np.random.default_rng((seed, 0, len(draws))))
            measured[method, run_seed] = resampled_metrics(run, draws[paths])
    differences = []
    for (method, ours), metric in product(by_method.items(), METRICS):
        both = sorted(ours.keys() & theirs.keys())
        seeds = [each for each in both if metric in measured[method, each] and metric in measured[baseline, each]]
        if not seeds:
            continue
        exact = [ours[each].metrics[metric] - theirs[each].metrics[metric] for each in seeds]
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


def resampled_metrics(run: RunResults, weights_RN: Array) -> dict[str, Array]:
    """Return every metric of a run for every resample, shape (R,), given how often each image was drawn."""
    values, places = np.unique(run.scores, return_inverse=True)
    chosen_NB = np.eye(len(values))[places]
    normal, defect = (weights_RN @ (chosen_NB * label[:, None]) for label in (~run.labels, run.labels))
    measured = {
        "image_AUROC": auroc(normal, defect),
        "image_AP": average_precision(normal, defect),
        "image_F1": best_f1(normal, defect),
    }
    if arrays := read_arrays(run.path / HISTOGRAMS_NAME):  # without masks or maps there is no such file
        pixels = PixelHistograms(**arrays)
        normal, defect, regions, counts = (weights_RN @ each.astype(np.float64) for each in pixels)
        measured["pixel_AUROC"] = auroc(normal, defect)
        measured["pixel_AP"] = average_precision(normal, defect)
        measured["AUPRO"] = aupro(normal, regions, counts)
    return {name: values for name, values in measured.items() if name in run.metrics}


def _draw(labels_N: NDArray[np.bool_], resamples: int, rng: np.random.Generator) -> Array:
    """Return how often each image is drawn: once for the whole test data, then for every resample."""
    weights = np.ones((1 + resamples, len(labels_N)))
    for label in np.unique(labels_N):
        chosen = np.flatnonzero(labels_N == label)
        weights[1:, chosen] = rng.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), resamples)
    return weights
