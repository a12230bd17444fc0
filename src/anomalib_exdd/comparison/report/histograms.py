"""Score histograms of every method: normal images upwards, defective ones downwards, and the thresholds between them.

Every method has an axis of its own, because scores of different methods have nothing in common.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.comparison.results import Run
from anomalib_exdd.reporting.markup import escape

from .charts import Scale, figure, line, panels, svg, text, text_width, ticks, x_axis
from .formatting import count, number
from .reader import MethodResults, Results, RunResults

BINS = 30
_HATCH = (  # for all panels; a browser finds it by its name
    '<svg class="definitions" aria-hidden="true"><defs><pattern id="hatch" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="6" height="6" class="hatch-ground"/>'
    '<line x1="0" y1="0" x2="0" y2="6" class="hatch-line"/></pattern></defs></svg>'
)
_WIDTH, _LEFT, _RIGHT = 420, 12, 408
_TOP, _MIDDLE, _BOTTOM = 48, 120, 192  # of the bars
_LABELS, _GAP = (12, 26, 40), 4  # above them, heights of the thresholds' names, and their distance from their lines


@dataclass(frozen=True)
class Threshold:
    """A score at which the verdict on an image changes.

    Attributes:
        name: What the line is called.
        score: Where it stands.
        classes: Its look.
    """

    name: str
    score: float
    classes: str


def thresholds_of(run: Run) -> list[Threshold]:
    """Collect the thresholds that a run has, those that are not finite left out."""
    known = (
        Threshold("threshold", _score(run.threshold), "threshold"),
        Threshold("accept below", _score(run.accept), "decision"),
        Threshold("reject from", _score(run.reject), "decision"),
    )
    return [each for each in known if np.isfinite(each.score)]


def _score(value: float | None) -> float:
    return float("nan") if value is None else value


def histograms_section(results: Results) -> str:
    """Make the section of histograms, a panel for every method that has scores."""
    drawn = [_panel(method, run) for method, run in results.pictured if np.isfinite(run.scores).any()]
    if not drawn:
        return "<p>There are no image scores to draw.</p>"
    explained = (
        '<p class="faint">Share of the normal images (upwards) and of the defective ones (downwards, hatched) by image '
        "score, from the first seed of each method. Dashed: Anomalib's threshold. Solid: accept, review between "
        "(shaded), reject, where the method decides so. Scores of different methods have no common scale. "
        f"{results.comparison.threshold_note}</p>"
    )
    return explained + _HATCH + panels(drawn)


def _panel(method: MethodResults, run: RunResults) -> str:
    finite = np.isfinite(run.scores)
    scores, labels = run.scores[finite], run.labels[finite]
    thresholds = thresholds_of(run.run)
    edges = histogram_edges(scores, [each.score for each in thresholds])
    scale = Scale(float(edges[0]), float(edges[-1]), _LEFT, _RIGHT)
    normal, defective = (_shares(scores[labels == label], edges) for label in (False, True))
    tallest = max(float(normal.max()), float(defective.max()), 1e-9)
    body = _review_band(run.run, scale)
    body += x_axis(scale, ticks(scale.low, scale.high, 5), _TOP, _BOTTOM, number)
    body += _bars(normal, edges, scale, (_MIDDLE - _TOP) / tallest, "normal")
    body += _bars(defective, edges, scale, (_TOP - _MIDDLE) / tallest, "defective")
    body += line(_LEFT, _MIDDLE, _RIGHT, _MIDDLE, "zero")
    body += text(_LEFT, _BOTTOM + 32, "normal ↑  defective ↓  (share of each)") + text(
        _RIGHT, _BOTTOM + 32, "score", "end"
    )
    body += _lines(thresholds, scale)
    drawing = svg(_WIDTH, _BOTTOM + 38, f"Histogram of the scores of {method.name}", body)
    left_out = int((~finite).sum())
    notes = [f"Seed {run.run.seed}."]
    if left_out:
        notes.append(f"{count(left_out, 'score is', 'scores are')} not finite and not drawn.")
    notes.extend(outcomes(run))
    return figure(drawing, f"<h3>{escape(method.name)}</h3> {' '.join(notes)}")


def histogram_edges(scores: NDArray[np.float64], marks: list[float]) -> NDArray[np.float64]:
    """Divide the range of scores and thresholds into equal bins.

    Args:
        scores: Finite scores, at least one.
        marks: Thresholds, which have to be on the axis too.

    Returns:
        Edges, ascending, shape (BINS + 1,).
    """
    low, high = (float(end([*scores.tolist(), *marks])) for end in (min, max))
    if low == high:
        margin = max(abs(low), 1.0) / 2
        low, high = low - margin, high + margin
    return np.linspace(low, high, BINS + 1)


def outcomes(run: RunResults) -> list[str]:
    """Say what the thresholds make of the test images, a sentence for each kind of threshold."""
    labels, scores = run.labels, run.scores
    defective, normal = int(labels.sum()), int((~labels).sum())
    sentences = []
    if run.run.threshold is not None:
        called = scores >= run.run.threshold
        missed, false_alarms = int((labels & ~called).sum()), int((~labels & called).sum())
        sentences.append(
            f"At the threshold {missed} of {count(defective, 'defective image')} are missed, "
            f"and {false_alarms} of {count(normal, 'normal one')} are false alarms."
        )
    if run.run.accept is not None and run.run.reject is not None:
        accepted, rejected = scores < run.run.accept, scores >= run.run.reject
        reviewed = ~accepted & ~rejected
        parts = [
            f"{word} {int((which & ~labels).sum())} normal and {int((which & labels).sum())} defective"
            for word, which in (("Accepted:", accepted), ("for review:", reviewed), ("rejected:", rejected))
        ]
        sentences.append("; ".join(parts) + ".")
    return sentences


def _shares(scores: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.histogram(scores, edges)[0] / max(1, len(scores))


def _bars(shares: NDArray[np.float64], edges: NDArray[np.float64], scale: Scale, height: float, classes: str) -> str:
    """Draw bars from the middle line; a negative height lets them hang."""
    bars = ""
    for left, right, share in zip(edges[:-1], edges[1:], shares, strict=True):
        if share > 0:
            size = abs(share * height)
            top = _MIDDLE - size if height > 0 else _MIDDLE
            box = f'x="{scale(left) + 0.5:.1f}" width="{scale(right) - scale(left) - 1:.1f}"'
            bars += f'<rect {box} y="{top:.1f}" height="{size:.1f}" class="{classes}"/>'
    return bars


def _review_band(run: Run, scale: Scale) -> str:
    if run.accept is None or run.reject is None or not np.isfinite([run.accept, run.reject]).all():
        return ""
    left, right = sorted((scale(run.accept), scale(run.reject)))
    return f'<rect x="{left:.1f}" width="{right - left:.1f}" y="{_TOP}" height="{_BOTTOM - _TOP}" class="review"/>'


def _lines(thresholds: list[Threshold], scale: Scale) -> str:
    drawn = ""
    for y, (each, is_left) in zip(_LABELS, place_labels(thresholds, scale), strict=False):
        x = scale(each.score)
        drawn += line(x, y - 9, x, _BOTTOM, each.classes)
        drawn += text(x - _GAP if is_left else x + _GAP, y, each.name, "end" if is_left else "start")
    return drawn


def place_labels(thresholds: Sequence[Threshold], scale: Scale) -> list[tuple[Threshold, bool]]:
    """Order thresholds so that the name of none lies on the line of another, however close they are.

    Each name has a height of its own, and a line begins at its name. So a name is crossed by the lines of higher names
    only: names to the right of their lines descend to the right, names to the left of them descend to the left.

    Args:
        thresholds: At most three.
        scale: Where they stand in the drawing.

    Returns:
        The thresholds, the highest name first, each with whether its name stands to the left of its line.
    """
    places = [scale(each.score) for each in thresholds]
    widths = [_GAP + text_width(each.name) for each in thresholds]
    if all(place + width <= _WIDTH for place, width in zip(places, widths, strict=True)):
        left = set()
    elif all(place >= width for place, width in zip(places, widths, strict=True)):
        left = set(thresholds)
    else:  # some are close to either edge: those of one half are far from the names of the other
        left = {each for each, place in zip(thresholds, places, strict=True) if place > _WIDTH / 2}
    ordered = sorted(thresholds, key=lambda each: -each.score if each in left else each.score)
    return [(each, each in left) for each in ordered]
