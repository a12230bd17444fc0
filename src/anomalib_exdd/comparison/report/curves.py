"""ROC and precision-recall curves at image level: every seed thin, their mean thick.

Curves depend on the order of the scores alone, so they are drawn from ranks; a score that is not a number counts as the
lowest. A mean curve averages heights at equal false positive rate, or equal recall. Precision is drawn as the steps
whose area is the average precision; so the area below a mean curve is the mean of the seeds' areas.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from anomalib_exdd.comparison.results import METRICS
from anomalib_exdd.reporting.markup import escape

from .charts import Scale, figure, key, line, panels, polyline, style_of, svg, text, x_axis, y_axis
from .formatting import percent
from .reader import MethodResults, Results, RunResults

Curve = NDArray[np.float64]
_WIDTH, _HEIGHT = 420, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 410, 8, 356
_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def rank_scores(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Replace scores by their ranks, equal ones by equal ranks; NaN is the lowest."""
    filled = np.where(np.isnan(scores), -np.inf, scores)
    ranks: NDArray[np.int64] = np.unique(filled, return_inverse=True)[1].reshape(-1)
    return ranks


def roc_points(run: RunResults) -> Curve:
    """Return false and true positive rate at every threshold, from (0, 0) to (1, 1), shape (N, 2)."""
    false_rate, true_rate, _ = roc_curve(run.labels, rank_scores(run.scores), drop_intermediate=False)
    return np.column_stack((false_rate, true_rate))


def precision_recall_points(run: RunResults) -> Curve:
    """Return recall and precision as steps from recall 0 to 1, shape (N, 2); their area is the average precision."""
    precision, recall, _ = precision_recall_curve(run.labels, rank_scores(run.scores))
    precision, recall = precision[:-1][::-1], recall[:-1][::-1]  # by growing recall, without the made-up end at 0
    first = np.concatenate(([True], np.diff(recall) > 0))  # the best precision that reaches this recall
    precision, recall = precision[first], recall[first]
    if recall[0] == 0:  # thresholds above every defective image
        precision, recall = precision[1:], recall[1:]
    starts = np.concatenate(([0.0], recall[:-1]))
    return np.column_stack((np.column_stack((starts, recall)).ravel(), np.repeat(precision, 2)))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Average curves whose first coordinate grows from 0 to 1; where they jump, both ends are averaged.

    Args:
        curves: Points, each of shape (N, 2).

    Returns:
        Points, shape (M, 2), two for every first coordinate of any curve.
    """
    places = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    before = np.mean([_height(curve, places, "left") for curve in curves], axis=0)
    after = np.mean([_height(curve, places, "right") for curve in curves], axis=0)
    return np.column_stack((np.repeat(places, 2), np.column_stack((before, after)).ravel()))


def _height(curve: Curve, places: NDArray[np.float64], side: str) -> NDArray[np.float64]:
    """Return a curve's height on one side of places; where it jumps, `left` is before the jump, `right` after it."""
    x, y = curve[:, 0], curve[:, 1]
    if side == "left":
        at = np.searchsorted(x, places, "left").clip(max=len(x) - 1)
    else:
        at = (np.searchsorted(x, places, "right") - 1).clip(min=0)
    return np.where(x[at] == places, y[at], np.interp(places, x, y))


def curves_section(results: Results) -> str:
    """Make the section of both curves with the legend that they share."""
    drawn = [(method, [run for run in method.runs if run.has_both_classes]) for method in results.methods]
    drawn = [(method, runs) for method, runs in drawn if runs]
    if not drawn:
        return "<p>There are no curves: they need normal and defective test images with scores.</p>"
    legend = "".join(_legend_entry(method) for method, _ in drawn)
    prevalence = float(np.mean([run.labels.mean() for _, runs in drawn for run in runs]))
    roc = _chart("ROC", "false positive rate", "true positive rate", drawn, roc_points, ((0, 0), (1, 1)))
    chance = ((0, prevalence), (1, prevalence))
    precision = _chart("Precision and recall", "recall", "precision", drawn, precision_recall_points, chance)
    several = any(len(runs) > 1 for _, runs in drawn)
    seeds = "Thin: every seed; thick: their mean. " if several else ""
    return (
        f'<p class="faint">{seeds}Dotted grey: what guessing would give.</p>'
        f'<fieldset class="legend"><legend>Methods drawn</legend>{legend}</fieldset>' + panels([roc, precision])
    )


def _legend_entry(method: MethodResults) -> str:
    """Return a check box that hides a method's lines; the style sheet does it, without a script."""
    facts = " ".join(f"{METRICS[metric]} {percent(method.mean(metric))}" for metric in ("image_AUROC", "image_AP"))
    name = f'{escape(method.name)} <span class="faint">{facts}</span>'
    box = f'<input type="checkbox" checked autocomplete="off" data-method="{method.number}">'
    return f"<label>{box}{key(method)}<span>{name}</span></label>"


def _chart(
    title: str,
    x_name: str,
    y_name: str,
    drawn: Sequence[tuple[MethodResults, Sequence[RunResults]]],
    points_of: Callable[[RunResults], Curve],
    guessing: tuple[tuple[float, float], tuple[float, float]],
) -> str:
    x, y = Scale(0, 1, _LEFT, _RIGHT), Scale(0, 1, _BOTTOM, _TOP)
    (x1, y1), (x2, y2) = guessing
    body = x_axis(x, _TICKS, _TOP, _BOTTOM, "{:.1f}".format) + y_axis(y, _TICKS, _LEFT, _RIGHT, "{:.1f}".format)
    body += line(x(x1), y(y1), x(x2), y(y2), "guess")
    body += text((_LEFT + _RIGHT) / 2, _BOTTOM + 34, x_name, "middle")
    middle = (_TOP + _BOTTOM) / 2
    body += f'<text transform="translate(12 {middle:g}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'
    for method, runs in drawn:
        curves = [points_of(run) for run in runs]
        lines = "".join(polyline(curve, x, y, "seed") for curve in curves) if len(curves) > 1 else ""
        lines += polyline(mean_curve(curves), x, y, "mean")
        which = f'class="{style_of(method)}" data-method="{method.number}"'
        body += f"<g {which}><title>{escape(method.name)}</title>{lines}</g>"
    names = ", ".join(method.name for method, _ in drawn)
    return figure(svg(_WIDTH, _HEIGHT, f"{title} of {names}", body), f"<h3>{title}</h3>")
