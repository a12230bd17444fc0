"""Whether today's parts still look like those of the training, by how far their images are from normal ones.

An image's *share* is that of the training images, out of fold, that are at least as far: small shares are unusual. The
evidence of drift is an e-detector of Shiryaev-Roberts type (Shin, Ramdas & Rinaldo, arXiv:2203.03532): bets that shares
below some levels come more often than they should. It may be looked at after every image: without drift an alarm comes
once in ``every`` images on average, or less often. What is expected of the shares is known from N training images only;
the bets allow for that by the Dvoretzky-Kiefer-Wolfowitz inequality.

Shape suffixes: M images, N training images, B bets.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from anomalib_exdd.models.callbacks.prediction_row import predict_file
from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.record import Record
from anomalib_exdd.utils.files import write_atomically

Floats = NDArray[np.float64]

EVERY = 10_000
"""Images for which one false alarm is allowed, on average."""
LAST = 100
"""Images that count as today's."""
_LEVELS_B, _STAKES_B = (np.ravel(grid) for grid in np.meshgrid([0.5, 0.2, 0.05], [0.2, 0.5]))
_DOUBT = 0.05  # probability that the training images are less typical than allowed for
_FARTHEST = 10  # images that are listed
_INK, _MARK, _GROUND = "#1f4e79", "#b3261e", "#9aa5b1"


class Watched(NamedTuple):
    """A predicted image."""

    path: str
    time: str  # when it was predicted, ISO 8601
    distance: float  # to normal: see `normal_distance`
    decision: str | None
    training: Floats  # out-of-fold distances of the training images of the model that predicted it, shape (N,)


def from_record(record: Record) -> list[Watched]:
    """Return the predictions of a record, in their order, each beside the training images of its model."""
    training: dict[str, Floats] = {}
    found = []
    for event in record.events("model", "prediction"):
        if event.action == "model":
            training[event.model] = np.array(event.content["training_distances"])
        elif event.content["normal_distance"] is not None and len(training.get(event.model, ())):
            distance, decision = event.content["normal_distance"], event.content["decision"]
            found.append(Watched(event.path, event.time, distance, decision, training[event.model]))
    return found


def from_images(model: ExDD, paths: Iterable[Path]) -> list[Watched]:
    """Predict images, in their order; those that cannot be read are left out."""
    training = np.array(model.facts()["training_distances"])
    rows = (predict_file(model, path)[0] for path in paths)
    seen = ((row, row.normal_distance) for row in rows)
    return [Watched(row.path, "", distance, row.decision, training) for row, distance in seen if distance is not None]


def shares(images: Sequence[Watched]) -> Floats:
    """Return of every image the share of the training images that are at least as far, itself included, shape (M,)."""
    return np.array([(1 + (each.training >= each.distance).sum()) / (1 + len(each.training)) for each in images])


def detect(share_M: Floats, sizes_M: Sequence[int], every: int = EVERY) -> tuple[Floats, list[int]]:
    """Bet against the shares, image by image.

    Args:
        share_M: Shares of the images, in the order in which they came.
        sizes_M: Number of training images behind each share.
        every: Evidence that is an alarm, after which the bets begin anew.

    Returns:
        Evidence after every image, shape (M,), and the images that raised an alarm.
    """
    evidence_M, alarms, total_B = np.zeros(len(share_M)), [], np.zeros(len(_LEVELS_B))
    for image, (share, size) in enumerate(zip(share_M, sizes_M, strict=True)):
        expected_B = _LEVELS_B + np.sqrt(np.log(1 / _DOUBT) / (2 * size))
        total_B = (total_B + 1) * (1 + _STAKES_B * ((share <= _LEVELS_B) / expected_B - 1))
        evidence_M[image] = total_B.mean()
        if evidence_M[image] >= every:
            alarms.append(image)
            total_B[:] = 0
    return evidence_M, alarms


