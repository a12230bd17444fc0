"""ROC and precision-recall curves at image level, of single runs and their mean.

A mean curve averages heights at equal false-positive rate, or equal recall. Precision is drawn as the steps whose area
is the average precision, so that the area under a mean curve is the mean of the areas.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from .reader import RunResults

Curve = NDArray[np.float64]
"""Points of a curve, shape (N, 2)."""


def roc_points(run: RunResults) -> Curve:
    """Return false- and true-positive rate at every threshold, from (0, 0) to (1, 1)."""
    return np.column_stack(roc_curve(run.labels, run.scores, drop_intermediate=False)[:2])


def precision_recall_points(run: RunResults) -> Curve:
    """Return recall and precision as steps from recall 0 to 1; their area is the average precision."""
    precision, recall, _ = precision_recall_curve(run.labels, run.scores)
    precision, recall = precision[:-1][::-1], recall[:-1][::-1]  # ascending, without scikit-learn's point at recall 0
    first = np.diff(recall, prepend=0) > 0  # the best precision that reaches this recall
    precision, recall = precision[first], recall[first]
    starts = np.concatenate(([0.0], recall[:-1]))
    return np.column_stack((np.column_stack((starts, recall)).ravel(), np.repeat(precision, 2)))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Average curves whose first coordinate ascends from 0 to 1; where they jump, both ends are averaged.

    Returns:
        Two points for every first coordinate of any curve.
    """
    places = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    before = np.mean([_height(curve, places, "left") for curve in curves], axis=0)
    after = np.mean([_height(curve, places, "right") for curve in curves], axis=0)
    return np.column_stack((np.repeat(places, 2), np.column_stack((before, after)).ravel()))


def corners(curve: Curve) -> Curve:
    """Leave out points that repeat the one before, or lie between their neighbours, of a line that never turns back."""
    curve = curve[np.concatenate(([True], np.diff(curve, axis=0).any(axis=1)))]
    steps = np.diff(curve, axis=0)
    turns = np.abs(steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]) > 1e-12
    return curve[np.concatenate(([True], turns, [True]))] if len(curve) > 2 else curve


def _height(curve: Curve, places: NDArray[np.float64], side: str) -> NDArray[np.float64]:
    """Return a curve's height at places; where it jumps, before the jump (`left`) or after it (`right`)."""
    x, y = curve[:, 0], curve[:, 1]
    if side == "left":
        at = np.searchsorted(x, places, "left").clip(max=len(x) - 1)
    else:
        at = (np.searchsorted(x, places, "right") - 1).clip(min=0)
    return np.where(x[at] == places, y[at], np.interp(places, x, y))
