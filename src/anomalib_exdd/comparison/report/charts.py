"""Layout of the report's charts: scales, ticks, bars and curves, which `templates/charts.html` draws as SVG.

A chart is 420 units wide, about a phone's width in CSS pixels, so that its texts are readable at every size. Colours
and line styles are classes of the style sheet (`m0` to `m7`, `d0` to `d3`), so that they follow the light and dark
theme. Names of methods stand beside the drawings as HTML, because a browser wraps them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from anomalib_exdd.comparison.results import METRICS, MethodResults, Results, RunResults

from .formatting import COSTS, count, number, points

Curve = NDArray[np.float64]
"""Points of a curve, shape (N, 2)."""
COLOURS = 8
DASHES = 4
BINS = 30
_STEPS = (1, 2, 2.5, 5, 10)


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


def difference_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out a forest plot of the paired differences of every metric: a row for every method."""
    charts = []
    for metric, name in METRICS.items():
        rows = [each for each in results.differences if each.metric == metric]
        if not rows:
            continue
        low, high = min(0.0, *(each.low for each in rows)), max(0.0, *(each.high for each in rows))
        margin = 0.05 * (high - low) or 0.01
        x = Scale(low - margin, high + margin, 8, 132)
        seeds = sorted({each.seeds for each in rows})
        over = count(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        charts.append({"x": x, "ticks": x.ticks(3, points), "rows": rows, "name": name, "over": over})
    return charts


def cost_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out a bar chart of every cost that was measured: a row for every method that has it."""
    charts = []
    for quantity, (name, unit, more) in COSTS.items():
        if rows := [method for method in results.methods if method.values(quantity)]:
            x = Scale(0, max(max(method.values(quantity)) for method in rows) or 1.0, 8, 228)
            texts = {"quantity": quantity, "name": name, "unit": unit, "more": more}
            charts.append({**texts, "x": x, "ticks": x.ticks(3, "{:,.10g}".format), "rows": rows})
    return charts


def curve_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out ROC and precision-recall curves of the images: every seed, and the mean over the seeds."""
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


def roc_points(run: RunResults) -> Curve:
    """Return false- and true-positive rate at every threshold, from (0, 0) to (1, 1)."""
    return np.column_stack(roc_curve(run.labels, run.scores, drop_intermediate=False)[:2])


def precision_recall_points(run: RunResults) -> Curve:
    """Return recall and precision as steps from recall 0 to 1, whose area is the average precision."""
    precision, recall, _ = precision_recall_curve(run.labels, run.scores)
    precision, recall = precision[:-1][::-1], recall[:-1][::-1]  # ascending, without scikit-learn's point at recall 0
    first = np.diff(recall, prepend=0) > 0  # the best precision that reaches this recall
    precision, recall = precision[first], recall[first]
    starts = np.concatenate(([0.0], recall[:-1]))
    return np.column_stack((np.column_stack((starts, recall)).ravel(), np.repeat(precision, 2)))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Average the heights of curves whose first coordinate ascends from 0 to 1, so that areas are averaged as well.

    Returns:
        Two points for every first coordinate of any curve: before and after a jump.
    """
    places = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    before, after = [], []
    for x, y in (curve.T for curve in curves):
        between = np.interp(places, x, y)
        first = np.searchsorted(x, places, "left").clip(max=len(x) - 1)
        last = (np.searchsorted(x, places, "right") - 1).clip(min=0)
        before.append(np.where(x[first] == places, y[first], between))
        after.append(np.where(x[last] == places, y[last], between))
    heights = np.column_stack((np.mean(before, axis=0), np.mean(after, axis=0)))
    return np.column_stack((np.repeat(places, 2), heights.ravel()))


def corners(curve: Curve) -> Curve:
    """Leave out points that repeat the one before, or lie between their neighbours, of a line that never turns back."""
    curve = curve[np.concatenate(([True], np.diff(curve, axis=0).any(axis=1)))]
    steps = np.diff(curve, axis=0)
    turns = np.abs(steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]) > 1e-12
    return curve[np.concatenate(([True], turns, [True]))] if len(curve) > 2 else curve


def histogram_charts(results: Results) -> list[dict[str, Any]]:
    """Lay out a histogram of the image scores of every method: normal images upwards, defective ones downwards."""
    charts = []
    top, middle, bottom = 8, 80, 152
    for method, run in results.first_runs:
        known = {"threshold": [run.threshold], "decision": [run.accept, run.reject]}
        limits = [(style, score) for style, scores in known.items() for score in scores if score is not None]
        edges = np.histogram_bin_edges([*run.scores, *(score for _, score in limits)], BINS)
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
        charts.append({
            "method": method, "seed": run.seed, "x": x, "ticks": x.ticks(5, number), "bars": bars, "top": top,
            "middle": middle, "bottom": bottom, "notes": prediction_notes(run),
            "limits": [(style, x(score)) for style, score in limits],
            "review": sorted(x(score) for style, score in limits if style == "decision"),
        })  # fmt: skip
    return charts


def prediction_notes(run: RunResults) -> list[str]:
    """Say what the threshold, and what the decisions, make of the test images: a sentence for each."""
    labels, scores = run.labels, run.scores
    threshold, accept, reject = run.threshold, run.accept, run.reject
    sentences = []
    if threshold is not None:
        called = scores >= threshold
        sentences.append(
            f"At the threshold {number(threshold)} (dashed) {(labels & ~called).sum()} of "
            f"{count(int(labels.sum()), 'defective image')} are missed, and {(~labels & called).sum()} of "
            f"{count(int((~labels).sum()), 'normal one')} are false alarms."
        )
    if accept is not None and reject is not None:
        accepted, rejected = scores < accept, scores >= reject
        named = (
            (f"Accepted below {number(accept)}:", accepted),
            ("for review:", ~accepted & ~rejected),
            (f"rejected from {number(reject)}:", rejected),
        )
        parts = [f"{name} {(of & ~labels).sum()} normal and {(of & labels).sum()} defective" for name, of in named]
        sentences.append("; ".join(parts) + ".")
    return sentences
