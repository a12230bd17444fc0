"""The gallery of the report: the worst misses and false alarms with all heat maps, and the nearest training patches."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from anomalib_exdd.comparison.results import read_explanations, read_maps

from .outcomes import ImageOutcomes, choose_errors, worst_errors
from .pictures import (
    common_decades,
    heat_levels,
    heat_picture,
    outline,
    patch_tile,
    photo,
    read_mask,
    read_picture,
    share_above,
    small_size,
)
from .reader import Results

ERRORS_OF_EACH = 8
"""Errors shown of every method and kind, at most."""
MAX_IMAGES = 48
"""Images shown altogether, at most, so that a browser opens the file quickly."""
EXPLAINED_OF_EACH = 4
"""Misses, false alarms and found defects of a method whose nearest patches are shown."""


def error_cards(results: Results, images: Sequence[ImageOutcomes]) -> tuple[list[dict[str, Any]], int | None]:
    """Draw the worst errors of all methods.

    Args:
        results: The comparison.
        images: All test images.

    Returns:
        The cards, worst first, and the decades of the common colour scale; None if no method has maps. A card has the
        `image` and its pictures: `picture` and `truth` (with the outline of the true defect) as JPEG, None without an
        image or a mask; `heat`: the heat maps by number of the method, PNG.
    """
    chosen = choose_errors(images, ERRORS_OF_EACH, MAX_IMAGES)
    pixels: list[int] = []
    shares: dict[str, dict[int, NDArray[np.float64]]] = {image.image: {} for image in chosen}
    for method, run in tqdm(results.first_runs, desc="Reading the heat maps", unit="method", disable=None):
        maps = read_maps(run.folder)
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
    cards = []
    for image in tqdm(chosen, desc="Drawing the gallery", unit="image", disable=None):
        levels = {number: heat_levels(found, decades or 1) for number, found in shares[image.image].items()}
        cards.append({"image": image, **_pictures(image, levels)})
    return cards, decades


def _pictures(image: ImageOutcomes, levels: Mapping[int, NDArray[np.uint8]]) -> dict[str, Any]:
    pixels, mask = read_picture(image.image), read_mask(image.mask) if image.defective else None
    heat = {}
    for method, level in levels.items():
        size = small_size(level.shape[::-1] if pixels is None else pixels.size)
        heat[method] = heat_picture(level, size, None if mask is None else outline(mask, size))
    truth = None
    if pixels is not None and mask is not None:
        truth = photo(pixels, outline(mask, small_size(pixels.size)))
    return {"picture": None if pixels is None else photo(pixels), "truth": truth, "heat": heat}


def explained_methods(results: Results, images: Sequence[ImageOutcomes]) -> list[dict[str, Any]]:
    """Collect the explained images of every method that has explanations, with crops of the nearest patches."""
    found = []
    for method, run in results.first_runs:
        explanations = read_explanations(run.folder)
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
            found.append({"name": method.name, "seed": run.run.seed, "total": len(explanations), "cards": cards})
    return found


def choose_explained(images: Sequence[ImageOutcomes], method: int) -> list[ImageOutcomes]:
    """Choose images to explain: a method's worst errors of both kinds, and the found defects of the highest scores."""
    found = [
        (outcome.score, image)
        for image in images
        if image.defective and (outcome := image.outcomes.get(method)) is not None and not outcome.is_error
    ]
    surest = [image for _, image in sorted(found, key=lambda each: -each[0])]
    groups = worst_errors(images, method, "miss"), worst_errors(images, method, "false-alarm"), surest
    return [image for group in groups for image in group[:EXPLAINED_OF_EACH]]


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
