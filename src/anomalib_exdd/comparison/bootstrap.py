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


class Bootstrap:
    """The resamples of a comparison, the same for all methods."""

    def __init__(self, resamples: int = 1000, seed: int = 0) -> None:
        self.resamples = resamples
        self.seed = seed
        self._weights: dict[tuple[str, ...], Array] = {}
        self._measured: dict[int, dict[str, Array]] = {}

    def difference(
        self, method: str, baseline: str, metric: str, runs: Mapping[str, Mapping[int, RunScores]]
    ) -> Difference | None:
        """Compare two methods by a metric.

        Args:
            method: Name of the method.
            baseline: Name of the one it is compared with.
            metric: Name of the metric.
            runs: Runs by method and seed.

        Returns:
            Method minus baseline; None if no seed has the metric for both.
        """
        seeds = [
            seed
            for seed, run in sorted(runs[method].items())
            if metric in run.metrics and seed in runs[baseline] and metric in runs[baseline][seed].metrics
        ]
        if not seeds:
            return None
        exact, whole, resampled = [], [], []
        for seed in seeds:
            ours, theirs = self._measure(runs[method][seed]), self._measure(runs[baseline][seed])
            exact.append(runs[method][seed].metrics[metric] - runs[baseline][seed].metrics[metric])
            whole.append(ours[metric][0] - theirs[metric][0])
            resampled.append(ours[metric][1:] - theirs[metric][1:])
        seed_weights = np.random.default_rng((self.seed, len(seeds))).multinomial(
            len(seeds), np.full(len(seeds), 1 / len(seeds)), size=self.resamples
        )
        # Bins shift a metric of pixels slightly; correct it by the shift on the whole test data.
        shift = float(np.mean(exact) - np.mean(whole))
        means = (seed_weights * np.stack(resampled, axis=1)).sum(axis=1) / len(seeds) + shift
        low, high = np.percentile(means, INTERVAL)
        return Difference(method, baseline, metric, float(np.mean(exact)), float(low), float(high), len(seeds))

    def _measure(self, run: RunScores) -> dict[str, Array]:
        """Measure a run: first on all its images, then on every resample."""
        if id(run) not in self._measured:
            self._measured[id(run)] = run.resampled(self._draw(run))
        return self._measured[id(run)]

    def _draw(self, run: RunScores) -> Array:
        if run.paths not in self._weights:
            labels = np.array([image.label for image in run.images])
            rng = np.random.default_rng((self.seed, 0, len(self._weights)))
            weights = np.zeros((self.resamples, len(labels)))
            for label in np.unique(labels):
                chosen = np.flatnonzero(labels == label)
                weights[:, chosen] = rng.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), self.resamples)
            self._weights[run.paths] = np.concatenate([np.ones((1, len(labels))), weights])
        return self._weights[run.paths]


def all_differences(runs: Mapping[str, Mapping[int, RunScores]], baseline: str, resamples: int) -> list[Difference]:
    """Compare every method with the baseline by every metric that both have, from runs by method and seed."""
    if baseline not in runs:
        return []
    bootstrap = Bootstrap(resamples)
    others = [method for method in runs if method != baseline]
    found = [bootstrap.difference(method, baseline, metric, runs) for method in others for metric in METRICS]
    return [difference for difference in found if difference is not None]
