"""Layout of the report's charts: scales, ticks, labels and positions, which `templates/charts.html` draws as SVG.

A chart is 420 units wide, about a phone's width in CSS pixels, so that its texts are readable at every size. Colours
and line styles are classes of the style sheet (`m0` to `m7`, `d0` to `d3`), so that they follow the light and dark
theme.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from anomalib_exdd.comparison.results import METRICS, Run

from .curves import Curve, corners, mean_curve, precision_recall_points, roc_points
from .formatting import COSTS, count, number, points
from .reader import MethodResults, Results, RunResults

WIDTH = 420
COLOURS = 8
DASHES = 4
BINS = 30
LABEL_GAP = 4
"""Distance of a threshold's name from its line."""
LABEL_HEIGHTS = (12, 26, 40)
"""Baselines of the names of up to three thresholds."""
_STEPS = (1, 2, 2.5, 5, 10)
_NARROW, _WIDE = frozenset("iljtfrI.,;:'|()[] "), frozenset("mwMWO@%…")
_LETTER_WIDTHS = (5.0, 7.9, 12.0)  # narrow, usual and wide letters of size 13, in wide fonts
_FONT, _LINE = 13, 15  # size of letters, and distance of lines
_NAMES, _PLOT, _TOP, _ROW = 108, 116, 8, 26  # row charts: end of the names, start of the plot, top, height of a row


class Scale(NamedTuple):
    """A linear scale from values (`low` to `high`) to positions in a drawing (`start` to `end`, ascending or not)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int, write: Callable[[float], str]) -> list[tuple[float, str]]:
        """Return position and label of about so many round values."""
        return [(self(value), write(value)) for value in round_values(self.low, self.high, about)]


def round_values(low: float, high: float, about: int) -> list[float]:
    """Choose about so many round values within a range."""
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in _STEPS if factor * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step + 0.0 for number in range(first, math.floor(high / step + 1e-9) + 1)]


def style_of(method: MethodResults) -> str:
    """Return the classes of a method's colour and line style: no two of the first 32 methods share both."""
    return f"m{method.number % COLOURS} d{(method.number + method.number // COLOURS) % DASHES}"


def text_width(text: str) -> float:
    """Return a width that a text does not exceed in any font a browser may use."""
    narrow, usual, wide = _LETTER_WIDTHS
    return sum(narrow if letter in _NARROW else wide if letter in _WIDE else usual for letter in text)


