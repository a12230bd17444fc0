"""Metrics of a run on raw scores of any size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_exdd.comparison.measure import (
    best_f1_threshold,
    image_metrics,
    pixel_metrics,
    small_maps,
    unit_interval,
)

FLOATS = st.floats(width=32, allow_nan=False)


@given(arrays.arrays(np.float32, st.integers(1, 20), elements=FLOATS))
def test_unit_interval_keeps_the_order_and_the_ties(values: np.ndarray) -> None:
    mapped = unit_interval(torch.from_numpy(values)).numpy()
    assert mapped.min() >= 0
    assert mapped.max() <= 1
    assert np.array_equal(mapped[:, None] < mapped, values[:, None] < values)
    assert np.array_equal(mapped[:, None] == mapped, values[:, None] == values)


@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1, 60), (0.001, 0.5), (100, -3000)])
def test_metrics_do_not_depend_on_the_scale_of_scores(scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    scores = (torch.randn(80, generator=generator) + labels) * scale + offset
    found = image_metrics(scores, labels)
    assert found["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert found["image_AP"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    masks = labels.bool().reshape(2, 8, 5)
    pixels = pixel_metrics(scores.reshape(2, 8, 5), masks)
    assert pixels["pixel_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert pixels["pixel_AP"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    assert 0 < pixels["AUPRO"] <= 1


def test_metrics_that_mean_nothing_are_left_out() -> None:
    assert image_metrics(torch.rand(4), torch.zeros(4).long()) == {}
    assert pixel_metrics(torch.rand(2, 3, 3), torch.zeros(2, 3, 3).bool()) == {}


def test_threshold_is_in_units_of_raw_scores() -> None:
    scores, labels = torch.tensor([20.0, 30.0, 40.0, 50.0]), torch.tensor([0, 0, 1, 1])
    assert best_f1_threshold(scores, labels) == pytest.approx(40)


def test_small_maps_keep_thin_responses() -> None:
    maps = torch.zeros(2, 640, 256)
    maps[0, :, 101] = 3.0
    maps[1, 500, 200] = 1e9
    small = small_maps(maps)
    assert small.shape == (2, 128, 51)
    assert small.dtype == torch.float16
    assert bool(torch.isfinite(small).all())
    assert bool((small[0].amax(dim=1) == 3).all())
    assert small[1].argmax() // 51 == 100
    assert small_maps(torch.zeros(1, 30, 20)).shape == (1, 30, 20)
