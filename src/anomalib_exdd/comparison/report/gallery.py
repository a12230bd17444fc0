"""The worst misses and false alarms of all methods: image, true defect, and the heat map of every method.

Cards stand worst first; a script hides and sorts them by method and kind of error. Without it all of them are there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from anomalib_exdd.reporting.markup import escape

from .charts import svg, text
from .formatting import count, number
from .heatmaps import LEVELS, HeatScale, common_decades, decade_names, palette
from .outcomes import JudgedImage, Judgement, choose_errors
from .reader import MethodResults, Results
from .thumbnails import SIDE, data_uri, heat_picture, outline, photo, read_mask, read_picture, small_size

EACH = 8
"""Errors shown of every method and kind, at most."""
MOST = 48
"""Images shown altogether, at most."""
MOST_BYTES = 9_000_000
"""Of all pictures, before they are written as text, which takes a third more."""


@dataclass
class ErrorCard:
    """An image with its pictures.

    Attributes:
        judged: The image.
        image: Its picture, JPEG; None if it is gone.
        truth: The picture with the outline of the true defect; None without a defect or mask.
        heat: Heat maps by number of the method, PNG.
    """

    judged: JudgedImage
    image: bytes | None = None
    truth: bytes | None = None
    heat: dict[int, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all pictures."""
        return sum(len(picture) for picture in (self.image or b"", self.truth or b"", *self.heat.values()))


def gallery_section(results: Results, judged: Sequence[JudgedImage]) -> str:
    """Make the section of the gallery.

    Args:
        results: The comparison.
        judged: All test images, see :func:`.judge_images`.
    """
    errors = [image for image in judged if image.errors]
    if not judged:
        return "<p>There are no test images with scores.</p>"
    if not errors:
        return "<p>No method makes an error that the ranking or a threshold shows.</p>"
    cards, decades = draw_cards(results, choose_errors(judged, EACH, MOST))
    shown = within_budget(cards)
    methods = [method for method, _ in results.pictured]
    limits = f"the worst {EACH} of every method and kind, at most {MOST} images"
    summary = f"{len(shown)} of the {count(len(errors), 'image')} with an error of any method are shown: {limits}."
    explained = (
        '<p class="faint">An error here is an image on the wrong side of images of the other class, or of the '
        "method's own threshold. It is the worse the more of them it is beyond, so that methods with different scales "
        f"compare. From the first seed of each method ({_seeds(results)}). {summary}</p>"
    )
    body = "".join(_card(card, methods) for card in shown)
    return explained + _scale_note(decades) + _filters(methods, len(shown)) + f'<div id="cards">{body}</div>'


def _seeds(results: Results) -> str:
    seeds = {run.run.seed for _, run in results.pictured}
    if len(seeds) == 1:
        return f"seed {seeds.pop()}"
    return ", ".join(f"{escape(method.name)}: {run.run.seed}" for method, run in results.pictured)


def draw_cards(results: Results, chosen: Sequence[JudgedImage]) -> tuple[list[ErrorCard], int | None]:
    """Draw the pictures of images; one run's maps at a time are in memory.

    Args:
        results: The comparison.
        chosen: Images to draw.

    Returns:
        A card for each, and the decades of the common colour scale; None if no method has maps.
    """
    scales: dict[int, HeatScale] = {}
    values: dict[int, dict[str, NDArray[np.float16]]] = {}
    for method, run in tqdm(results.pictured, desc="Reading the heat maps", unit="method", disable=None):
        maps = run.maps()
        if maps is None:
            continue
        # Without a normal image there is nothing better to compare with than all images.
        compared = np.flatnonzero(~run.labels) if not run.labels.all() else np.arange(len(maps))
        scales[method.number] = HeatScale(maps[row] for row in compared)
        values[method.number] = {
            image.image: maps[image.judgements[method.number].row].copy()
            for image in chosen
            if method.number in image.judgements
        }
    decades = common_decades(scale.pixels for scale in scales.values()) if scales else None
    cards = []
    for judged in tqdm(chosen, desc="Drawing the gallery", unit="image", disable=None):
        levels = {
            number: scales[number].levels(maps[judged.image], decades)
            for number, maps in values.items()
            if judged.image in maps and decades is not None
        }
        cards.append(_draw(judged, results, levels))
    return cards, decades


def _draw(judged: JudgedImage, results: Results, levels: dict[int, NDArray[np.uint8]]) -> ErrorCard:
    card = ErrorCard(judged)
    image = read_picture(results.find_image(judged.image))
    mask = read_mask(results.find_image(judged.mask)) if judged.defective else None
    if image is not None:
        card.image = photo(image)
        if mask is not None:
            card.truth = photo(image, outline(mask, small_size(image.size)))
    for method, level in levels.items():
        size = small_size(image.size) if image is not None else _grown(level)
        card.heat[method] = heat_picture(level, size, outline(mask, size) if mask is not None else None)
    return card


