"""Ranking metrics of many weighted samples at once, from counts by score.

Images and pixels are counted in bins of ascending scores. A resample of the test images is then a sum of their counts,
and a metric of a thousand resamples a few operations on arrays. Shapes: R resamples, B bins.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FPR_LIMIT = 0.3  # of AUPRO, as in Anomalib


def auroc(normal_RB: Array, defect_RB: Array) -> Array:
    """Area under the ROC curve: the share of pairs in order, ties counting half.

    Args:
        normal_RB: Weight of normal samples by bin, bins ascending by score.
        defect_RB: Weight of defective samples.

    Returns:
        Shape (R,).
    """
    below = np.cumsum(normal_RB, axis=-1) - normal_RB
    pairs = (defect_RB * (below + normal_RB / 2)).sum(axis=-1)
    return np.asarray(pairs / (normal_RB.sum(axis=-1) * defect_RB.sum(axis=-1)))


def average_precision(normal_RB: Array, defect_RB: Array) -> Array:
    """Average precision: precision at every threshold, weighed by the gain in recall. Arguments as in :func:`auroc`."""
    true, false = _from_the_top(defect_RB), _from_the_top(normal_RB)
    called = true + false
    precision = np.divide(true, called, out=np.zeros_like(called), where=called > 0)
    gain = defect_RB[..., ::-1] / true[..., -1:]
    return np.asarray((precision * gain).sum(axis=-1))


def best_f1(normal_RB: Array, defect_RB: Array) -> Array:
    """F1 at the best threshold. Arguments as in :func:`auroc`."""
    true, false = _from_the_top(defect_RB), _from_the_top(normal_RB)
    return np.asarray((2 * true / (true + false + true[..., -1:])).max(axis=-1))


def aupro(normal_RB: Array, regions_RB: Array, count_R: Array) -> Array:
    """Area under the mean overlap with the regions, up to a false-positive rate of 0.3 and divided by it.

    Args:
        normal_RB: Number of normal pixels by bin.
        regions_RB: Pixels of regions, each divided by the size of its region.
        count_R: Number of regions, shape (R,).

    Returns:
        Shape (R,).
    """
    false = _from_the_top(normal_RB)
    rate = _with_origin(false / false[..., -1:])
    overlap = _with_origin(_from_the_top(regions_RB) / np.asarray(count_R)[..., None])
    start, end = rate[..., :-1], np.minimum(rate[..., 1:], FPR_LIMIT)
    width = rate[..., 1:] - start
    share = np.divide(end - start, width, out=np.zeros_like(width), where=width > 0)
    at_end = overlap[..., :-1] + share * (overlap[..., 1:] - overlap[..., :-1])
    area = np.maximum(end - start, 0) * (overlap[..., :-1] + at_end) / 2
    return np.asarray(area.sum(axis=-1) / FPR_LIMIT)


def _from_the_top(weights_RB: Array) -> Array:
    """Sum from the highest bin down: what is called defective as the threshold falls."""
    return np.asarray(np.cumsum(weights_RB[..., ::-1], axis=-1, dtype=np.float64))


def _with_origin(curve_RB: Array) -> Array:
    return np.concatenate([np.zeros_like(curve_RB[..., :1]), curve_RB], axis=-1)
