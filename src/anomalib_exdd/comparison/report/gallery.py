"""Pictures of the report: the worst misses and false alarms with all heat maps, and the nearest training patches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from anomalib_exdd.comparison.results import read_explanations

from .outcomes import ImageOutcomes, choose_errors, worst_errors
from .pictures import (
    SIDE,
    HeatScale,
    common_decades,
    heat_picture,
    outline,
    patch_tile,
    photo,
    read_mask,
    read_picture,
    small_size,
)
from .reader import Results

ERRORS_OF_EACH = 8
"""Errors shown of every method and kind, at most."""
MAX_IMAGES = 48
"""Images shown altogether, at most."""
MAX_BYTES = 9_000_000
"""Size of all pictures, before base64 adds a third."""
EXPLAINED_OF_EACH = 4
"""Misses, false alarms and found defects of a method whose nearest patches are shown."""


@dataclass
class ErrorCard:
    """An image with its pictures."""

    image: ImageOutcomes
    picture: bytes | None = None  # JPEG; None if it is missing
    truth: bytes | None = None  # the same with the outline of the true defect; None without a defect or mask
    heat: dict[int, bytes] = field(default_factory=dict)  # heat maps by number of the method, PNG

    @property
    def size(self) -> int:
        """Bytes of all pictures."""
        return sum(len(picture) for picture in (self.picture or b"", self.truth or b"", *self.heat.values()))


def error_cards(results: Results, images: Sequence[ImageOutcomes]) -> tuple[list[ErrorCard], int | None]:
    """Draw the worst errors of all methods, as many as fit into a file that a browser opens quickly.

    Args:
        results: The comparison.
        images: All test images.

    Returns:
        The cards, worst first, and the decades of the common colour scale; None if no method has maps.
    """
    chosen = choose_errors(images, ERRORS_OF_EACH, MAX_IMAGES)
    scales: dict[int, HeatScale] = {}
    values: dict[int, dict[str, NDArray[np.float16]]] = {}
    for method, run in tqdm(results.with_images, desc="Reading the heat maps", unit="method", disable=None):
        maps = run.maps()  # one run's at a time are in memory
        if maps is None:
            continue
        # Without normal images the scale is that of all images.
        compared = np.flatnonzero(~run.labels) if not run.labels.all() else np.arange(len(maps))
        scales[method.number] = HeatScale(maps[row] for row in compared)
        values[method.number] = {
            image.image: maps[image.outcomes[method.number].row].copy()
            for image in chosen
            if method.number in image.outcomes
        }
    decades = common_decades(scale.pixels for scale in scales.values()) if scales else 1
    cards = []
    for image in tqdm(chosen, desc="Drawing the gallery", unit="image", disable=None):
        maps_of = {number: maps[image.image] for number, maps in values.items() if image.image in maps}
        levels = {number: scales[number].levels(found, decades) for number, found in maps_of.items()}
        cards.append(_draw(image, results, levels))
    return within_size(cards), decades if scales else None


def within_size(cards: Sequence[ErrorCard], max_bytes: int = MAX_BYTES) -> list[ErrorCard]:
    """Keep the first cards whose pictures have a size of at most `max_bytes` together."""
    sizes = np.cumsum([card.size for card in cards])
    return list(cards[: int(np.searchsorted(sizes, max_bytes, "right"))])


def _draw(image: ImageOutcomes, results: Results, levels: dict[int, NDArray[np.uint8]]) -> ErrorCard:
    card = ErrorCard(image)
    pixels = read_picture(results.find_image(image.image))
    mask = read_mask(results.find_image(image.mask)) if image.defective else None
    if pixels is not None:
        card.picture = photo(pixels)
        if mask is not None:
            card.truth = photo(pixels, outline(mask, small_size(pixels.size)))
    for method, level in levels.items():
        if pixels is not None:
            size = small_size(pixels.size)
        else:  # as large as a picture gets, in the shape of the map
            height, width = (max(1, round(side * SIDE / max(level.shape))) for side in level.shape)
            size = width, height
        card.heat[method] = heat_picture(level, size, outline(mask, size) if mask is not None else None)
    return card


def explained_methods(results: Results, images: Sequence[ImageOutcomes]) -> list[dict[str, Any]]:
    """Collect the explained images of every method that has explanations, with crops of the nearest patches."""
    found = []
    for method, run in results.with_images:
        explanations = read_explanations(run.folder)
        chosen = [image for image in choose_explained(images, method.number) if image.image in explanations]
        if chosen:
            cards = [
                {
                    "image": image,
                    "outcome": image.outcomes[method.number],
                    "patches": explanations[image.image],
                    "tiles": _tiles(image.image, explanations[image.image], results),
                }
                for image in chosen
            ]
            found.append({"name": method.name, "seed": run.run.seed, "total": len(explanations), "cards": cards})
    return found


def choose_explained(images: Sequence[ImageOutcomes], method: int) -> list[ImageOutcomes]:
    """Choose images to explain: a method's worst errors of both kinds, and the found defects of the highest scores."""
    chosen = worst_errors(images, method, "miss")[:EXPLAINED_OF_EACH]
    chosen += worst_errors(images, method, "false-alarm")[:EXPLAINED_OF_EACH]
    found = [
        (outcome.score, image)
        for image in images
        if image.defective and (outcome := image.outcomes.get(method)) is not None and not outcome.is_error
    ]
    return chosen + [image for _, image in sorted(found, key=lambda each: -each[0])[:EXPLAINED_OF_EACH]]


def _tiles(path: str, patches: dict[str, Any], results: Results) -> list[dict[str, Any]]:
    name = PurePath(path).name
    here = {"source": path, "row": patches["row"], "column": patches["column"]}
    tiles = []
    for title, alternative, patch in (
        ("test patch", f"Highest patch of {name}", here),
        ("closest normal", f"Normal patch nearest to that of {name}", patches["normal"]),
        ("closest defect", f"Defect patch nearest to that of {name}", patches["defect"]),
    ):
        pixels = None if patch is None else read_picture(results.find_image(str(patch["source"])))
        picture = None
        if patch is not None and pixels is not None:
            picture = patch_tile(pixels, patch["row"], patch["column"])
        tiles.append({"title": title, "alternative": alternative, "patch": patch, "picture": picture})
    return tiles
