"""The report in a real browser: what it looks like, what its buttons do, and that it asks nobody for anything."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from anomalib_exdd.comparison.report import write_report
from anomalib_exdd.comparison.report.formatting import NOTHING
from anomalib_exdd.comparison.results import Method
from browser import Browser
from made_up_comparison import DETECTORS, make_comparison, rewrite

LIGHT, DARK = ({"prefers-color-scheme": scheme} for scheme in ("light", "dark"))
SIZES = [pytest.param(1280, id="desktop"), pytest.param(390, id="phone")]
THEMES = [pytest.param(LIGHT, id="light"), pytest.param(DARK, id="dark")]

# Contrast of every text with what is behind it, by WCAG 2; of texts in drawings by their fill.
CONTRASTS = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const ground = numbers(getComputedStyle(each).backgroundColor);
      if (ground.length < 4 || ground[3] === 1) return ground;
    }
    return numbers(getComputedStyle(document.body).backgroundColor);
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest("script, title")) continue;
    const style = getComputedStyle(element);
    const ink = numbers(element.closest("svg") ? style.fill : style.color);
    const [low, high] = [luminance(ink), luminance(behind(element))].sort((one, other) => one - other);
    found.push([(high + 0.05) / (low + 0.05), texts.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()
"""
SHOWN = """
[...document.querySelectorAll("#cards > article")].filter((card) => card.checkVisibility())
  .map((card) => [card.dataset.kind, card.dataset.severity, card.querySelector("h3").textContent])
"""


@pytest.fixture(scope="module")
def page(comparison_folder: Path) -> Path:
    return comparison_folder / "report.html"


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("theme", THEMES)
def test_page_fits_is_legible_and_asks_nobody(browser: Browser, page: Path, width: int, theme: dict[str, str]) -> None:
    browser.open(page, width=width, media=theme)
    wide = "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    assert browser.run(wide) == [width] * 3
    browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert browser.run(wide) == [width] * 3
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) > 200
    assert not [(ratio, text) for ratio, text in contrasts if ratio < 4.5]
    assert browser.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]


def test_long_names_do_not_widen_the_page(browser: Browser, tmp_path: Path) -> None:
    name = "ExDD_with_" + "a_very_long_name_" * 6
    detectors = [DETECTORS[0]._replace(method=Method(name, name, {"path": "x" * 300}, ["y" * 300])), DETECTORS[1]]
    page = write_report(make_comparison(tmp_path, detectors, seeds=(0,), title="T" * 200))
    for width in (1280, 390):
        browser.open(page, width=width)
        browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
        assert browser.run("document.documentElement.scrollWidth") == width
    # Nothing is written outside of a drawing, where it would be cut off.
    outside = """[...document.querySelectorAll("svg[role=img]")].flatMap((drawing) => {
      const { left, right } = drawing.getBoundingClientRect();
      const isOutside = (box) => box.left < left - 1 || box.right > right + 1;
      const texts = [...drawing.querySelectorAll("text")];
      return texts.filter((each) => isOutside(each.getBoundingClientRect())).map((each) => each.textContent);
    })"""
    assert browser.run(outside) == []
    cut = "[...document.querySelectorAll('.rows .name')].filter((each) => each.scrollWidth > each.clientWidth).length"
    assert browser.run("document.querySelectorAll('.rows .name').length") > 10
    assert browser.run(cut) == 0


# What of the tables is out of sight, where a reader has not scrolled sideways.
CUT = """
[...document.querySelectorAll("%s")].filter((each) => each.checkVisibility()).flatMap((each) => {
  const text = document.createRange();
  text.selectNodeContents(each);
  const box = each.closest(".scroll").getBoundingClientRect();
  const lines = [...text.getClientRects()].filter((line) => line.width > 1);
  const isCut = (line) => line.right > Math.min(box.right, innerWidth) + 1 || line.left < box.left - 1;
  return lines.filter(isCut).map((line) => [each.textContent, line.left, line.right]);
})
"""


