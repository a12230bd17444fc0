"""Which test images a method gets wrong, and how badly, so that methods with different scales compare.

A defective image counts by the share of normal images that score higher, a normal one by the share of defective images
that score lower; an equal score counts half. That is 0 for an image in its right place and 1 for the worst. An image
with 0 is an error nevertheless if the method's own threshold or decision puts it on the wrong side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.comparison.results import Run

from .curves import rank_scores
from .reader import MethodResults, Results, RunResults

Kind = Literal["miss", "false-alarm"]


@dataclass(frozen=True)
class Judgement:
    """What a method's first run makes of one image.

    Attributes:
        method: The method.
        row: Row of the image in `images.csv` and in the maps.
        score: Its score.
        beyond: Number of images of the other class that are on the wrong side of it.
        equal: Number of those that score the same.
        others: Number of all images of the other class.
        word: What the method calls it (`accept`, `review`, `reject`, `normal`, `defective`); empty without thresholds.
        is_error: Whether it is an error.
    """

    method: MethodResults
    row: int
    score: float
    beyond: int
    equal: int
    others: int
    word: str
    is_error: bool

    @property
    def severity(self) -> float:
        """Share of the images of the other class on the wrong side of it, 0 to 1."""
        return (self.beyond + self.equal / 2) / self.others if self.others else 0.0


@dataclass(frozen=True)
class JudgedImage:
    """A test image with what every method says of it.

    Attributes:
        image: Its path.
        mask: Path of its mask; empty if it has none.
        defective: Whether it is defective.
        judgements: By number of the method; methods that did not see it are missing.
    """

    image: str
    mask: str
    defective: bool
    judgements: dict[int, Judgement]

    @property
    def kind(self) -> Kind:
        """What an error on it is called."""
        return "miss" if self.defective else "false-alarm"

    @property
    def errors(self) -> list[Judgement]:
        """The judgements that are errors."""
        return [judgement for judgement in self.judgements.values() if judgement.is_error]

    @property
    def severity(self) -> float:
        """The greatest severity of its errors."""
        return max((judgement.severity for judgement in self.errors), default=0.0)


def judge_images(results: Results) -> list[JudgedImage]:
    """Judge every test image by every method's first run; images in the order in which they first appear."""
    judged: dict[str, JudgedImage] = {}
    for method, run in results.pictured:
        beyond, equal = count_beyond(run)
        defective_count = int(run.labels.sum())
        for row, image in enumerate(run.images):
            defective = image.label != 0
            word = call_of(image.score, run.run)
            wrong = word in ({"accept", "normal"} if defective else {"reject", "defective"})
            others = len(run.images) - defective_count if defective else defective_count
            entry = judged.setdefault(image.image, JudgedImage(image.image, image.mask, defective, {}))
            entry.judgements[method.number] = Judgement(
                method, row, image.score, int(beyond[row]), int(equal[row]), others, word,
                is_error=wrong or bool(beyond[row] or equal[row]),
            )  # fmt: skip
    return list(judged.values())


def count_beyond(run: RunResults) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count for each image the images of the other class on the wrong side of it, and those that score the same.

    Args:
        run: The run.

    Returns:
        Two arrays of shape (images,). All 0 if there is but one class.
    """
    labels, ranks = run.labels, rank_scores(run.scores)
    beyond, equal = np.zeros(len(ranks), dtype=np.int64), np.zeros(len(ranks), dtype=np.int64)
    for own, sign in ((labels, 1), (~labels, -1)):
        others = np.sort(sign * ranks[~own])
        mine = sign * ranks[own]
        up_to = np.searchsorted(others, mine, "right")
        beyond[own] = len(others) - up_to
        equal[own] = up_to - np.searchsorted(others, mine, "left")
    return beyond, equal


def call_of(score: float, run: Run) -> str:
    """Return what a run calls an image of a score: its decision, or else its side of the threshold."""
    if run.accept is not None and run.reject is not None:
        return "reject" if score >= run.reject else "accept" if score < run.accept else "review"
    if run.threshold is not None:
        return "defective" if score >= run.threshold else "normal"
    return ""


def worst_errors(judged: Sequence[JudgedImage], method: int, kind: Kind) -> list[JudgedImage]:
    """Return a method's errors of a kind, worst first; among equals that with the more extreme score."""
    sign = 1 if kind == "miss" else -1
    found = [
        image for image in judged
        if image.kind == kind and method in image.judgements and image.judgements[method].is_error
    ]  # fmt: skip

    def order(image: JudgedImage) -> tuple[float, float]:
        judgement = image.judgements[method]
        return -judgement.severity, sign * judgement.score

    return sorted(found, key=order)


def choose_errors(judged: Sequence[JudgedImage], each: int, most: int) -> list[JudgedImage]:
    """Choose the errors to show: the worst of every method and kind, in turns, until there are enough.

    Args:
        judged: All images.
        each: How many of each method and kind.
        most: How many altogether.

    Returns:
        Chosen images, the worst first: by the greatest severity that any method's error on them has.
    """
    methods = sorted({number for image in judged for number in image.judgements})
    kinds: tuple[Kind, Kind] = ("miss", "false-alarm")
    queues = [worst_errors(judged, method, kind)[:each] for method in methods for kind in kinds]
    in_turns = [queue[place] for place in range(each) for queue in queues if place < len(queue)]
    chosen = list({image.image: image for image in in_turns}.values())[:most]
    return sorted(chosen, key=lambda image: -image.severity)