class Drift:
    """What images say, the ``last`` of which count as today's: see :func:`detect`; a ValueError if there are none."""

    def __init__(self, images: Sequence[Watched], last: int = LAST, every: int = EVERY) -> None:
        if not images:
            msg = "There are no predictions. Write some into the record (`anomalib predict --model.record FILE`)."
            raise ValueError(msg)
        self.images, self.last, self.every = images, last, every
        self.share_M = shares(images)
        self.evidence_M, self.alarms = detect(self.share_M, [len(each.training) for each in images], every)

    @property
    def drifted(self) -> bool:
        """Whether there was an alarm among today's images."""
        return bool(self.alarms) and self.alarms[-1] >= len(self.images) - self.last

    def __str__(self) -> str:
        """Say it in words."""
        count, today, before = len(self.images), self.images[-self.last :], self.images[: -self.last]
        training, distances = today[-1].training, np.array([each.distance for each in today])
        verdict = "The parts look like those of the training."
        if self.drifted:
            first = next(image for image in self.alarms if image >= len(before))
            where = f"{self.images[first].path}, {self.images[first].time or 'no time'}"
            verdict = f"The parts have DRIFTED away from the training: alarm at image {first + 1} ({where})."
        p_value = mannwhitneyu(distances, training, alternative="greater").pvalue
        compared = (
            f"Distance to normal: median {np.median(distances):.3g} of the last {len(today)} of {count} images, "
            f"{np.median(training):.3g} of {len(training)} training images, out of fold. Farther than those: "
            f"p = {p_value:.2g} (Mann-Whitney, one-sided, {len(today)} against {len(training)} images; for a "
            "single look)."
        )
        evidence = (
            f"Evidence of drift: {self.evidence_M[-1]:.3g}, an alarm from {self.every} on: without drift once in "
            f"{self.every} images on average, or less often, however often one looks."
        )
        review = f"For review: {_review(today)} of the last {len(today)}, {_review(before)} before."
        farthest = [today[image] for image in np.lexsort((-distances, self.share_M[-self.last :]))[:_FARTHEST]]
        listed = ", ".join(f"{each.path} ({each.distance:.3g})" for each in farthest)
        return "\n".join([verdict, compared, evidence, review, f"Farthest from normal: {listed}"])

    def draw(self, path: Path) -> Path:
        """Draw distances, evidence and share for review over the images, as PNG; return the path."""
        from matplotlib.figure import Figure  # noqa: PLC0415  slow to import, and seldom needed

        count = np.arange(1, len(self.images) + 1)
        figure = Figure(figsize=(7.5, 6.5), layout="constrained")
        distance, evidence, review = figure.subplots(3, sharex=True)
        distance.plot(count, [each.distance for each in self.images], ".", color=_INK, markersize=4)
        bands = np.array([np.quantile(each.training, [0.05, 0.5, 0.95]) for each in self.images])
        distance.fill_between(count, bands[:, 0], bands[:, 2], color=_GROUND, alpha=0.4, linewidth=0)
        distance.plot(count, bands[:, 1], color=_GROUND)
        distance.set_title("distance to normal; grey: median and 90 % of the training images", fontsize=10)
        evidence.semilogy(count, self.evidence_M.clip(1e-3), color=_INK)
        evidence.axhline(self.every, color=_MARK, linewidth=1)
        for alarm in self.alarms:
            evidence.axvline(alarm + 1, color=_MARK, linewidth=0.8, linestyle=":")
        evidence.set_title(f"evidence of drift; red: alarm from {self.every} on", fontsize=10)
        for_review = np.array([each.decision == "review" for each in self.images], dtype=np.float64)
        width = min(self.last, len(count))
        sums = np.convolve(for_review, np.ones(width))[: len(count)]
        review.plot(count, 100 * sums / np.minimum(count, width), color=_INK)
        review.set_ylim(-2, 102)
        review.set_title(f"for review, % of the last {width} images", fontsize=10)
        review.set_xlabel("image")
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        with write_atomically(path) as partial:
            figure.savefig(partial, dpi=110)
        return path


def _review(images: Sequence[Watched]) -> str:
    """Return the share of images that are for review, in words."""
    return f"{100 * np.mean([each.decision == 'review' for each in images]):.0f} %" if images else "none"
