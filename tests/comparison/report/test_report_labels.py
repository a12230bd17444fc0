"""Long names and messages: whole beside the drawings, wrapped in tables."""

import re

import pytest

from anomalib_exdd.comparison.report import write_report
from anomalib_exdd.comparison.results import Method
from made_up_comparison import DETECTORS, make_comparison
from page_tree import Element, read_page

LONG = ("DefectClassifier with frozen features, perlin 80", "Supersimplenet_supervised_10_epochs_resnet18")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Element:
    """A report whose methods have long names."""
    detectors = [
        each._replace(method=Method(name, "ExDD")) for each, name in zip(DETECTORS, [*LONG, "Z"], strict=False)
    ]
    folder = make_comparison(tmp_path_factory.mktemp("long"), detectors)
    return read_page(write_report(folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize("section", ["differences", "costs"])
def test_names_in_charts_are_whole_and_in_the_titles(drawn: Element, section: str) -> None:
    charts = drawn.one(id=section).all(class_="rows")
    assert charts
    for chart in charts:
        names = [each.text for each in chart.all("span", class_="name")]
        assert [drawing.one("title").text.partition(": ")[0] for drawing in chart.all("svg", role="img")] == names
        assert names == ([LONG[0], "Z"] if section == "differences" else [*LONG, "Z"])


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
