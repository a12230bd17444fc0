import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anomalib_exdd.synthesis.manifest import read_review
from anomalib_exdd.synthesis.review_page import review_page
from made_up_records import record_of, synthetic_image

NASTY = '</script><b> & "{{ cards }}" \\u003c'


IMAGES = [
    synthetic_image(record_of(0, prompt=NASTY)),
    synthetic_image(record_of(1, accepted=False, reason="No change"), "accept", NASTY),
    synthetic_image(record_of(2), "reject"),
]
FILES = [image.record.image for image in IMAGES]

# As much of a browser as the page's script asks for.
BROWSER = """
class Element {
  constructor(dataset) {
    Object.assign(this, { dataset, attributes: {}, listeners: {}, hidden: false, children: [], value: "all" });
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  querySelectorAll() { return this.children; }
  querySelector() { return this.input; }
  closest() { return this.dataset.measured ? this : null; }
  focus() { document.activeElement = this; }
  scrollIntoView() {}
  click() { if (this.download) downloads[this.download] = this.href; else this.listeners.click(); }
}
const downloads = {};
const ids = { filter: new Element({}), tally: new Element({}), download: new Element({}) };
const cards = MEASURED.map((measured, number) => {
  const card = new Element({ number: String(number), measured });
  card.children = ["accept", "reject"].map((decision) => new Element({ decision }));
  card.input = new Element({});
  return card;
});
const page = {};
const document = {
  activeElement: new Element({}),
  querySelectorAll: () => cards,
  getElementById: (id) => ids[id],
  createElement: () => new Element({}),
  addEventListener: (kind, listener) => { page[kind] = listener; },
};
const window = { addEventListener: () => {} };
class Blob { constructor(parts) { this.text = parts.join(""); } }
const URL = { createObjectURL: (blob) => blob.text, revokeObjectURL: () => {} };
const press = (key) => page.keydown({ key, target: { matches: () => false }, preventDefault: () => {} });
const state = () => cards.map((card) => [card.hidden, card.dataset.use, ...card.children.map(
  (button) => button.attributes["aria-pressed"])].join(" "));
"""


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


def in_browser(page: str, actions: str) -> Any:
    """Run the page's script and some actions, and return what they leave in `answer`."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the page's script cannot run")
    script = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)[0]
    measured = json.dumps([attributes["data-measured"] for attributes in Tags(page).named("article")])
    # The page declares `cards` itself: it gets a scope of its own within the browser's.
    program = f"{BROWSER.replace('MEASURED', measured)}\nlet answer;\n{{ {script} }}\n{actions}"
    ran = subprocess.run(
        [node, "-e", f"{program}\nconsole.log(JSON.stringify(answer));"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_every_image_can_be_seen_and_decided_on() -> None:
    tags = Tags(review_page("Plates", IMAGES))
    assert [picture["src"] for picture in tags.named("img")] == [f"previews/{number:05d}.jpg" for number in range(3)]
    assert all(picture["alt"] for picture in tags.named("img"))
    links = [link["href"] for link in tags.named("a")]
    assert links == [name for file in FILES for name in (file, file.replace(".png", "_GT.png"))]
    assert [card["data-measured"] for card in tags.named("article")] == ["accepted", "rejected", "accepted"]
    assert all(card["tabindex"] == "0" for card in tags.named("article"))
    pressed = [button["aria-pressed"] for button in tags.named("button") if "data-decision" in button]
    assert pressed == ["false", "false", "true", "false", "false", "true"]
    assert not [attributes for _, attributes in tags.found if str(attributes.get("src", "")).startswith("http")]


def test_words_of_others_stay_words() -> None:
    page = review_page(NASTY, IMAGES)
    tags = Tags(page)
    assert not tags.named("b")
    assert page.count("</script>") == 1
    assert len(tags.named("article")) == len(IMAGES)
    assert "3 images: 2 accepted, 1 rejected" in page
    assert [box["value"] for box in tags.named("input")][1] == NASTY


def test_downloaded_table_is_what_training_reads(tmp_path: Path) -> None:
    text = in_browser(
        review_page("Plates", IMAGES),
        """
        cards[0].children[1].click();  // reject
        cards[0].input.listeners.input({ target: { value: 'too dark,\\n "very"' } });
        cards[2].children[1].click();  // take the rejection back
        ids.download.click();
        answer = downloads["review.csv"];
        """,
    )
    (tmp_path / "review.csv").write_text(text, encoding="utf-8")
    assert read_review(tmp_path, [Path(file).name for file in FILES]) == {
        "00000.png": {"decision": "reject", "comment": 'too dark, "very"'},
        "00001.png": {"decision": "accept", "comment": NASTY},
        "00002.png": {"decision": "", "comment": ""},
    }


def test_keys_decide_and_move_among_what_is_shown() -> None:
    before, after, tally, focus = in_browser(
        review_page("Plates", IMAGES),
        """
        const before = state();
        ids.filter.value = "accepted";
        ids.filter.listeners.change();
        press("j"); press("r");  // the first image
        press("j"); press("u");  // the third: the second is not shown
        press("j");              // nowhere to go
        answer = [before, state(), ids.tally.textContent, document.activeElement.dataset.number];
        """,
    )
    assert before == ["false true false false", "false true true false", "false false false true"]
    assert after == ["false false false true", "true true true false", "false true false false"]
    assert tally == "Training uses 2 of 3. Not downloaded yet."
    assert focus == "2"
