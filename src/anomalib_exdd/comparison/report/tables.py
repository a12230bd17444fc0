"""The tables of a comparison: `results.csv`, `results.md`, and those that the command prints."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from anomalib_exdd.comparison.results import METRICS, MethodResults, Results, Run, read_results, write_csv
from anomalib_exdd.utils.files import write_file

from .formatting import COSTS, amount, percent
from .page import build_environment

CSV_NAME = "results.csv"
MARKDOWN_NAME = "results.md"


def write_tables(folder: Path) -> str:
    """Write `results.csv`, a row for every run including failed ones, and `results.md`, which is returned."""
    results = read_results(folder)
    plain = [each.name for each in fields(Run) if each.name != "metrics"]
    first = ["method", "seed", "error"]
    rows = ({name: getattr(run, name) for name in plain} | run.metrics for run in results.comparison.runs)
    columns = [*first, *METRICS, *(name for name in plain if name not in first)]
    write_csv(rows, columns, folder / CSV_NAME)
    text = markdown(results)
    write_file(folder / MARKDOWN_NAME, text)
    return text


def markdown(results: Results) -> str:
    """Return `results.md`: the table, differences, notes, failures and the machine."""
    comparison = results.comparison
    lists = {
        "Not the same for all": [f"{each.name}: {' '.join(each.notes)}" for each in comparison.methods if each.notes],
        "Failed": [
            f"{run.method}, seed {run.seed}: {run.error} (log: {run.folder}/log.txt)"
            for run in comparison.runs
            if run.error
        ],
        "Machine": [f"{name}: {value}" for name, value in comparison.machine.items()],
    }
    sizes = [f"{n} {name.replace('_', ' ')}" for name, n in comparison.data.items() if isinstance(n, int)]
    tables = {"summary": summary_table(results), "differences": differences_table(results)}
    template = build_environment().get_template("results.md")
    return template.render(comparison=comparison, size=", ".join(sizes), lists=lists, **tables)


def summary_table(results: Results) -> str:
    """Return the table: a row for every method, and one for its published metrics."""
    columns: dict[str, tuple[str, Callable[[float | None], str]]] = {
        **{metric: (title, percent) for metric, title in METRICS.items()},
        **{cost: (f"{name} {unit}", amount) for cost, (name, unit, _) in COSTS.items()},
        "epochs": ("epochs", "{:,.0f}".format),
        "negative_entries": ("normal entries", "{:,.0f}".format),
        "positive_entries": ("defect entries", "{:,.0f}".format),
    }
    rows = []
    for each in results.methods:
        row = {title: _mean_and_deviation(each, quantity, write) for quantity, (title, write) in columns.items()}
        rows.append({"method": each.name, **row})
        if each.published:
            source = f": {each.published_source}" if each.published_source else ""
            published = {METRICS[metric]: f"*{percent(value)}*" for metric, value in each.published.items()}
            rows.append({"method": f"*{each.name}, published{source}*", **dict.fromkeys(row, ""), **published})
    return _without_empty_columns(rows)


def differences_table(results: Results) -> str:
    """Return the table of differences to the baseline; empty if there are none."""
    rows: dict[str, dict[str, str]] = {}
    for each in results.comparison.differences:
        row = rows.setdefault(each.method, {"method": each.method, **dict.fromkeys(METRICS.values(), "")})
        row[METRICS[each.metric]] = f"{100 * each.mean:+.1f} [{100 * each.low:+.1f}, {100 * each.high:+.1f}]"
    return _without_empty_columns(list(rows.values())) if rows else ""


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows of equal keys as a Markdown table."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[row[name].replace("|", "\\|") for name in header] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean_and_deviation(method: MethodResults, quantity: str, write: Callable[[float | None], str]) -> str:
    mean, deviation = method.mean(quantity), method.deviation(quantity)
    written = "" if mean is None else write(mean)
    if deviation is None:
        return written
    decimals = len(written.partition(".")[2])  # as many as the mean has
    return f"{written} ± {100 * deviation if quantity in METRICS else deviation:,.{decimals}f}"


def _without_empty_columns(rows: Sequence[dict[str, str]]) -> str:
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    return markdown_table([{name: row[name] for name in used} for row in rows])
