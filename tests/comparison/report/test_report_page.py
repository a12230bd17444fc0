import base64
import hashlib
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from anomalib_exdd.comparison.report import write_report
from anomalib_exdd.comparison.report.formatting import number
from anomalib_exdd.comparison.results import METRICS, SCHEMA, Method, read_comparison
from anomalib_exdd.utils.files import PARTIAL_FILES
from made_up_comparison import DETECTORS, Detector, make_comparison, rewrite
from page_tree import Element, read_page

NASTY = '<script>alert(1)</script><b onclick="x">&amp; "@TITLE@" \'</title></style>'


def written(folder: Path) -> Element:
    return read_page(write_report(folder).read_text(encoding="utf-8"))


def cells(row: Element) -> list[Element]:
    return [cell for cell in row if cell.tag in {"td", "th"}]


def texts(row: Element) -> list[str]:
    return [cell.text for cell in cells(row)]


def summary_rows(page: Element) -> dict[str, Element]:
    """Rows of the table at the top by their method, without the marks of footnotes."""
    rows = page.one(id="summary").one("tbody").all("tr")
    return {re.sub(r"\d+$", "", row.one("th").text): row for row in rows}


def test_table_holds_mean_and_spread_and_marks_the_best(report: Element, comparison_folder: Path) -> None:
    comparison = read_comparison(comparison_folder)
    rows = summary_rows(report)
    assert list(rows) == ["ExDD", "Patchcore", "Patchcore, published", "Padim", "Draem"]
    finished = ["ExDD", "Patchcore", "Padim"]
    for column, metric in enumerate(METRICS, start=2):
        values = {name: [run.metrics[metric] * 100 for run in comparison.of(name)] for name in finished}
        best = max(finished, key=lambda name: np.mean(values[name]))
        for name in finished:
            cell = cells(rows[name])[column]
            expected = f"{np.mean(values[name]):.1f} ± {np.std(values[name], ddof=1):.1f}"
            assert cell.text == f"★best: {expected}" if name == best else expected
            assert ("best" in cell.classes) == (name == best)
    fit = {name: np.mean([run.fit_seconds for run in comparison.of(name)]) for name in finished}
    assert texts(rows["ExDD"])[8] == f"★best: {fit['ExDD']:.2f}"  # least is best
    assert texts(rows["Padim"])[8] == f"{fit['Padim']:.1f}"


def test_failures_published_figures_and_unequal_treatment_are_told(report: Element) -> None:
    rows = summary_rows(report)
    assert "failed: OutOfMemoryError: 12 GB were asked for" in rows["Draem"].text
    assert texts(rows["Patchcore, published"])[2:8] == ["92.0", "–", "–", "–", "51.0", "–"]  # noqa: RUF001
    notes = {}
    for name, row in rows.items():
        for link in row.all("a"):
            notes[name] = report.one("li", id=link.attributes["href"].removeprefix("#")).text
    assert notes == {
        "ExDD": "trains with 4 defective images",
        "Patchcore, published": "Published figures of Patchcore: Example et al., 2020, table 3",
        "Padim": "input 256 x 256, as it cannot be given another",
    }