def _grown(levels_hw: NDArray[np.uint8]) -> tuple[int, int]:
    """Choose the size of a map's picture where the image is gone: as large as a picture gets, in the map's shape."""
    height, width = levels_hw.shape
    scale = SIDE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def within_budget(cards: Sequence[ErrorCard], most_bytes: int = MOST_BYTES) -> list[ErrorCard]:
    """Keep cards, the first ones first, as long as their pictures fit into a file that a browser opens quickly."""
    sizes = np.cumsum([card.size for card in cards])
    return list(cards[: int(np.searchsorted(sizes, most_bytes, "right"))])


def _scale_note(decades: int | None) -> str:
    """Explain the colours, with a colour bar."""
    if decades is None:
        return '<p class="faint">No method left heat maps.</p>'
    left, right = 16, 392
    width = (right - left) / LEVELS
    body = "".join(
        f'<rect x="{left + level * width:.2f}" y="2" width="{width + 0.3:.2f}" height="16" '
        f'shape-rendering="crispEdges" fill="rgb({red},{green},{blue})"/>'
        for level, (red, green, blue) in enumerate(palette().tolist())
    )
    names = decade_names(decades)
    for place, name in enumerate(names):
        body += text(left + (right - left) * place / decades, 32, name, "middle")
    bar = svg(420, 38, f"Colour scale from dark to bright: {', '.join(names)} of normal pixels below", body)
    return (
        '<div class="scale"><p class="faint">Heat maps, one scale for all methods: the share of all pixels of normal '
        f"test images that lie below the pixel's value, by that method. Outlined: the true defect.</p>{bar}</div>"
    )


def _filters(methods: Sequence[MethodResults], shown: int) -> str:
    """Make the buttons; the script brings them out, because nothing but it can serve them."""
    method_buttons = _button("method", "", "all", pressed=True)
    method_buttons += "".join(_button("method", str(method.number), method.name, pressed=False) for method in methods)
    kinds = (("", "all"), ("miss", "misses"), ("false-alarm", "false alarms"))
    kind_buttons = "".join(_button("kind", value, label, pressed=not value) for value, label in kinds)
    return (
        '<div id="filters" class="filters" hidden>'
        f'<div role="group" aria-label="Errors of method"><span aria-hidden="true">Method</span>{method_buttons}</div>'
        f'<div role="group" aria-label="Kind of error"><span aria-hidden="true">Errors</span>{kind_buttons}</div>'
        f'<p id="tally" role="status">{count(shown, "image")}</p></div>'
    )


def _button(group: str, value: str, label: str, *, pressed: bool) -> str:
    state = str(pressed).lower()
    return (
        f'<button type="button" data-{group}="{escape(value)}" aria-pressed="{state}">'
        f'<span class="tick" aria-hidden="true">✓ </span>{escape(label)}</button>'
    )


def _card(card: ErrorCard, methods: Sequence[MethodResults]) -> str:
    judged = card.judged
    name = PurePath(judged.image).name
    what = "defective" if judged.defective else "normal"
    severities = " ".join(f"{each.method.number}:{each.severity:.6f}" for each in judged.errors)
    pictures = _panel(card.image, f"Test image {name}", "image", "image not found")
    missing = "mask or image not found" if judged.defective else "none: a normal image"
    pictures += _panel(card.truth, f"True defect in {name}", "true defect", missing)
    for method in methods:
        pictures += _panel(
            card.heat.get(method.number),
            f"Heat map of {method.name} for {name}",
            _judged(method, judged.judgements.get(method.number), defective=judged.defective),
            "no heat map",
        )
    return (
        f'<article class="card" data-kind="{judged.kind}" data-severity="{severities}">'
        f'<h3>{escape(name)} <span class="badge {judged.kind}">{judged.kind.replace("-", " ")}</span></h3>'
        f'<p class="path">{what}: {escape(judged.image)}</p><div class="strip">{pictures}</div></article>'
    )


def _panel(picture: bytes | None, alternative: str, caption: str, missing: str) -> str:
    if picture is None:
        shown = f'<div class="blank">{missing}</div>'
    else:
        shown = f'<img src="{data_uri(picture)}" alt="{escape(alternative)}">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _judged(method: MethodResults, judgement: Judgement | None, *, defective: bool) -> str:
    """Say what a method makes of an image: HTML for the caption of its heat map."""
    name = f"<strong>{escape(method.name)}</strong>"
    if judgement is None:
        return f"{name}<br>did not see it"
    parts = [f"score {number(judgement.score)}"]
    if judgement.word:
        parts[0] += f", called <em>{judgement.word}</em>"
    if judgement.others:
        whose = "normal score higher" if defective else "defective score lower"
        equal = f", {judgement.equal} equal" if judgement.equal else ""
        parts.append(f"{judgement.beyond} of {judgement.others} {whose}{equal}")
    flag = ' <span class="wrong">✗ error</span>' if judgement.is_error else ""
    return f"{name}{flag}<br>{'<br>'.join(parts)}"
