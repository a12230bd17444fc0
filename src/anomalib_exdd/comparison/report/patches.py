"""Why a method that explains itself scores as it does: its highest patch beside the nearest training patches."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from anomalib_exdd.comparison.results import NearestPatches
from anomalib_exdd.reporting.markup import escape

from .formatting import count, number
from .outcomes import JudgedImage, worst_errors
from .reader import MethodResults, Results
from .thumbnails import TILE, data_uri, patch_tile, read_picture

OF_EACH_KIND = 4
"""Images shown of a method: so many misses, false alarms, and defects that it found."""


def patches_section(results: Results, judged: Sequence[JudgedImage]) -> str:
    """Make the section of nearest patches, a part for every method that has some.

    Args:
        results: The comparison.
        judged: All test images, see :func:`.judge_images`.
    """
    parts = []
    for method, run in results.pictured:
        explanations = run.explanations()
        chosen = [image for image in choose_explained(judged, method.number) if image.image in explanations]
        if chosen:
            cards = "".join(_card(image, method, explanations[image.image], results) for image in chosen)
            shown = (
                f"{len(chosen)} of {count(len(explanations), 'explained image')}: the worst misses, the worst false "
                f"alarms and the clearest defects found, of seed {run.run.seed}."
            )
            parts.append(
                f'<h3>{escape(method.name)}</h3><p class="faint">{shown}</p><div class="explained">{cards}</div>'
            )
    if not parts:
        return "<p>No method of this comparison says which training patches its scores rest on.</p>"
    explained = (
        '<p class="faint">The highest patch of a test image, and the training patches nearest to it in feature space: '
        "a smaller distance is more alike.</p>"
    )
    return explained + "".join(parts)


def choose_explained(judged: Sequence[JudgedImage], method: int) -> list[JudgedImage]:
    """Choose images to explain: a method's worst errors of both kinds, and the defects that it is surest of."""
    chosen = [*worst_errors(judged, method, "miss")[:OF_EACH_KIND]]
    chosen += worst_errors(judged, method, "false-alarm")[:OF_EACH_KIND]
    found = [
        image for image in judged
        if image.defective and method in image.judgements and not image.judgements[method].is_error
    ]  # fmt: skip
    return chosen + sorted(found, key=lambda image: -image.judgements[method].score)[:OF_EACH_KIND]


def _card(image: JudgedImage, method: MethodResults, patches: NearestPatches, results: Results) -> str:
    judgement = image.judgements[method.number]
    name = PurePath(image.image).name
    kind = image.kind if judgement.is_error else "found"
    label = kind.replace("-", " ")
    here = {"source": image.image, "row": patches.row, "column": patches.column}
    tiles = _tile(here, f"Highest patch of {name}", "test patch", results)
    tiles += _tile(patches.normal, f"Normal patch nearest to that of {name}", "closest normal", results)
    if patches.defect is None:
        tiles += '<figure><div class="blank">no bank of defects</div><figcaption>closest defect</figcaption></figure>'
        nearer = ""
    else:
        tiles += _tile(patches.defect, f"Defect patch nearest to that of {name}", "closest defect", results)
        to_defect = float(patches.defect["distance"]) < float(patches.normal["distance"])
        nearer = f", nearer to {'a known defect' if to_defect else 'normal'}"
    if patches.reason is not None:
        nearer = f", {escape(patches.reason)}"
    word = f", called <em>{judgement.word}</em>" if judgement.word else ""
    return (
        f'<article class="card"><h4>{escape(name)} <span class="badge {kind}">{label}</span></h4>'
        f"<p>score {number(judgement.score)}{word}{nearer}</p>"
        f'<div class="strip tiles">{tiles}</div></article>'
    )


def _tile(patch: dict[str, Any], alternative: str, title: str, results: Results) -> str:
    source = str(patch["source"])
    image = read_picture(results.find_image(source))
    if image is None:
        shown = '<div class="blank">image not found</div>'
    else:
        tile = data_uri(patch_tile(image, float(patch["row"]), float(patch["column"])))
        shown = f'<img src="{tile}" alt="{escape(alternative)}" width="{TILE}" height="{TILE}">'
    distance = f"<br>distance {number(float(patch['distance']))}" if "distance" in patch else ""
    return (
        f"<figure>{shown}<figcaption><strong>{title}</strong>{distance}<br>"
        f'<span class="path" title="{escape(source)}">{escape(PurePath(source).name)}</span></figcaption></figure>'
    )
