from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anomalib_exdd.comparison.report.gallery import (
    choose_errors,
    choose_explained,
    count_misordered,
    image_outcomes,
    predict,
    worst_errors,
)
from anomalib_exdd.comparison.results import Comparison, ImageResult, MethodResults, Results, Run, RunResults

SCORES = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=20)


def results_of(*methods: dict[str, float], **thresholds: float) -> Results:
    """Make results from scores by image; images whose names start with `d` are defective."""
    found = []
    for number, scores in enumerate(methods):
        name = f"method {number}"
        images = [ImageResult(image, "", int(image.startswith("d")), score) for image, score in scores.items()]
        run = RunResults(name, 0, "", path=Path(), images=images, **thresholds)
        found.append(MethodResults(name, name, number=number, runs=[run], failed=[]))
    return Results(Comparison("", "", "", {}, {}, {}, [], [], []), found)


@given(SCORES)
def test_counts_are_those_of_going_through_all_pairs(sample: list[tuple[bool, int]]) -> None:
    images = [ImageResult(str(row), "", int(label), float(score)) for row, (label, score) in enumerate(sample)]
    misordered, ties = count_misordered(RunResults("", 0, "", path=Path(), images=images))
    for row, (label, score) in enumerate(sample):
        others = [other for kind, other in sample if kind != label]
        assert misordered[row] == sum(other > score if label else other < score for other in others)
        assert ties[row] == sum(other == score for other in others)


def test_errors_by_hand_worst_first() -> None:
    scores = {"n1": 1.0, "n2": 5.0, "n3": 2.0, "n4": 7.0, "d1": 6.0, "d2": 0.5, "d3": 9.0, "d4": 2.0}
    images = image_outcomes(results_of(scores))
    # d2 is below all four normal images; d4 below two and level with one; d1 below one; d3 above all.
    misses = worst_errors(images, 0, "miss")
    assert [(each.image, each.outcomes[0].misordered, each.outcomes[0].ties) for each in misses] == [
        ("d2", 4, 0), ("d4", 2, 1), ("d1", 1, 0),
    ]  # fmt: skip
    assert [each.severity for each in misses] == [1.0, 2.5 / 4, 0.25]
    # n4 is above d1, d2 and d4; n2 above d2 and d4; n3 above d2 and level with d4; n1 above d2.
    assert [each.image for each in worst_errors(images, 0, "false-alarm")] == ["n4", "n2", "n3", "n1"]


def test_a_method_on_another_scale_has_the_same_errors() -> None:
    random = np.random.default_rng(0)
    scores = {f"{'dn'[row % 2]}{row}": float(score) for row, score in enumerate(random.normal(size=30))}
    images = image_outcomes(results_of(scores, {image: np.exp(3 * score) * 1e4 for image, score in scores.items()}))
    for image in images:
        one, other = image.outcomes[0], image.outcomes[1]
        assert (one.misordered, one.ties, one.is_error) == (other.misordered, other.ties, other.is_error)


def test_errors_of_a_threshold_alone_come_last() -> None:
    scores = {"n1": 1.0, "n2": 4.0, "d1": 5.0, "d2": 9.0, "d3": 3.0}
    images = image_outcomes(results_of(scores, threshold=6.0))
    assert [each.image for each in worst_errors(images, 0, "miss")] == ["d3", "d1"]  # d1 is ranked well, but below 6
    assert [each.image for each in worst_errors(images, 0, "false-alarm")] == ["n2"]


def test_decisions_go_before_the_threshold() -> None:
    run = Run("", 0, "", threshold=0.5, accept=0.2, reject=0.8)
    assert [predict(score, run) for score in (0.1, 0.2, 0.79, 0.8)] == ["accept", "review", "review", "reject"]
    assert [predict(score, Run("", 0, "", threshold=0.5)) for score in (0.49, 0.5)] == ["normal", "defective"]
    assert predict(0.5, Run("", 0, "")) == ""
    # A review is no error by itself, an accepted defect and a rejected good part are.
    images = image_outcomes(results_of({"d1": 0.3, "n1": 0.1}, accept=0.2, reject=0.8))
    assert not [each for each in images if each.errors]
    images = image_outcomes(results_of({"d1": 0.15, "n1": 0.1}, accept=0.2, reject=0.8))
    assert [each.image for each in images if each.errors] == ["d1"]


def test_methods_take_turns_until_there_are_enough() -> None:
    one = {"d1": 0.0, "d2": 1.0, "d3": 2.0, "n1": 3.0, "n2": 2.5}
    two = {"d1": 9.0, "d2": 8.0, "d3": 0.0, "n1": 1.0, "n2": 0.5}
    images = image_outcomes(results_of(one, two))
    # Worst of method 0: misses d1 d2 d3, false alarms n1 n2; of method 1: miss d3, false alarms n1 n2.
    assert {each.image for each in choose_errors(images, each=1, most=10)} == {"d1", "n1", "d3"}
    assert {each.image for each in choose_errors(images, each=2, most=10)} == {"d1", "d2", "d3", "n1", "n2"}
    assert len(choose_errors(images, each=9, most=2)) == 2
    severities = [each.severity for each in choose_errors(images, each=9, most=10)]
    assert severities == sorted(severities, reverse=True)


def test_one_class_alone_has_no_errors_by_rank() -> None:
    assert not [each for each in image_outcomes(results_of({"n1": 1.0, "n2": 3.0})) if each.errors]
    images = image_outcomes(results_of({"n1": 1.0, "n2": 3.0}, threshold=2.0))
    assert [each.image for each in images if each.errors] == ["n2"]


def test_a_method_that_did_not_see_an_image_has_no_say() -> None:
    images = {each.image: each for each in image_outcomes(results_of({"d1": 0.0, "n1": 1.0}, {"n1": 1.0}))}
    assert set(images["d1"].outcomes) == {0}
    assert set(images["n1"].outcomes) == {0, 1}


def test_explained_are_the_worst_errors_and_the_surest_finds() -> None:
    scores = {"d1": 9.0, "d2": 8.0, "d3": 0.0, "n1": 1.0, "n2": 0.5, "n3": -1.0}
    chosen = choose_explained(image_outcomes(results_of(scores)), 0)
    assert [each.image for each in chosen] == ["d3", "n1", "n2", "d1", "d2"]
