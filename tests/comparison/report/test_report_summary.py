import re
from pathlib import Path

import pytest

from anomalib_exdd.comparison.report.formatting import amount, count, number, percent, points
from anomalib_exdd.comparison.report.page import rank_methods, report_page
from anomalib_exdd.comparison.results import Comparison, Difference, MethodResults, Results, Run, RunResults
from page_tree import read_page


def difference(method: str, mean: float, low: float, high: float, metric: str = "image_AP") -> Difference:
    return Difference(method, "Patchcore", metric, mean, low, high, 2)


def results_of(
    averages: dict[str, list[float]], *differences: Difference, latencies: dict[str, float] | None = None
) -> Results:
    """Make results from every method's image AP by seed; a method without any has failed."""
    methods = []
    for place, (name, values) in enumerate(averages.items()):
        latency = (latencies or {}).get(name)
        runs = [
            RunResults(name, seed, "", metrics={"image_AP": value}, latency_ms=latency, path=Path(), images=[])
            for seed, value in enumerate(values)
        ]
        failed = [] if values else [Run(name, 0, "", error="it broke")]
        methods.append(MethodResults(name, name, number=place, runs=runs, failed=failed))
    data = {"sha256": "", "test_normal": 1000, "test_defective": 1}
    return Results(Comparison("", "", "", {}, {}, data, [], [], list(differences)), methods)


def summary(results: Results) -> str:
    """Return the words of the paragraph at the top of the page."""
    return " ".join(read_page(report_page(results)).one("p", class_="summary").text.split())


def test_best_method_against_the_baseline() -> None:
    averages = {"Patchcore": [0.94, 0.96], "ExDD": [0.97, 0.98], "Draem": []}
    clear = results_of(averages, difference("ExDD", 0.025, 0.004, 0.05), latencies={"Patchcore": 36.1, "ExDD": 32.64})
    assert summary(clear) == (
        "ExDD has the highest image AP of 2 methods: 97.5 % (mean of 2 seeds, ± 0.7). "
        "ExDD minus the baseline Patchcore: +2.5 points (95 % interval +0.4 to +5.0). The interval leaves out 0. "
        "Next comes Patchcore with 95.0 %. On a single image ExDD is the fastest of them: 32.6 ms. "
        "Measured on 1,000 normal test images and 1 defective one. Draem failed; the table says why."
    )
    unclear = summary(results_of(averages, difference("ExDD", 0.025, -0.004, 0.05)))
    assert "The interval includes 0: these data do not show that the one is better than the other." in unclear


def test_differences_of_other_metrics_prove_nothing_here() -> None:
    averages = {"Patchcore": [0.9], "ExDD": [0.95]}
    text = summary(results_of(averages, difference("ExDD", 0.2, 0.1, 0.3, metric="pixel_AP")))
    assert "(one seed)" in text
    assert "no paired difference of it to another method, so nothing says whether that is chance" in text


def test_best_method_is_the_baseline() -> None:
    averages = {"Patchcore": [0.99], "ExDD": [0.98], "Padim": [0.5]}
    close, far = difference("ExDD", -0.01, -0.03, 0.01), difference("Padim", -0.49, -0.6, -0.4)
    text = summary(results_of(averages, close, far))
    assert "It is the baseline. The 95 % intervals of the differences of ExDD to it include 0" in text
    text = summary(results_of({"Patchcore": [0.99], "Padim": [0.5]}, far))
    assert "every difference to it leaves out 0. Padim minus the baseline Patchcore: −49.0 points" in text  # noqa: RUF001


def test_level_alone_and_none() -> None:
    assert summary(results_of({"A": [0.9], "B": [0.9], "C": [0.8]})).startswith(
        "A and B share the highest image AP: 90.0 % (one seed), of 3 methods."
    )
    assert "no other method has one to compare it with" in summary(results_of({"A": [0.9], "B": []}))
    assert summary(results_of({"A": []})).startswith("No method has finished")
    assert [each.name for each in rank_methods(results_of({"A": [0.2, 0.8], "B": [0.6], "C": []}))] == ["B", "A"]


def test_a_slower_best_method_is_told() -> None:
    text = summary(results_of({"A": [0.9], "B": [0.8]}, latencies={"A": 200.0, "B": 9.5}))
    assert "On a single image B is the fastest of them: 9.50 ms, against 200 ms." in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.1, 0.1, True), (0.0, 0.1, True), (0.01, 0.1, False), (-0.1, -0.01, False), (-0.1, 0.0, True)],
)
def test_zero_at_the_end_of_an_interval_is_within(low: float, high: float, expected: bool) -> None:
    assert difference("A", 0, low, high).includes_zero == expected


def test_forest_marks_are_where_the_numbers_are() -> None:
    shown = report_page(
        results_of(
            {},
            difference("A", 0.02, 0.01, 0.03),
            difference("B", -0.01, -0.04, 0.02),
            difference("C", *[float("nan")] * 3),
        )
    )
    marks = [(float(x), kind) for x, kind in re.findall(r'<circle cx="([\d.]+)"[^>]*class="(\w+)"', shown)]
    zero = float(re.search(r'<line x1="([\d.]+)"[^>]*class="zero"', shown)[1])
    assert [kind for _, kind in marks] == ["filled", "hollow"]  # what is no number is not drawn
    assert marks[0][0] - zero == pytest.approx(2 * (zero - marks[1][0]), abs=0.3)
    assert "+2.0 (+1.0 to +3.0)" in shown
    assert "−1.0 (−4.0 to +2.0)" in shown  # noqa: RUF001


def test_numbers_are_written_for_people() -> None:
    assert [amount(value) for value in (0.01234, 5.5, 32.64, 477.9, 1203.4, 0, None)] == [
        "0.0123", "5.50", "32.6", "478", "1,203", "0", "–",  # noqa: RUF001
    ]  # fmt: skip
    assert [percent(0.9758), percent(None), percent(1.0, 2)] == ["97.6", "–", "100.00"]  # noqa: RUF001
    assert [points(0.0004), points(-0.0004), points(0.1), points(-0.1)] == ["0.0", "0.0", "+10.0", "−10.0"]  # noqa: RUF001
    assert [number(-0.12345), number(6000.4), number(1e9)] == ["−0.123", "6,000", "1e+09"]  # noqa: RUF001
    assert [number(0.123456, 6), number(753), number(120000, 6), number(None)] == ["0.123456", "753", "120,000", "–"]  # noqa: RUF001
    assert [count(1, "image"), count(2000, "image")] == ["1 image", "2,000 images"]
