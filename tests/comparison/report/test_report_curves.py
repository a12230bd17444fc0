import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from anomalib_exdd.comparison.report.charts import (
    Scale,
    corners,
    mean_curve,
    precision_recall_points,
    roc_points,
    round_values,
)
from anomalib_exdd.comparison.results import ImageResult, RunResults, read_comparison
from page_tree import Element

# Few different scores, so that many are equal.
SAMPLES = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=25).filter(
    lambda sample: 0 < sum(label for label, _ in sample) < len(sample)
)


def run_of(labels: list[bool], scores: list[float]) -> RunResults:
    images = [
        ImageResult(f"{row}.png", "", int(label), score)
        for row, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    return RunResults("method", 0, "", path=Path(), images=images)


def area(curve: np.ndarray) -> float:
    return float((np.diff(curve[:, 0]) * (curve[1:, 1] + curve[:-1, 1]) / 2).sum())


@settings(deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=4))
def test_areas_below_curves_are_the_means_of_the_metrics(samples: list[list[tuple[bool, int]]]) -> None:
    runs = [run_of([label for label, _ in each], [float(score) for _, score in each]) for each in samples]
    auroc = np.mean([roc_auc_score(run.labels, run.scores) for run in runs])
    average = np.mean([average_precision_score(run.labels, run.scores) for run in runs])
    assert area(mean_curve([roc_points(run) for run in runs])) == pytest.approx(auroc)
    assert area(mean_curve([precision_recall_points(run) for run in runs])) == pytest.approx(average)


@settings(deadline=None)
@given(SAMPLES)
def test_mean_of_one_curve_is_that_curve(sample: list[tuple[bool, int]]) -> None:
    run = run_of([label for label, _ in sample], [float(score) for _, score in sample])
    expected = np.column_stack(roc_curve(run.labels, run.scores)[:2])
    assert corners(mean_curve([roc_points(run)])) == pytest.approx(corners(expected))


def test_a_worked_out_case() -> None:
    run = run_of([True, False, True, False], [0.9, 0.8, 0.7, 0.1])
    assert corners(roc_points(run)).tolist() == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]
    recall_precision = [[0, 1], [0.5, 1], [0.5, 2 / 3], [1, 2 / 3]]
    assert precision_recall_points(run) == pytest.approx(np.array(recall_precision))


def test_corners_keep_the_line() -> None:
    points = np.array([[0, 0], [0, 0], [0, 1], [0, 1], [1, 1], [2, 1], [2, 3], [2, 3]], dtype=float)
    assert corners(points).tolist() == [[0, 0], [0, 1], [2, 1], [2, 3]]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_within(low: float, span: float, about: int) -> None:
    high = low + span
    found = round_values(low, high, about)
    assert len(found) <= about + 1
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    if len(found) > 1:
        step = found[1] - found[0]
        mantissa = step / 10 ** np.floor(np.log10(step) + 1e-9)
        assert any(mantissa == pytest.approx(round_one, rel=1e-3) for round_one in (1, 2, 2.5, 5, 10))


def test_scale_turns_around_for_heights() -> None:
    y = Scale(0, 2, 100, 0)
    assert [y(0), y(1), y(2)] == [100, 50, 0]


def drawn_area(line: Element) -> float:
    """Read a line of the page back: positions to rates."""
    places = np.array([[float(number) for number in pair.split(",")] for pair in line.attributes["points"].split()])
    return area(np.column_stack(((places[:, 0] - 44) / (410 - 44), (356 - places[:, 1]) / (356 - 8))))


def test_page_draws_every_seed_and_their_mean(report: Element, comparison_folder: Path) -> None:
    comparison = read_comparison(comparison_folder)
    drawings = report.one(id="curves").all("svg", role="img")
    assert [re.split(" of ", each.attributes["aria-label"])[0] for each in drawings] == ["ROC", "Precision and recall"]
    for drawing, metric in zip(drawings, ("image_AUROC", "image_AP"), strict=True):
        groups = drawing.all("g")
        assert [group.one("title").text for group in groups] == ["ExDD", "Patchcore", "Padim"]  # not the failed one
        for group in groups:
            values = [run.metrics[metric] for run in comparison.of(group.one("title").text)]
            thin = [drawn_area(line) for line in group.all("polyline", class_="seed")]
            assert thin == pytest.approx(values, abs=3e-3)
            assert drawn_area(group.one("polyline", class_="mean")) == pytest.approx(np.mean(values), abs=3e-3)
