"""Tables of a comparison: `results.csv`, `results.md`, and what the command prints."""

import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from anomalib_exdd.utils.files import write_file

from .results import METRICS, Comparison, Difference, Run, write_csv

CSV_NAME = "results.csv"
MARKDOWN_NAME = "results.md"
_INTERVALS = (
    "with 95 % confidence intervals from a paired bootstrap over test images and seeds. An interval that holds 0 does "
    "not tell which is better."
)
_COLUMNS = {  # field of a run -> title and digits
    "fit_seconds": ("fit s", 1),
    "peak_memory_mb": ("memory MB", 0),
    "peak_gpu_memory_mb": ("GPU MB", 0),
    "images_per_second": ("images/s", 1),
    "latency_ms": ("latency ms", 1),
    "model_mb": ("model MB", 1),
    "epochs": ("epochs", 0),
    "negative_entries": ("normal entries", 0),
    "positive_entries": ("defect entries", 0),
}


def write_tables(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `results.csv`, a row for every run including failed ones, and `results.md`."""
    plain = [each.name for each in fields(Run) if each.name != "metrics"]
    first = ["method", "seed", "error"]
    rows = ({name: getattr(run, name) for name in plain} | run.metrics for run in comparison.runs)
    write_csv(rows, [*first, *METRICS, *(name for name in plain if name not in first)], folder / CSV_NAME)
    write_file(folder / MARKDOWN_NAME, markdown(comparison))
    return [folder / CSV_NAME, folder / MARKDOWN_NAME]


def markdown(comparison: Comparison) -> str:
    """Return `results.md`: the table, differences, notes, failures and the machine."""
    data = comparison.data
    size = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in data.items() if isinstance(value, int))
    seeds = ", ".join(map(str, sorted({run.seed for run in comparison.runs})))
    parts = [
        f"# {comparison.title}",
        f"{data['name']}: {size}. Seeds {seeds}. Metrics in %, mean ± standard deviation.",
        summary_table(comparison),
        comparison.threshold_note,
    ]
    if table := differences_table(comparison):
        baseline = comparison.differences[0].baseline
        parts += [
            f"## Against {baseline}",
            f"Differences to {baseline} in percentage points, {_INTERVALS}",
            table,
        ]
    lists = {
        "Not the same for all": [f"{each.name}: {' '.join(each.notes)}" for each in comparison.methods if each.notes],
        "Failed": failures(comparison),
        "Machine": [f"{name}: {value}" for name, value in comparison.machine.items()],
    }
    for heading, lines in lists.items():
        parts += [f"## {heading}", "\n".join(f"- {line}" for line in lines)] if lines else []
    parts.append(f"Again with:\n\n```bash\n{comparison.command}\n```" if comparison.command else "")
    return "\n\n".join(filter(None, parts)) + "\n"


def summary_table(comparison: Comparison) -> str:
    """Return the table: a row for every method, and one for its published metrics."""
    rows = []
    for method in comparison.methods:
        runs = comparison.of(method.name)
        row = {"method": method.name}
        for metric, title in METRICS.items():
            row[title] = mean_and_deviation([100 * run.metrics[metric] for run in runs if metric in run.metrics], 1)
        for name, (title, digits) in _COLUMNS.items():
            known = [value for run in runs if (value := getattr(run, name)) is not None]
            row[title] = mean_and_deviation(known, digits)
        rows.append(row)
        if method.published:
            source = f": {method.published_source}" if method.published_source else ""
            published = {METRICS[metric]: f"*{100 * value:.1f}*" for metric, value in method.published.items()}
            rows.append({**dict.fromkeys(row, ""), **published, "method": f"*{method.name}, published{source}*"})
    return _without_empty_columns(rows)


def differences_table(comparison: Comparison) -> str:
    """Return the table of differences to the baseline; empty if there are none."""
    rows = []
    for method in comparison.methods:
        found = {each.metric: each for each in comparison.differences if each.method == method.name}
        if found:
            rows.append(
                {"method": method.name} | {title: _interval(found.get(name)) for name, title in METRICS.items()}
            )
    return _without_empty_columns(rows) if rows else ""


def failures(comparison: Comparison) -> list[str]:
    """Return a line for every run that failed."""
    failed = [run for run in comparison.runs if run.error]
    return [f"{run.method}, seed {run.seed}: {run.error} (log: {run.folder}/log.txt)" for run in failed]


def run_line(run: Run) -> str:
    """Return the result of a run in a line."""
    if run.error:
        return f"{run.method}, seed {run.seed}: FAILED. {run.error}"
    values = "  ".join(f"{METRICS[name]} {100 * value:.1f}" for name, value in run.metrics.items())
    return f"{run.method}, seed {run.seed}: {values}  fit {run.fit_seconds:.1f} s"


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Format mean ± sample standard deviation; the mean alone of a single value, nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows of equal keys as a Markdown table."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[row[name].replace("|", "\\|") for name in header] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _without_empty_columns(rows: Sequence[dict[str, Any]]) -> str:
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    return markdown_table([{name: row[name] for name in used} for row in rows])
