"""The paired bootstrap, where the answer is known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_exdd.comparison.bootstrap import paired_differences
from anomalib_exdd.comparison.results import Difference, ImageResult, RunResults


def run(labels: Sequence[int], scores: Sequence[float]) -> RunResults:
    images = [
        ImageResult(f"{n}.png", "", int(y), float(s)) for n, (y, s) in enumerate(zip(labels, scores, strict=True))
    ]
    metrics = {"image_AUROC": roc_auc_score(labels, scores), "image_AP": average_precision_score(labels, scores)}
    return RunResults("some", 0, "", metrics=metrics, path=Path("without histograms"), images=images)


def all_runs(**methods: dict[int, RunResults]) -> list[RunResults]:
    return [replace(run, method=name, seed=seed) for name, runs in methods.items() for seed, run in runs.items()]


def compared(ours: dict[int, RunResults], theirs: dict[int, RunResults], metric: str = "image_AUROC") -> Difference:
    found = paired_differences(all_runs(ours=ours, theirs=theirs), "theirs")
    return next(each for each in found if each.metric == metric)


LABELS = np.repeat([0, 1], [70, 50])


def random_run(seed: int, shift: float = 1.0) -> RunResults:
    rng = np.random.default_rng(seed)
    return run(LABELS, rng.normal(shift * LABELS, 1))


def test_a_method_does_not_differ_from_itself() -> None:
    for metric in ("image_AUROC", "image_AP"):
        found = compared({0: random_run(0), 1: random_run(1)}, {0: random_run(0), 1: random_run(1)}, metric)
        assert (found.mean, found.low, found.high, found.seeds) == (0, 0, 0, 2)


def test_a_difference_turns_round_with_the_methods() -> None:
    ours, theirs = {0: random_run(0), 1: random_run(1)}, {0: random_run(2), 1: random_run(3)}
    there, back = compared(ours, theirs), compared(theirs, ours)
    assert there.mean == pytest.approx(-back.mean)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.low <= there.mean <= there.high
    assert there == compared(ours, theirs)  # the same draw again


def test_a_sure_difference_has_no_width() -> None:
    perfect, blind = run(LABELS, LABELS), run(LABELS, np.zeros(len(LABELS)))
    found = compared({0: perfect}, {0: blind})
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_interval_of_a_binomial_share() -> None:
    """A fifth of the defective images is below all normal ones: the AUROC of a resample is a binomial share."""
    missed = run(LABELS, np.where(np.arange(len(LABELS)) >= 110, -1, LABELS))
    found = compared({0: missed}, {0: run(LABELS, LABELS)})
    assert found.mean == pytest.approx(-0.2)
    expected = -binom.ppf([0.975, 0.025], 50, 0.2) / 50
    assert (found.low, found.high) == pytest.approx(expected, abs=0.021)  # a step of the share is 0.02


def test_seeds_are_drawn_too() -> None:
    perfect, blind = run(LABELS, LABELS), run(LABELS, np.zeros(len(LABELS)))
    found = compared({0: perfect, 1: blind}, {0: blind, 1: blind})
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.0, 0.5))


def test_only_seeds_that_both_have_count() -> None:
    found = compared({0: random_run(0), 1: random_run(1)}, {1: random_run(2), 5: random_run(3)})
    assert found.seeds == 1
    assert found.mean == random_run(1).metrics["image_AUROC"] - random_run(2).metrics["image_AUROC"]
    assert paired_differences(all_runs(a={0: random_run(0)}, b={1: random_run(0)}), "b") == []


def test_intervals_hold_the_true_difference_about_as_often_as_they_say() -> None:
    truth = 0.0  # both methods are equally good, and err independently
    held, labels = 0, np.repeat([0, 1], [40, 30])
    for number in range(100):
        rng = np.random.default_rng(number)
        shared = rng.normal(labels, 1)
        ours, theirs = (run(labels, shared + rng.normal(0, 0.7, len(labels))) for _ in range(2))
        found = paired_differences(all_runs(a={0: ours}, b={0: theirs}), "b", resamples=200, seed=number)[0]
        held += found.low <= truth <= found.high
    assert 0.89 <= held / 100 <= 0.99


def test_every_method_is_compared_with_the_baseline_by_what_both_have() -> None:
    runs = all_runs(**{name: {0: random_run(seed)} for seed, name in enumerate("abc")})
    found = paired_differences(runs, "b", 100)
    assert [(each.method, each.baseline, each.metric) for each in found] == [
        ("a", "b", "image_AUROC"),
        ("a", "b", "image_AP"),
        ("c", "b", "image_AUROC"),
        ("c", "b", "image_AP"),
    ]
    assert paired_differences(runs, "failed", 100) == []
