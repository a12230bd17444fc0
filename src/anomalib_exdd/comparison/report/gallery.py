"""Misses and false alarms: which test images a method gets wrong, how badly, and their pictures for the report.

The severity of an error is the share of the images of the other label on the wrong side of the image: normal images
that score higher than a defective one, defective images that score lower than a normal one; equal scores count half.
That compares methods with different score scales. An image of severity 0 is an error nevertheless if the method's own
threshold or decision puts it on the wrong side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from anomalib_exdd.comparison.results import Results, Run, RunResults, read_explanations, read_maps

from .pictures import (
    common_decades,
    heat_levels,
    heat_picture,
    patch_tile,
    photo,
    read_mask,
    read_picture,
    share_above,
    small_size,
)

Kind = Literal["miss", "false-alarm"]

ERRORS_OF_EACH = 8
"""Errors shown of every method and kind, at most."""
MAX_IMAGES = 48
"""Images shown altogether, at most, so that a browser opens the file quickly."""
EXPLAINED_OF_EACH = 4
"""Misses, false alarms and found defects of a method whose nearest patches are shown."""


@dataclass(frozen=True)
class Outcome:
    """What a method's first run predicts for one image."""

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
    def errors(self) -> dict[int, Outcome]:
        """The outcomes that are errors."""
        return {number: outcome for number, outcome in self.outcomes.items() if outcome.is_error}

    @property
    def severity(self) -> float:
        """The greatest severity of its errors."""
        return max((outcome.severity for outcome in self.errors.values()), default=0.0)


def image_outcomes(results: Results) -> list[ImageOutcomes]:
    """Collect the outcomes of every test image from every method's first run, in the order of the images."""
    found: dict[str, ImageOutcomes] = {}
    for method, run in results.first_runs:
        misordered, ties = count_misordered(run)
        num_defective = int(run.labels.sum())
        for row, image in enumerate(run.images):
            entry = found.setdefault(image.image, ImageOutcomes(image.image, image.mask, image.label != 0))
            others = len(run.images) - num_defective if entry.defective else num_defective
            prediction = predict(image.score, run)
            is_wrong = prediction in ({"accept", "normal"} if entry.defective else {"reject", "defective"})
            is_error = is_wrong or bool(misordered[row] or ties[row])
            counted = int(misordered[row]), int(ties[row]), others
            entry.outcomes[method.number] = Outcome(row, image.score, *counted, prediction, is_error)
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
    found = [(image.errors[method], image) for image in images if image.kind == kind and method in image.errors]
    return [image for _, image in sorted(found, key=lambda each: (-each[0].severity, sign * each[0].score))]


def choose_errors(images: Sequence[ImageOutcomes], each: int, most: int) -> list[ImageOutcomes]:
    """Choose the worst `each` errors of every method and kind, in turns, until there are `most`; worst first."""
    methods = sorted({number for image in images for number in image.outcomes})
    kinds: tuple[Kind, Kind] = ("miss", "false-alarm")
    queues = [worst_errors(images, method, kind)[:each] for method in methods for kind in kinds]
    in_turns = [image for turn in zip_longest(*queues) for image in turn if image is not None]
    chosen = list({image.image: image for image in in_turns}.values())[:most]
    return sorted(chosen, key=lambda image: -image.severity)


def choose_explained(images: Sequence[ImageOutcomes], method: int) -> list[ImageOutcomes]:
    """Choose images to explain: a method's worst errors of both kinds, and the found defects of the highest scores."""
    found = [image for image in images if image.defective and method in image.outcomes.keys() - image.errors.keys()]
    surest = sorted(found, key=lambda image: -image.outcomes[method].score)
    groups = worst_errors(images, method, "miss"), worst_errors(images, method, "false-alarm"), surest
    return [image for group in groups for image in group[:EXPLAINED_OF_EACH]]


def error_cards(results: Results, images: Sequence[ImageOutcomes]) -> tuple[list[dict[str, Any]], int | None]:
    """Draw the worst errors of all methods.

    Returns:
        The cards, worst first, and the decades of the common colour scale; None if no method has maps. A card has the
        `image` and its pictures: `picture` and `truth` (with the outline of the true defect) as JPEG, None without an
        image or a mask; `heat`: the heat maps by number of the method, PNG.
    """
    chosen = choose_errors(images, ERRORS_OF_EACH, MAX_IMAGES)
    pixels: list[int] = []
    shares: dict[str, dict[int, NDArray[np.float64]]] = {image.image: {} for image in chosen}
    for method, run in tqdm(results.first_runs, desc="Reading the heat maps", unit="method", disable=None):
        maps = read_maps(run.path)
        if maps is None:
            continue
        # Without normal images the scale is that of all images.
        compared = maps if run.labels.all() else maps[~run.labels]
        normal = np.sort(compared, axis=None).astype(np.float32)
        pixels.append(normal.size)
        for image in chosen:
            if outcome := image.outcomes.get(method.number):
                shares[image.image][method.number] = share_above(maps[outcome.row], normal)
    decades = common_decades(pixels) if pixels else None
    drawn = tqdm(chosen, desc="Drawing the gallery", unit="image", disable=None)
    return [{"image": image, **_pictures(image, shares[image.image], decades or 1)} for image in drawn], decades


def _pictures(image: ImageOutcomes, shares: Mapping[int, NDArray[np.float64]], decades: int) -> dict[str, Any]:
    pixels, mask = read_picture(image.image), read_mask(image.mask) if image.defective else None
    heat = {}
    for method, share in shares.items():
        size = small_size(share.shape[::-1] if pixels is None else pixels.size)
        heat[method] = heat_picture(heat_levels(share, decades), size, mask)
    truth = photo(pixels, mask) if pixels and mask else None
    return {"picture": pixels and photo(pixels), "truth": truth, "heat": heat}


def explained_methods(results: Results, images: Sequence[ImageOutcomes]) -> list[dict[str, Any]]:
    """Collect the explained images of every method that has explanations, with crops of the nearest patches."""
    found = []
    for method, run in results.first_runs:
        explanations = read_explanations(run.path)
        cards = [
            {
                "image": image,
                "outcome": image.outcomes[method.number],
                "patches": explanations[image.image],
                "tiles": _tiles(image.image, explanations[image.image]),
            }
            for image in choose_explained(images, method.number)
            if image.image in explanations
        ]
        if cards:
            found.append({"name": method.name, "seed": run.seed, "total": len(explanations), "cards": cards})
    return found


def _tiles(path: str, patches: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = PurePath(path).name
    tiles = []
    for title, alternative, patch in (
        ("test patch", f"Highest patch of {name}", {"source": path, **patches}),
        ("closest normal", f"Normal patch nearest to that of {name}", patches["normal"]),
        ("closest defect", f"Defect patch nearest to that of {name}", patches["defect"]),
    ):
        pixels = None if patch is None else read_picture(patch["source"])
        picture = None if pixels is None else patch_tile(pixels, patch["row"], patch["column"])
        tiles.append({"title": title, "alternative": alternative, "patch": patch, "picture": picture})
    return tiles
