"""What a person gets to see of a comparison: a table for a README, one for a spreadsheet, and the last lines."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from anomalib_exdd.reporting.comparison import METRICS, Comparison, Difference, Method, Run
from anomalib_exdd.reporting.machine import markdown_table
from anomalib_exdd.utils.files import write_atomically, write_file

CSV_NAME = "results.csv"
MARKDOWN_NAME = "results.md"
_COSTS = (  # field, title, digits
    ("fit_seconds", "fit s", 1),
    ("peak_memory_mb", "memory MB", 0),
    ("peak_gpu_memory_mb", "GPU MB", 0),
    ("images_per_second", "images/s", 1),
    ("latency_ms", "latency ms", 1),
    ("model_mb", "model MB", 1),
    ("epochs", "epochs", 0),
)
_BANKS = {"negative_entries": "normal entries", "positive_entries": "defect entries"}


def write_csv(comparison: Comparison, folder: Path) -> Path:
    """Write `results.csv`: a row for every run, failed ones too; metrics are 0 to 1."""
    plain = [each.name for each in fields(Run) if each.name != "metrics"]
    columns = [
        "method",
        "seed",
        "error",
        *METRICS,
        *(name for name in plain if name not in {"method", "seed", "error"}),
    ]
    with write_atomically(folder / CSV_NAME) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for run in comparison.runs:
            writer.writerow({name: getattr(run, name) for name in plain} | run.metrics)
    return folder / CSV_NAME


def write_markdown(comparison: Comparison, folder: Path) -> Path:
    """Write `results.md`: the table, differences, notes, failures and the machine."""
    write_file(folder / MARKDOWN_NAME, markdown(comparison))
    return folder / MARKDOWN_NAME


def markdown(comparison: Comparison) -> str:
    """Return everything that `results.md` says."""
    data = comparison.data
    size = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in data.items() if isinstance(value, int))
    seeds = sorted({run.seed for run in comparison.runs})
    parts = [
        f"# {comparison.title}",
        f"{data['name']}: {size}. Seeds {', '.join(map(str, seeds))}. Metrics in %, mean ± standard deviation.",
        summary(comparison),
        *filter(None, [comparison.threshold_note]),
        *_differences(comparison),
        *_list("Not the same for all", [f"{m.name}: {' '.join(m.notes)}" for m in comparison.methods if m.notes]),
        *_list("Failed", failures(comparison)),
        *_list("Machine", [f"{name}: {value}" for name, value in comparison.machine.items()]),
    ]
    if comparison.command:
        parts.append(f"Again with:\n\n```bash\n{comparison.command}\n```")
    return "\n\n".join(parts) + "\n"


def summary(comparison: Comparison) -> str:
    """Return the table: a row for every method, and one for what is published of it."""
    rows = []
    for method in comparison.methods:
        runs = comparison.of(method.name)
        row = {"method": method.name}
        row |= {title: spread([100 * r.metrics[n] for r in runs if n in r.metrics], 1) for n, title in METRICS.items()}
        row |= {title: spread(_known(runs, name), digits) for name, title, digits in _COSTS}
        row |= {title: spread(_known(runs, name), 0) for name, title in _BANKS.items()}
        rows.append(row)
        if method.published:
            rows.append(_published(method, row))
    return markdown_table(_without_empty(rows))


def differences_table(comparison: Comparison) -> str:
    """Return the table of differences to the baseline; empty if there are none."""
    rows = []
    for method in comparison.methods:
        found = {d.metric: d for d in comparison.differences if d.method == method.name}
        if found:
            row = {"method": method.name}
            for metric, title in METRICS.items():
                row[title] = _interval(found.get(metric))
            rows.append(row)
    return markdown_table(_without_empty(rows)) if rows else ""


def failures(comparison: Comparison) -> list[str]:
    """Return a line for every run that failed."""
    failed = [run for run in comparison.runs if run.error]
    return [f"{run.method}, seed {run.seed}: {run.error} (log: {run.folder}/log.txt)" for run in failed]


def line(run: Run) -> str:
    """Say in a line what came of a run."""
    if run.error:
        return f"{run.method}, seed {run.seed}: FAILED. {run.error}"
    values = "  ".join(f"{METRICS[name]} {100 * value:.1f}" for name, value in run.metrics.items())
    return f"{run.method}, seed {run.seed}: {values}  fit {run.fit_seconds:.1f} s"


def spread(values: Sequence[float], digits: int) -> str:
    """Format mean and sample standard deviation; the mean alone of a single value, nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def _differences(comparison: Comparison) -> list[str]:
    table = differences_table(comparison)
    if not table:
        return []
    baseline = comparison.differences[0].baseline
    text = (
        f"Differences to {baseline} in percentage points, with 95 % confidence intervals from a paired bootstrap over "
        "test images and seeds. An interval that holds 0 does not tell which is better."
    )
    return [f"## Against {baseline}", text, table]


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _published(method: Method, row: dict[str, str]) -> dict[str, str]:
    shown = dict.fromkeys(row, "")
    shown |= {METRICS[name]: f"*{100 * value:.1f}*" for name, value in method.published.items()}
    source = f": {method.published_source}" if method.published_source else ""
    return shown | {"method": f"*{method.name}, published{source}*"}


def _known(runs: Sequence[Run], name: str) -> list[Any]:
    return [value for run in runs if (value := getattr(run, name)) is not None]


def _without_empty(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Drop columns that say nothing."""
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    return [{name: row[name] for name in used} for row in rows]


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {each}" for each in lines)] if lines else []
