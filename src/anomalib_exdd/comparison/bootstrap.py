"""Paired bootstrap over test images and seeds: how far two methods differ, with 95 % confidence intervals.

A resample draws test images with replacement, normal and defective ones separately, and seeds with replacement; both
methods are measured on the same draw. Seeds with the same test images share the draw of images, because images that
happen to be easy are so for all of them. The interval is that of the percentiles. With few seeds it says little about
seeds: three cannot show how far a fourth might be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .histograms import Array, PixelHistograms, aupro, auroc, average_precision, best_f1
from .results import METRICS, Difference, ImageResult

INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class RunScores:
    """Scores of a run: test images, histograms of pixels (None without maps or masks), and exact metrics by name."""

    images: Sequence[ImageResult]
    pixels: PixelHistograms | None
    metrics: Mapping[str, float]

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Paths of the test images, which tell whether two runs have the same."""
        return tuple(image.image for image in self.images)

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
            if run.paths not in weights:
                weights[run.paths] = _draw(run.images, resamples, np.random.default_rng((seed, 0, len(weights))))
            measured[method, run_seed] = run.resampled(weights[run.paths])
    differences = []
    for method in others:
        for metric in METRICS:
            seeds = [
                each
                for each, run in sorted(runs[method].items())
                if metric in run.metrics and each in runs[baseline] and metric in runs[baseline][each].metrics
            ]
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
            numbers = float(np.mean(exact)), float(low), float(high), len(seeds)
            differences.append(Difference(method, baseline, metric, *numbers))
    return differences


def _draw(images: Sequence[ImageResult], resamples: int, rng: np.random.Generator) -> Array:
    """Return how often each image is drawn: once for the whole test data, then for every resample."""
    labels = np.array([image.label for image in images])
    weights = np.ones((1 + resamples, len(labels)))
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        weights[1:, chosen] = rng.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), resamples)
    return weights
