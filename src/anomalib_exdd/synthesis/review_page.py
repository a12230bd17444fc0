"""A page on which a person accepts or rejects synthetic images, and gets the table that training reads.

One file without anything from the network. It shows the pictures beside it and works from a disk, by mouse or keyboard,
in light or dark. A browser cannot write into the folder: the page offers the table as a download.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from anomalib_exdd.reporting.markup import asset, escape, fill, script_json


@dataclass(frozen=True)
class PageImage:
    """An image on the page.

    Attributes:
        image: File of the image, relative to the page; it names the image in the table.
        mask: File of its mask, relative to the page.
        preview: File of its small picture, relative to the page.
        facts: What to say about it: names and values.
        accepted: Whether the measurement accepts it.
        reason: Why it does not.
        decision: `accept`, `reject` or empty: what the review says already.
        comment: The reviewer's words.
    """

    image: str
    mask: str
    preview: str
    facts: Sequence[tuple[str, str]]
    accepted: bool
    reason: str = ""
    decision: str = ""
    comment: str = ""


def synthesis_page(title: str, images: Sequence[PageImage]) -> str:
    """Return the page as HTML.

    Args:
        title: Its heading.
        images: What to show, in this order.
    """
    cards = "\n".join(_card(number, image) for number, image in enumerate(images))
    accepted = sum(image.accepted for image in images)
    counts = f"{len(images)} images: {accepted} accepted, {len(images) - accepted} rejected by the measurement."
    review = [{"image": image.image, "decision": image.decision, "comment": image.comment} for image in images]
    parts = {
        "TITLE": escape(title),
        "COUNTS": counts,
        "CARDS": cards,
        "REVIEW": script_json(review),
        "STYLE": asset("base.css") + _STYLE,
        "SCRIPT": _SCRIPT,
    }
    return fill(_PAGE, parts)


def _card(number: int, image: PageImage) -> str:
    name = escape(image.image)
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in image.facts if value)
    measured = "accepted" if image.accepted else "rejected"
    reason = f'<p class="reason">{escape(image.reason)}</p>' if image.reason else ""
    buttons = "".join(
        f'<button type="button" data-decision="{word}" aria-pressed="{str(image.decision == word).lower()}">{label}'
        f'<span class="hidden"> {name}</span></button>'
        for word, label in (("accept", "Accept"), ("reject", "Reject"))
    )
    return f"""<article tabindex="0" data-number="{number}" data-measured="{measured}" aria-label="{name}">
<img src="{escape(image.preview)}" loading="lazy" alt="Original, mask, result and difference of {name}">
<h2><a href="{name}">{name}</a> <a href="{escape(image.mask)}">mask</a></h2>
<p class="status">{measured} by the measurement</p>{reason}
<dl>{facts}</dl>
<div class="choice">{buttons}
<input value="{escape(image.comment)}" aria-label="Comment on {name}" placeholder="Comment" autocomplete="off">
</div>
</article>"""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
<header>
<h1>@TITLE@</h1>
<p>@COUNTS@ Pictures show original, mask, result and difference (x 4).</p>
<div class="choice">
<label>Show <select id="filter" autocomplete="off">
<option value="all">all</option>
<option value="use">what training uses</option>
<option value="leave">what training leaves out</option>
<option value="accepted">accepted by the measurement</option>
<option value="rejected">rejected by the measurement</option>
<option value="open">without a decision</option>
<option value="accept">accepted by you</option>
<option value="reject">rejected by you</option>
</select></label>
<button type="button" id="download">Download review.csv</button>
<span id="tally" role="status"></span>
</div>
<p class="help">Save the file over <code>review.csv</code> beside this page; training reads it. Your word goes before
the measurement. Keys: <kbd>j</kbd> next, <kbd>k</kbd> back, <kbd>a</kbd> accept, <kbd>r</kbd> reject, <kbd>u</kbd>
undo.</p>
<noscript><p>Without JavaScript, fill in <code>review.csv</code> by hand: accept or reject.</p></noscript>
</header>
<main>
@CARDS@
</main>
<script>const review = @REVIEW@;
@SCRIPT@</script>
</body>
</html>
"""

_STYLE = """
header { padding: 1rem; border-bottom: 1px solid var(--line); }
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: 1rem; margin: .5rem 0 0; }
p { margin: .3rem 0; }
main { display: grid; gap: 1rem; padding: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
article { padding: .7rem; border: 2px solid var(--line); border-radius: 6px; background: var(--card); }
article[data-use="true"] { border-color: var(--good); }
article[data-use="false"] { border-color: var(--bad); }
img { display: block; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 .7rem; margin: .3rem 0; font-size: .85rem; }
dt, .status, .help { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.reason { color: var(--bad); font-size: .85rem; }
.choice { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
.choice input { flex: 1; min-width: 8rem; }
button[data-decision="accept"][aria-pressed="true"] { background: var(--good); color: var(--paper); }
button[data-decision="reject"][aria-pressed="true"] { background: var(--bad); color: var(--paper); }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll("article")];
const filter = document.getElementById("filter");
let saved = true;

function isUsed(card) {
  const decision = review[card.dataset.number].decision;
  return decision ? decision === "accept" : card.dataset.measured === "accepted";
}

function isShown(card) {
  const decision = review[card.dataset.number].decision;
  switch (filter.value) {
    case "all": return true;
    case "use": return isUsed(card);
    case "leave": return !isUsed(card);
    case "open": return !decision;
    case "accept": case "reject": return decision === filter.value;
    default: return card.dataset.measured === filter.value;
  }
}

function refresh(card) {
  const decision = review[card.dataset.number].decision;
  card.dataset.use = isUsed(card);
  for (const button of card.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.decision === decision);
  }
}

function count() {
  document.getElementById("tally").textContent = `Training uses ${cards.filter(isUsed).length} of ${cards.length}.` +
    (saved ? "" : " Not downloaded yet.");
}

function decide(card, decision) {
  const row = review[card.dataset.number];
  row.decision = row.decision === decision ? "" : decision;
  saved = false;
  refresh(card);
  count();
}

function show() {
  for (const card of cards) card.hidden = !isShown(card);
}

function quoted(text) {
  return /[",\\r\\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function asTable() {
  const rows = review.map((row) => [row.image, row.decision, row.comment.replace(/\\s+/g, " ").trim()]);
  return [["image", "decision", "comment"], ...rows].map((row) => row.map(quoted).join(",") + "\\n").join("");
}

function move(card, step) {
  const shown = cards.filter((each) => !each.hidden);
  const next = shown[card ? shown.indexOf(card) + step : 0];
  if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
}

for (const card of cards) {
  refresh(card);
  for (const button of card.querySelectorAll("button")) {
    button.addEventListener("click", () => decide(card, button.dataset.decision));
  }
  card.querySelector("input").addEventListener("input", (event) => {
    review[card.dataset.number].comment = event.target.value;
    saved = false;
    count();
  });
}
count();
filter.addEventListener("change", show);
document.getElementById("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asTable()], { type: "text/csv" }));
  link.download = "review.csv";
  link.click();
  URL.revokeObjectURL(link.href);
  saved = true;
  count();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const card = document.activeElement.closest("article");
  if (event.key === "j") move(card, 1);
  else if (event.key === "k") move(card, -1);
  else if (card && event.key === "a") decide(card, "accept");
  else if (card && event.key === "r") decide(card, "reject");
  else if (card && event.key === "u") decide(card, review[card.dataset.number].decision);
  else return;
  event.preventDefault();
});
window.addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
"""