def wrapped(name: str, width: float) -> list[str]:
    """Divide a name into lines of at most a width, after spaces and punctuation where possible."""
    lines = [""]
    for part in re.findall(r"[^\s_/,-]*[\s_/,-]*", name):
        if text_width((lines[-1] + part).rstrip()) > width:
            lines.append("")
        for letter in part:
            if text_width(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [each.strip() for each in lines if each.strip()]


def row_chart(x: Scale, content: Mapping[str, Any], write: Callable[[float], str]) -> dict[str, Any]:
    """Lay out a row for every name: the lines of the name, each with its baseline, the middle of the row, its content.

    A row is as high as its name is long.
    """
    rows, top = [], float(_TOP)
    for name, each in content.items():
        lines = wrapped(name, _NAMES)
        height = _ROW + _LINE * (len(lines) - 1)
        baseline = top + (_ROW + _FONT) / 2 - 2.5
        rows.append(([(baseline + _LINE * place, line) for place, line in enumerate(lines)], top + height / 2, each))
        top += height
    return {"x": x, "ticks": x.ticks(3, write), "top": _TOP, "bottom": top, "names_end": _NAMES, "rows": rows}


def difference_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out a forest plot of the paired differences of every metric."""
    charts = []
    for metric, name in METRICS.items():
        chosen = [each for each in results.differences if each.metric == metric]
        if not chosen:
            continue
        low, high = min(0.0, *(each.low for each in chosen)), max(0.0, *(each.high for each in chosen))
        margin = 0.05 * (high - low) or 0.01
        x = Scale(low - margin, high + margin, _PLOT, 240)
        seeds = sorted({each.seeds for each in chosen})
        over = count(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        charts.append({**row_chart(x, {each.method: each for each in chosen}, points), "name": name, "over": over})
    return charts


def cost_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out a bar chart of every cost that was measured."""
    charts = []
    for quantity, (name, unit, more) in COSTS.items():
        measured = [method for method in results.methods if method.values(quantity)]
        if measured:
            highest = max(max(method.values(quantity)) for method in measured)
            x = Scale(0, highest or 1.0, _PLOT, 336)
            chart = row_chart(x, {method.name: method for method in measured}, "{:,.10g}".format)
            charts.append({**chart, "quantity": quantity, "name": name, "unit": unit, "more": more})
    return charts


def curve_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out ROC and precision-recall curves: every seed, and the mean over the seeds."""
    drawn = [(method, [run for run in method.runs if len(set(run.labels)) == 2]) for method in results.methods]
    drawn = [(method, runs) for method, runs in drawn if runs]
    if not drawn:
        return []
    prevalence = float(np.mean([run.labels.mean() for _, runs in drawn for run in runs]))
    x, y = Scale(0, 1, 44, 410), Scale(0, 1, 356, 8)

    def polyline(curve: Curve) -> str:
        return " ".join(f"{x(first):.1f},{y(second):.1f}" for first, second in corners(curve).tolist())

    charts = []
    for title, x_name, y_name, chance, points_of in (
        ("ROC", "false positive rate", "true positive rate", (0, 1), roc_points),
        ("Precision and recall", "recall", "precision", (prevalence, prevalence), precision_recall_points),
    ):
        lines = []
        for method, runs in drawn:
            curves = [points_of(run) for run in runs]
            seeds = [polyline(curve) for curve in curves] if len(curves) > 1 else []
            lines.append((method, seeds, polyline(mean_curve(curves))))
        texts = {"title": title, "x_name": x_name, "y_name": y_name}
        charts.append({**texts, "chance": chance, "lines": lines, "x": x, "y": y})
    return charts


class Threshold(NamedTuple):
    """A score at which the prediction changes: its name, the score, and the class of its line."""

    name: str
    score: float
    style: str


def thresholds_of(run: Run) -> list[Threshold]:
    """Collect the finite thresholds of a run."""
    known = (
        ("threshold", run.threshold, "threshold"),
        ("accept below", run.accept, "decision"),
        ("reject from", run.reject, "decision"),
    )
    return [Threshold(name, score, style) for name, score, style in known if score is not None and np.isfinite(score)]


def histogram_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out a histogram of the image scores of every method: normal images upwards, defective ones downwards."""
    charts = []
    top, middle, bottom = 48, 120, 192
    for method, run in results.first_runs:
        thresholds = thresholds_of(run.run)
        edges = np.histogram_bin_edges([*run.scores, *(each.score for each in thresholds)], BINS)
        x = Scale(float(edges[0]), float(edges[-1]), 12, 408)
        of_label = {"normal": run.scores[~run.labels], "defective": run.scores[run.labels]}
        shares = {kind: np.histogram(found, edges)[0] / max(1, len(found)) for kind, found in of_label.items()}
        tallest = max(1e-9, *(float(each.max()) for each in shares.values()))
        bars = [
            (kind, x(left) + 0.5, x(right) - x(left) - 1, middle - height if kind == "normal" else middle, height)
            for kind, found in shares.items()
            for left, right, height in zip(edges[:-1], edges[1:], found / tallest * (middle - top), strict=True)
            if height > 0
        ]
        decides = {"accept below", "reject from"} <= {each.name for each in thresholds}
        charts.append({
            "method": method, "seed": run.run.seed, "x": x, "ticks": x.ticks(5, number), "bars": bars, "top": top,
            "middle": middle, "bottom": bottom, "labels": place_labels(thresholds, x), "heights": LABEL_HEIGHTS,
            "gap": LABEL_GAP, "notes": prediction_counts(run),
            "review": sorted((x(run.run.accept or 0), x(run.run.reject or 0))) if decides else None,
        })  # fmt: skip
    return charts


def prediction_counts(run: RunResults) -> list[str]:
    """Count predictions of the test images by label, a sentence for the threshold and one for the decisions."""
    labels, scores = run.labels, run.scores
    threshold, accept, reject = run.run.threshold, run.run.accept, run.run.reject
    sentences = []
    if threshold is not None:
        called = scores >= threshold
        sentences.append(
            f"At the threshold {(labels & ~called).sum()} of {count(int(labels.sum()), 'defective image')} are missed, "
            f"and {(~labels & called).sum()} of {count(int((~labels).sum()), 'normal one')} are false alarms."
        )
    if accept is not None and reject is not None:
        accepted, rejected = scores < accept, scores >= reject
        named = (("Accepted:", accepted), ("for review:", ~accepted & ~rejected), ("rejected:", rejected))
        parts = [f"{name} {(of & ~labels).sum()} normal and {(of & labels).sum()} defective" for name, of in named]
        sentences.append("; ".join(parts) + ".")
    return sentences


def place_labels(thresholds: Sequence[Threshold], x: Scale) -> list[tuple[Threshold, bool]]:
    """Order thresholds so that no line crosses the name of another.

    Each name has a height of its own, and a line begins at its name. So only lines of higher names can cross a name:
    names to the right of their lines descend to the right, names to the left of their lines descend to the left.

    Returns:
        The thresholds, that of the highest name first, each with whether its name is to the left of its line.
    """
    ends = {each: (x(each.score), LABEL_GAP + text_width(each.name)) for each in thresholds}
    if all(place + width <= WIDTH for place, width in ends.values()):
        left = set()
    elif all(place >= width for place, width in ends.values()):
        left = set(thresholds)
    else:  # some are close to either edge: those of one half are far from the names of the other
        left = {each for each, (place, _) in ends.items() if place > WIDTH / 2}
    ordered = sorted(thresholds, key=lambda each: -each.score if each in left else each.score)
    return [(each, each in left) for each in ordered]
