"""How far two methods are apart, and how sure that is: paired bootstrap over test images and seeds.

A resample draws test images with replacement, normal and defective ones separately, and seeds with replacement; both
methods are measured on the same draw. Where all seeds have the same test images, they share the draw of images, because
images that happen to be easy are so for all of them. The 95 % interval is that of the percentiles. With few seeds it
says little of seeds: three cannot show how far a fourth might be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anomalib_exdd.comparison.results import Difference, ImageResult

from .curves import Array, aupro, auroc, average_precision, best_f1
from .histograms import PixelHistograms

INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class RunScores:
    """What resamples of a run need.

    Attributes:
        images: Its test images.
        pixels: Its pixels; None without maps or masks.
        metrics: Its exact metrics, by name.
    """

    images: Sequence[ImageResult]
    pixels: PixelHistograms | None
    metrics: Mapping[str, float]

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Paths of the test images, which tell whether two runs have the same."""
        return tuple(image.image for image in self.images)

    def resampled(self, weights_RN: Array) -> dict[str, Array]:
        """Measure resamples of the images.

        Args:
            weights_RN: How often each image was drawn.

        Returns:
            Every metric of the run for every resample, shape (R,).
        """
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
    """The resamples of a comparison, the same for all methods.

    Args:
        resamples: How many.
        seed: Seed of the draws.
    """

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
        exact, whole, drawn = [], [], []
        for seed in seeds:
            ours, theirs = self._of(runs[method][seed]), self._of(runs[baseline][seed])
            exact.append(runs[method][seed].metrics[metric] - runs[baseline][seed].metrics[metric])
            whole.append(ours[metric][0] - theirs[metric][0])
            drawn.append(ours[metric][1:] - theirs[metric][1:])
        seed_weights = np.random.default_rng((self.seed, len(seeds))).multinomial(
            len(seeds), np.full(len(seeds), 1 / len(seeds)), size=self.resamples
        )
        # Bins shift a metric of pixels a little; by as much as they shift that of the whole test data.
        shift = float(np.mean(exact) - np.mean(whole))
        means = (seed_weights * np.stack(drawn, axis=1)).sum(axis=1) / len(seeds) + shift
        low, high = np.percentile(means, INTERVAL)
        return Difference(method, baseline, metric, float(np.mean(exact)), float(low), float(high), len(seeds))

    def _of(self, run: RunScores) -> dict[str, Array]:
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


def all_differences(
    runs: Mapping[str, Mapping[int, RunScores]], baseline: str, metrics: Sequence[str], resamples: int
) -> list[Difference]:
    """Compare every method with the baseline by every metric that both have.

    Args:
        runs: Runs by method and seed.
        baseline: Name of the method that the others are compared with.
        metrics: Names of the metrics.
        resamples: Resamples of the bootstrap.
    """
    if baseline not in runs:
        return []
    bootstrap = Bootstrap(resamples)
    found = [
        bootstrap.difference(method, baseline, metric, runs)
        for method in runs
        if method != baseline
        for metric in metrics
    ]
    return [difference for difference in found if difference is not None]
