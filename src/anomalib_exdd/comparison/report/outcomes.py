"""Which test images a method gets wrong, and how badly, comparably for methods with different score scales.

The severity of an error is the share of the images of the other label on the wrong side of the image: normal images
that score higher than a defective one, defective images that score lower than a normal one; equal scores count half.
An image of severity 0 is an error nevertheless if the method's own threshold or decision puts it on the wrong side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.comparison.results import Run

from .reader import MethodResults, Results, RunResults

Kind = Literal["miss", "false-alarm"]


@dataclass(frozen=True)
class Outcome:
    """What a method's first run predicts for one image."""

    method: MethodResults
    row: int  # of the image in `images.csv` and in the maps
    score: float
    misordered: int  # images of the other label on the wrong side of it
    ties: int  # images of the other label with the same score
    others: int  # all images of the other label
    prediction: str  # see `predict`
    is_error: bool

    @property
    def severity(self) -> float:
        """Share of the images of the other label on the wrong side of it, 0 to 1."""
        return (self.misordered + self.ties / 2) / self.others if self.others else 0.0


@dataclass(frozen=True)
class ImageOutcomes:
    """A test image with the outcomes of all methods that have seen it, by number of the method."""

    image: str
    mask: str
    defective: bool
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What an error on it is called."""
        return "miss" if self.defective else "false-alarm"

    @property
    def errors(self) -> list[Outcome]:
        """The outcomes that are errors."""
        return [outcome for outcome in self.outcomes.values() if outcome.is_error]

    @property
    def severity(self) -> float:
        """The greatest severity of its errors."""
        return max((outcome.severity for outcome in self.errors), default=0.0)


def image_outcomes(results: Results) -> list[ImageOutcomes]:
    """Collect the outcomes of every test image from every method's first run, in the order of the images."""
    found: dict[str, ImageOutcomes] = {}
    for method, run in results.first_runs:
        misordered, ties = count_misordered(run)
        num_defective = int(run.labels.sum())
        for row, image in enumerate(run.images):
            entry = found.setdefault(image.image, ImageOutcomes(image.image, image.mask, image.label != 0))
            others = len(run.images) - num_defective if entry.defective else num_defective
            prediction = predict(image.score, run.run)
            is_wrong = prediction in ({"accept", "normal"} if entry.defective else {"reject", "defective"})
            is_error = is_wrong or bool(misordered[row] or ties[row])
            counted = int(misordered[row]), int(ties[row]), others
            entry.outcomes[method.number] = Outcome(method, row, image.score, *counted, prediction, is_error)
    return list(found.values())


def count_misordered(run: RunResults) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count for each image the images of the other label on the wrong side of it, and those with the same score.

    Returns:
        Two arrays of shape (images,); all 0 if there is only one label.
    """
    misordered, ties = np.zeros((2, len(run.images)), dtype=np.int64)
    for own, sign in ((run.labels, 1), (~run.labels, -1)):
        others = np.sort(sign * run.scores[~own])
        up_to = np.searchsorted(others, sign * run.scores[own], "right")
        misordered[own] = len(others) - up_to
        ties[own] = up_to - np.searchsorted(others, sign * run.scores[own], "left")
    return misordered, ties


def predict(score: float, run: Run) -> str:
    """Return what a run calls an image: by its decision, or else by its threshold.

    Returns:
        `accept`, `review` or `reject`; `normal` or `defective`; empty without a decision and a threshold.
    """
    if run.accept is not None and run.reject is not None:
        return "reject" if score >= run.reject else "accept" if score < run.accept else "review"
    if run.threshold is not None:
        return "defective" if score >= run.threshold else "normal"
    return ""


def worst_errors(images: Sequence[ImageOutcomes], method: int, kind: Kind) -> list[ImageOutcomes]:
    """Return a method's errors of a kind, worst first; equally severe ones by how extreme their scores are."""
    sign = 1 if kind == "miss" else -1
    found = [
        (outcome.severity, sign * outcome.score, image)
        for image in images
        if image.kind == kind and (outcome := image.outcomes.get(method)) is not None and outcome.is_error
    ]
    return [image for *_, image in sorted(found, key=lambda each: (-each[0], each[1]))]


def choose_errors(images: Sequence[ImageOutcomes], each: int, most: int) -> list[ImageOutcomes]:
    """Choose the worst `each` errors of every method and kind, in turns, until there are `most`; worst first."""
    methods = sorted({number for image in images for number in image.outcomes})
    kinds: tuple[Kind, Kind] = ("miss", "false-alarm")
    queues = [worst_errors(images, method, kind)[:each] for method in methods for kind in kinds]
    in_turns = [image for turn in zip_longest(*queues) for image in turn if image is not None]
    chosen = list({image.image: image for image in in_turns}.values())[:most]
    return sorted(chosen, key=lambda image: -image.severity)