def test_tables_and_messages_are_in_sight(browser: Browser, tmp_path: Path) -> None:
    folder = make_comparison(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    for run in results["runs"]:
        run["error"] = run["error"] and f"RuntimeError: {'not enough memory, ' * 12} {'x' * 150}"
    rewrite(folder, runs=results["runs"])
    page = write_report(folder)
    cells = "#summary td, #summary th, #reproducibility .stacked td, #reproducibility .stacked th"
    for width, seen in ((390, cells), (700, ".message"), (1280, ".message")):
        browser.open(page, width=width)
        browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
        assert browser.run(f"document.querySelectorAll('{seen}').length") > 2
        assert browser.run(CUT % seen) == []
    # Nothing is hidden on a phone but what says nothing.
    browser.open(page, width=390)
    shown = "[...document.querySelectorAll('#summary td')].filter((each) => %s each.checkVisibility())"
    hidden = set(browser.run(f"{shown % '!'}.map((each) => each.textContent)"))
    assert hidden == {"", NOTHING}
    heading = "getComputedStyle(document.querySelector('#summary td[data-column=AUPRO]'), '::before').content"
    assert browser.run(heading) == '"AUPRO"'


def test_light_and_dark_differ(browser: Browser, page: Path) -> None:
    seen = {}
    for name, theme in (("light", LIGHT), ("dark", DARK)):
        browser.open(page, media=theme)
        colours = "(({ color, backgroundColor }) => [color, backgroundColor])(getComputedStyle(document.body))"
        line = "getComputedStyle(document.querySelector('.mean')).stroke"
        seen[name] = [*browser.run(colours), browser.run(line)]
    assert all(light != dark for light, dark in zip(*seen.values(), strict=True))
    assert seen["light"][1] == "rgb(255, 255, 255)"


def click(browser: Browser, group: str, value: str) -> list[Any]:
    browser.run(f"document.querySelector('#filters [data-{group}=\"{value}\"]').click()")
    return browser.run(SHOWN)


def test_filters_show_what_they_say_worst_first(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.getElementById('filters').checkVisibility()")
    everything = browser.run(SHOWN)
    tally = "document.getElementById('tally').textContent"
    assert browser.run(tally) == f"{len(everything)} of {len(everything)} images"
    for method in ("0", "1", "2"):
        shown = click(browser, "method", method)
        severities = [dict(pair.split(":") for pair in card[1].split()) for card in everything]
        expected = [card[2] for card, each in zip(everything, severities, strict=True) if method in each]
        assert sorted(card[2] for card in shown) == sorted(expected)
        order = [float(re.search(rf"\b{method}:([\d.]+)", card[1])[1]) for card in shown]
        assert order == sorted(order, reverse=True)
        misses = click(browser, "kind", "miss")
        assert misses == [card for card in shown if card[0] == "miss"]
        alarms = click(browser, "kind", "false-alarm")
        assert alarms == [card for card in shown if card[0] == "false-alarm"]
        assert 0 < len(misses) < len(shown)
        assert browser.run(tally) == f"{len(alarms)} of {len(everything)} images"
        pressed = "[...document.querySelectorAll('#filters [aria-pressed=true]')].map((each) => each.textContent)"
        assert browser.run(pressed) == [f"✓ {DETECTORS[int(method)].method.name}", "✓ false alarms"]
        click(browser, "kind", "")
    assert click(browser, "method", "") == everything


def test_keyboard_reaches_filters_and_legend_and_one_sees_where_it_is(browser: Browser, page: Path) -> None:
    browser.open(page)
    reached = []
    for _ in range(60):
        browser.press("Tab")
        reached.append(
            browser.run("""(() => {
              const { tagName, dataset, attributes } = document.activeElement;
              const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
              const name = dataset.method ?? dataset.kind ?? attributes.href?.value ?? "";
              return [`${tagName} ${name}`, `${outlineStyle} ${outlineWidth}`];
            })()""")
        )
    names = [name for name, _ in reached]
    assert names[0] == "A #main"  # to skip what every reader has read
    assert {"INPUT 0", "INPUT 1", "INPUT 2", "BUTTON ", "BUTTON 2", "BUTTON miss"} <= set(names)
    # The body is where the focus is between the end of the page and its start.
    assert {outline for name, outline in reached if name != "BODY "} == {"solid 3px"}


def test_legend_hides_a_methods_lines(browser: Browser, page: Path) -> None:
    browser.open(page)
    displays = "[...document.querySelectorAll('#curves g[data-method]')].map((each) => getComputedStyle(each).display)"
    assert browser.run(displays) == ["inline"] * 6
    browser.run("document.querySelector('#curves input[data-method=\"1\"]').click()")
    assert browser.run(displays) == ["inline", "none", "inline"] * 2


def test_without_script_everything_is_there_but_the_filters(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.run("document.getElementById('filters').checkVisibility()") is False
        cards = browser.run("document.querySelectorAll('#cards > article').length")
        assert len(browser.run(SHOWN)) == cards > 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_foreign_scripts_and_pictures_are_refused(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The policy holds even where a text would have slipped through."""
    slipped = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x.png' onerror='document.title=1'>"
    copy = tmp_path / "slipped.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{slipped}</main>"), encoding="utf-8")
    browser.open(copy)
    assert browser.run("document.title") == "Scratched plates"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


def test_print_opens_details_drops_controls_and_is_light(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, media=DARK)
    browser.pretend(DARK, "print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.run("document.getElementById('filters').checkVisibility()")
    assert not browser.run("document.querySelector('nav').checkVisibility()")
    assert browser.run("document.querySelector('details pre').getBoundingClientRect().height") > 20
    printed = browser.pdf(tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert browser.run("document.querySelectorAll('details[open]').length") == 0  # closed again afterwards


def test_motion_is_only_for_those_who_like_it(browser: Browser, page: Path) -> None:
    for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        browser.open(page, media={"prefers-reduced-motion": wish})
        assert browser.run("getComputedStyle(document.documentElement).scrollBehavior") == behaviour
