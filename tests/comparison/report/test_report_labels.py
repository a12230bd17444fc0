"""Names in drawings: none is cut, leaves its drawing, or lies on another one or on a line that is not its own."""

import re
from itertools import product

import numpy as np
import pytest

from anomalib_exdd.comparison.report import write_report
from anomalib_exdd.comparison.report.charts import (
    LABEL_GAP,
    LABEL_HEIGHTS,
    Scale,
    place_labels,
    row_chart,
    text_width,
    thresholds_of,
    wrapped,
)
from anomalib_exdd.comparison.results import Method, Run
from made_up_comparison import DETECTORS, make_comparison
from page_tree import Element, read_page

LONG = (
    "DefectClassifier with frozen features, perlin 80",
    "Supersimplenet_supervised_10_epochs_resnet18",
    "W" * 40,
    "<&> 'strange' \"names\" - and / slashes",
)


def without_spaces(name: str) -> str:
    return re.sub(r"\s", "", name)


@pytest.mark.parametrize("name", [*LONG, "ExDD", "a  b"])
def test_wrapped_names_are_whole_and_narrow(name: str) -> None:
    lines = wrapped(name, 108)
    assert without_spaces("".join(lines)) == without_spaces(name)
    assert all(0 < text_width(line) <= 108 for line in lines)
    assert (len(lines) == 1) == (text_width(name) <= 108)


def test_names_break_between_words() -> None:
    assert wrapped("one two three", text_width("one two ")) == ["one two", "three"]
    assert wrapped("one_two-three", text_width("one_two-")) == ["one_two-", "three"]
    assert wrapped("abcdef", text_width("abc")) == ["abc", "def"]


def test_rows_are_as_high_as_their_names() -> None:
    chart = row_chart(Scale(0, 1, 116, 240), {"short": 1, LONG[0]: 2, "other": 3}, str)
    lines = len(wrapped(LONG[0], 108))
    assert lines > 2
    middles = [8 + 13, 8 + 26 + (26 + 15 * (lines - 1)) / 2, chart["bottom"] - 13]
    assert [(y, content) for _, y, content in chart["rows"]] == list(zip(middles, (1, 2, 3), strict=True))
    assert chart["bottom"] == 8 + 3 * 26 + 15 * (lines - 1)
    baselines = [baseline for names, _, _ in chart["rows"] for baseline, _ in names]
    assert np.diff(baselines).min() >= 15  # no line lies on another


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Element:
    """A report whose methods have long names."""
    detectors = [
        each._replace(method=Method(name, "ExDD"))
        for each, name in zip(DETECTORS, [LONG[0], LONG[1], "Z"], strict=False)
    ]
    folder = make_comparison(tmp_path_factory.mktemp("long"), detectors)
    return read_page(write_report(folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize("section", ["differences", "costs"])
def test_names_in_charts_are_whole_and_in_the_titles(drawn: Element, section: str) -> None:
    rows = drawn.one(id=section).all("g")
    assert rows
    for row in rows:
        name = row.one("title").text.partition(": ")[0]
        written = [each.text for each in row.all("text") if each.attributes["text-anchor"] == "end"]
        assert without_spaces("".join(written)) == without_spaces(name)
    names = {row.one("title").text.partition(": ")[0] for row in rows}
    assert names == ({LONG[0], "Z"} if section == "differences" else {LONG[0], LONG[1], "Z"})


NEAR = (0.0, 0.01, 0.05, 0.2, 0.45, 0.48, 0.5, 0.52, 0.8, 0.95, 0.99, 1.0)


def test_no_threshold_crosses_the_name_of_another() -> None:
    """At every place of three thresholds, close or not, in any order, and also of two and one."""
    scale = Scale(0, 1, 12, 408)
    cases = [*product(NEAR, NEAR, NEAR), *product(NEAR, (None,), (None,)), *product((None,), NEAR, NEAR)]
    for threshold, accept, reject in cases:
        run = Run("x", 0, "", threshold=threshold, accept=accept, reject=reject)
        labels = place_labels(thresholds_of(run), scale)
        assert len(labels) == sum(each is not None for each in (threshold, accept, reject))
        boxes = []
        for y, (label, is_left) in zip(LABEL_HEIGHTS, labels, strict=False):
            width = text_width(label.name)
            left = scale(label.score) + (-LABEL_GAP - width if is_left else LABEL_GAP)
            boxes.append((left, left + width, y - 9, y + 3))  # letters of 13 units, such as b and j
        for left, right, _, bottom in boxes:
            assert 0 <= left < right <= 420
            for y, (label, _) in zip(LABEL_HEIGHTS, labels, strict=False):  # a line begins 9 above its name's baseline
                crosses = left - 2 < scale(label.score) < right + 2
                assert not (crosses and y - 9 < bottom), (threshold, accept, reject)
        heights = sorted(top for _, _, top, _ in boxes)
        assert all(np.diff(heights) >= 13)


def test_failures_wrap_and_cells_name_their_columns(report: Element) -> None:
    """What the style sheet needs to stack a table on a phone: every cell says what it holds."""
    style = report.one("style").text
    assert "overflow-wrap: anywhere" in re.search(r"\.message {(.*?)}", style, re.DOTALL)[1]
    for section, tables in (("summary", 1), ("reproducibility", 1)):
        stacked = report.one(id=section).all("table", class_="stacked")
        assert len(stacked) == tables
        titles = [re.sub(", (higher|lower) is better", "", each.text) for each in stacked[0].one("thead").all("th")][1:]
        for row in stacked[0].one("tbody").all("tr"):
            cells = row.all("td")
            if row.classes == ["published"]:
                continue
            if row.classes == ["failed"]:
                assert [cell.one("span").classes for cell in cells if "colspan" in cell.attributes] == [["message"]]
                continue
            assert [cell.attributes["data-column"] for cell in cells] == titles
