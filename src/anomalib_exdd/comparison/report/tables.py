"""The tables: all methods at a glance, their costs, and every single run."""

from collections.abc import Callable, Sequence

from anomalib_exdd.comparison.results import METRICS, Run
from anomalib_exdd.reporting.markup import escape

from .formatting import COSTS, NOTHING, amount, higher_is_better, percent
from .reader import MethodResults, Results

_BEST = '<span class="best-mark" aria-hidden="true">★</span><span class="hidden">best: </span>'


class Footnotes:
    """Collects footnotes and numbers them; equal texts share a number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return the superscript that links to a footnote."""
        if text not in self.texts:
            self.texts.append(text)
        number = self.texts.index(text) + 1
        return f'<sup><a href="#note-{number}" aria-label="Footnote {number}">{number}</a></sup>'

    def listing(self) -> str:
        """Return the footnotes as a list; empty if there are none."""
        items = "".join(f'<li id="note-{number}">{escape(text)}</li>' for number, text in enumerate(self.texts, 1))
        return f'<ol class="notes">{items}</ol>' if items else ""


def scrolling(table: str, label: str) -> str:
    """Put a table into a box that scrolls sideways, so that the page does not; the keyboard reaches it."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'


def summary_table(results: Results) -> str:
    """Make the table of all methods: mean ± spread over seeds, the best of every column marked."""
    costs = [cost for cost in COSTS if any(method.values(cost) for method in results.methods)]
    quantities = [*METRICS, *costs]
    best = {quantity: best_mean(results.methods, quantity) for quantity in quantities}
    notes = Footnotes()
    rows = []
    for method in results.methods:
        rows.append(_row(method, quantities, best, notes))
        if method.method.published:
            rows.append(_published_row(method, len(costs), notes))
    table = f'<table class="stacked"><thead>{_head(costs)}</thead><tbody>{"".join(rows)}</tbody></table>'
    seeds = {len(method.runs) for method in results.methods if method.runs}
    spread = "mean ± standard deviation over seeds" if max(seeds, default=0) > 1 else "one seed, hence no spread"
    caption = f"Metrics in %, higher is better; {spread}. ★ and bold: best of the column."
    return f'<p class="faint">{caption}</p>{scrolling(table, "Results of all methods")}{notes.listing()}'


def best_mean(methods: Sequence[MethodResults], quantity: str) -> float | None:
    """Return the best mean of a metric or cost; None if fewer than two methods have one."""
    means = [mean for method in methods if (mean := method.mean(quantity)) is not None]
    if len(means) < 2:
        return None
    return max(means) if higher_is_better(quantity) else min(means)


def _head(costs: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in METRICS.values())
    for cost in costs:
        name, unit, more = COSTS[cost]
        arrow = "higher" if more else "lower"
        cells += f'<th scope="col">{name}, {unit}<span class="hidden">, {arrow} is better</span></th>'
    return f'<tr><th scope="col">method</th><th scope="col">seeds</th>{cells}</tr>'


def _row(method: MethodResults, quantities: Sequence[str], best: dict[str, float | None], notes: Footnotes) -> str:
    marks = "".join(notes.mark(note) for note in method.method.notes)
    if method.runs:
        marks += "".join(notes.mark(f"Seed {run.seed} failed: {run.error}") for run in method.failed)
    head = f'<th scope="row">{escape(method.name)}{marks}</th>'
    if not method.runs:
        reasons = "; ".join(dict.fromkeys(run.error for run in method.failed))
        text = f"failed: {reasons}" if reasons else "has not run yet"
        return f'<tr class="failed">{head}{_message(text, len(quantities) + 1)}</tr>'
    cells = "".join(_cell(method, quantity, best[quantity]) for quantity in quantities)
    return f"<tr>{head}<td{_column('seeds')}>{len(method.runs)}</td>{cells}</tr>"


def _message(text: str, columns: int) -> str:
    """Return a cell over many columns, whose text stays in sight where the table is scrolled."""
    return f'<td colspan="{columns}"><span class="message">{escape(text)}</span></td>'


def _cell(method: MethodResults, quantity: str, best: float | None) -> str:
    write: Callable[[float | None], str] = percent if quantity in METRICS else amount
    mean, spread = method.mean(quantity), method.spread(quantity)
    text = write(mean)
    if spread is not None and quantity in METRICS:
        text += f' <span class="spread">± {write(spread)}</span>'
    column = METRICS.get(quantity) or ", ".join(COSTS[quantity][:2])
    if mean is not None and mean == best:
        return f'<td class="best"{_column(column)}>{_BEST}{text}</td>'
    return f"<td{_column(column)}>{text}</td>"


def _column(name: str) -> str:
    """Return the attribute that names a cell's column: on a phone the cells stand below each other, without a head."""
    return f' data-column="{escape(name)}"'


def _published_row(method: MethodResults, costs: int, notes: Footnotes) -> str:
    source = method.method.published_source or "no source is given"
    known = method.method.published
    cells = "".join(
        f"<td{_column(title) if metric in known else ''}>{percent(known.get(metric))}</td>"
        for metric, title in METRICS.items()
    )
    cells += f"<td>{NOTHING}</td>" * costs
    mark = notes.mark(f"Published figures of {method.name}: {source}")
    return f'<tr class="published"><th scope="row">{escape(method.name)}, published{mark}</th><td></td>{cells}</tr>'


def run_table(results: Results) -> str:
    """Make the table of every run, failed ones too, with all that was measured."""
    fields = {
        "negative_entries": "normal entries", "positive_entries": "defect entries", "epochs": "epochs",
        "threshold": "threshold", "accept": "accept below", "reject": "reject from",
    }  # fmt: skip
    names = [*METRICS.values(), *(f"{name}, {unit}" for name, unit, _ in COSTS.values()), *fields.values()]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("method", "seed", *names, "folder"))
    ended = [run for method in results.methods for run in (*(each.run for each in method.runs), *method.failed)]
    rows = "".join(_run_row(run, list(fields), names) for run in ended)
    table = f'<table class="stacked"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return scrolling(table, "Every run")


def _run_row(run: Run, fields: Sequence[str], names: Sequence[str]) -> str:
    head = f'<th scope="row">{escape(run.method)}</th><td{_column("seed")}>{run.seed}</td>'
    kind = ""
    if run.error:
        kind, cells = ' class="failed"', _message(f"failed: {run.error}", len(names))
    else:
        texts = [percent(run.metrics.get(metric), 2) for metric in METRICS]
        texts += [amount(getattr(run, cost)) for cost in COSTS]
        texts += [_plain(getattr(run, field)) for field in fields]
        cells = "".join(f"<td{_column(name)}>{text}</td>" for name, text in zip(names, texts, strict=True))
    return f"<tr{kind}>{head}{cells}<td{_column('folder')}><code>{escape(run.folder)}</code></td></tr>"


def _plain(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