def test_page_needs_nothing_else(report: Element) -> None:
    for element in report:
        assert not {"style", "onclick", "onload", "srcset"} & element.attributes.keys()
        assert element.tag not in {"link", "iframe", "object", "embed", "base"}
        if source := element.attributes.get("src"):
            assert re.match("data:image/(png|jpeg);base64,", source)
        if target := element.attributes.get("href"):
            assert target == "data.csv" or report.all(id=target.removeprefix("#"))
    policy = next(each for each in report.all("meta") if "http-equiv" in each.attributes).attributes["content"]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(report.one(tag).text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "url(http" not in report.one("style").text


def test_page_is_made_of_landmarks_headings_and_named_things(report: Element) -> None:
    assert report.one("html").attributes["lang"] == "en"
    for tag in ("header", "nav", "main", "footer", "h1"):
        report.one(tag)
    ids = [each.attributes["id"] for each in report if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    sections = report.one("main").all("section")
    assert [each.attributes["id"] for each in sections] == [
        link.attributes["href"].removeprefix("#") for link in report.one("nav").all("a")
    ]
    for section in sections:
        assert report.one(id=section.attributes["aria-labelledby"]).tag == "h2"
    levels = [int(each.tag[1]) for each in report if re.fullmatch("h[1-6]", each.tag)]
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all(image.attributes["alt"] for image in report.all("img"))
    for drawing in report.all("svg"):
        assert drawing.attributes.get("aria-label") or drawing.attributes.get("aria-hidden") == "true"


def test_gallery_shows_every_method_and_says_how_many(report: Element) -> None:
    gallery = report.one(id="errors")
    shown = gallery.one(id="cards").all("article")
    (said,) = re.findall(r"(\d+) of the (\d+) images with an error", gallery.text)
    assert int(said[0]) == len(shown) <= int(said[1])
    worst = []
    for card in shown:
        captions = [caption.text for caption in card.all("figcaption")]
        assert [re.match(r"image|true defect|ExDD|Patchcore|Padim", caption)[0] for caption in captions] == [
            "image", "true defect", "ExDD", "Patchcore", "Padim",
        ]  # fmt: skip
        severities = dict(pair.split(":") for pair in card.attributes["data-severity"].split())
        wrong = {str(number) for number, caption in enumerate(captions[2:]) if "✗ error" in caption}
        assert set(severities) == wrong
        worst.append(max(float(severity) for severity in severities.values()))
        assert len(card.all("img")) == 5 - (card.attributes["data-kind"] == "false-alarm")  # no true defect to show
    assert worst == sorted(worst, reverse=True)
    buttons = [button.text for button in gallery.one(id="filters").all("button")]
    assert buttons == [f"✓ {label}" for label in ("all", "ExDD", "Patchcore", "Padim", "all", "misses", "false alarms")]
    assert "hidden" in gallery.one(id="filters").attributes  # until the script serves them


def test_histograms_tell_what_thresholds_do(report: Element, comparison_folder: Path) -> None:
    comparison = read_comparison(comparison_folder)
    run = comparison.of("ExDD")[0]
    lines = (comparison_folder / run.folder / "images.csv").read_text().splitlines()[1:]
    images = [(int(line.split(",")[2]), float(line.split(",")[3])) for line in lines]
    missed = sum(label and score < run.threshold for label, score in images)
    alarms = sum(not label and score >= run.threshold for label, score in images)
    reviewed = sum(run.accept <= score < run.reject for label, score in images if label)
    panel = next(each for each in report.one(id="scores").all("figure") if each.one("h3").text == "ExDD")
    assert f"{missed} of 12 defective images are missed, and {alarms} of 24 normal ones are false alarms" in panel.text
    assert re.search(rf"for review: \d+ normal and {reviewed} defective;", panel.text)
    named = ("At the threshold", run.threshold), ("Accepted below", run.accept), ("rejected from", run.reject)
    assert all(f"{words} {number(limit)}" in panel.text for words, limit in named)
    other = next(each for each in report.one(id="scores").all("figure") if each.one("h3").text == "Patchcore")
    assert "Accepted below" not in other.text
    for figure, decisions in ((panel, [run.accept, run.reject]), (other, [])):
        places = [float(line.attributes["x1"]) for line in figure.all("line", class_="decision")]
        (threshold,) = (float(line.attributes["x1"]) for line in figure.all("line", class_="threshold"))
        assert len(places) == len(decisions)
        assert not places or places[0] < threshold < places[1]


def test_explained_images_stand_beside_training_patches(report: Element) -> None:
    section = report.one(id="patches")
    assert [heading.text for heading in section.all("h3")] == ["ExDD"]
    told = []
    for card in section.all("article"):
        assert [title.text for title in card.all("strong")] == ["test patch", "closest normal", "closest defect"]
        assert len(card.all("img")) == 3
        words = ("nearer to normal", "nearer to a known defect", "resembles <spots> (75 %)")
        told += [word for word in words if word in card.text]
        assert (told[-1] == words[0]) == ("distance 2.1" not in card.text)
    assert len(told) == len(section.all("article"))
    assert set(told) == set(words)


def test_all_that_reproduces_it_is_there(report: Element, comparison_folder: Path) -> None:
    again = report.one(id="reproducibility")
    assert again.all("pre")[0].text == read_comparison(comparison_folder).command
    assert hashlib.sha256((comparison_folder / "data.csv").read_bytes()).hexdigest() in again.text
    assert "2 x Made-up 3000" in again.text
    folded = {each.one("summary").text: each for each in again.all("details")}
    configuration = json.loads(folded["Configuration, resolved"].one("pre").text)
    assert configuration == read_comparison(comparison_folder).configuration
    assert len(folded["Every run"].one("tbody").all("tr")) == 8
    assert '"coreset_sampling_ratio": 0.01' in folded["Methods and their arguments"].text


def test_costs_are_drawn_from_zero(report: Element, comparison_folder: Path) -> None:
    comparison = read_comparison(comparison_folder)
    panel = next(each for each in report.one(id="costs").all("figure") if each.one("h3").text == "Latency, ms")
    widths = [float(bar.attributes["width"]) for bar in panel.all("rect", class_="bar")]
    means = [np.mean([run.latency_ms for run in comparison.of(name)]) for name in ("ExDD", "Patchcore", "Padim")]
    assert np.array(widths) / widths[0] == pytest.approx(np.array(means) / means[0], abs=0.01)
    assert "★" in panel.all("svg", role="img")[0].text  # the least latency
    assert "lower is better" in panel.text


def test_words_of_others_stay_words(tmp_path: Path) -> None:
    strange = Method("ExDD", NASTY, {NASTY: NASTY}, [NASTY], {"image_AP": 0.5}, NASTY)
    folder = make_comparison(tmp_path, [Detector(strange, fails=(1,)), DETECTORS[1]], title=NASTY)
    # No folder can have such a name, so the method gets it afterwards.
    content = json.loads((folder / "results.json").read_text().replace('"ExDD"', json.dumps(NASTY)))
    content["command"] = content["created"] = NASTY
    content["machine"] = content["configuration"] = {NASTY: NASTY}
    for run in content["runs"]:
        run["error"] = run["error"] and NASTY
    (folder / "results.json").write_text(json.dumps(content))
    images = folder / "runs" / "ExDD" / "0" / "images.csv"
    images.write_text(images.read_text().replace("data/test", "data/<script>alert(2)<"))
    page = written(folder)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert page.one("h1").text == NASTY
    assert page.one("head").one("title").text == NASTY
    assert next(iter(summary_rows(page))).startswith(NASTY)
    assert "<script>alert(2)<" in page.one(id="cards").text
    assert all("alert" not in name and not name.startswith("on") for each in page for name in each.attributes)


def test_images_that_are_gone_leave_a_word(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, seeds=(0,))
    shutil.rmtree(tmp_path / "data")
    page = written(folder)
    for card in page.one(id="cards").all("article"):
        blanks = [blank.text for blank in card.all("div", class_="blank")]
        missing = "mask or image not found" if card.attributes["data-kind"] == "miss" else "none: a normal image"
        assert blanks == ["image not found", missing]
        assert len(card.all("img")) == 3  # the heat maps are in the folder
    for card in page.one(id="patches").all("article"):
        assert [blank.text for blank in card.all("div", class_="blank")] == ["image not found"] * 3


def test_one_seed_without_maps_and_explanations(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, DETECTORS[1:3], seeds=(0,), maps=False)
    page = written(folder)
    assert "±" not in page.one(id="summary").one("tbody").text
    assert "one seed" in page.one(id="summary").text
    assert not page.one(id="curves").all("polyline", class_="seed")
    assert "No method left heat maps" in page.one(id="errors").text
    assert {blank.text for blank in page.one(id="cards").all("div", class_="blank")} >= {"no heat map"}
    assert "No method of this comparison says" in page.one(id="patches").text


def test_without_defects_nothing_is_ranked(tmp_path: Path) -> None:
    page = written(make_comparison(tmp_path, seeds=(0,), defective=0))
    assert "no method can be called the best" in page.one("p", class_="summary").text
    assert "There are no curves" in page.one(id="curves").text
    assert "no paired differences" in page.one(id="differences").text
    assert {card.attributes["data-kind"] for card in page.one(id="cards").all("article")} == {"false-alarm"}


def test_all_failed(tmp_path: Path) -> None:
    failed = written(make_comparison(tmp_path / "failed", DETECTORS[3:], seeds=(0, 1)))
    assert "No method has finished" in failed.one("p", class_="summary").text


def test_results_of_another_version_are_refused_and_the_old_report_stays(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path, DETECTORS[:2], seeds=(0,))
    report = write_report(folder)
    assert report == folder / "report.html"
    before = report.read_bytes()
    rewrite(folder, title="Another title", schema=99)
    with pytest.raises(ValueError, match="has schema 99"):
        write_report(folder)
    assert report.read_bytes() == before
    rewrite(folder, schema=SCHEMA)
    write_report(folder)
    assert b"Another title" in report.read_bytes()
    assert not list(folder.glob(PARTIAL_FILES))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no results.json"):
        write_report(tmp_path)
