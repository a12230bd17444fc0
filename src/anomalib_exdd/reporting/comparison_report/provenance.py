"""Everything needed to do the comparison again: command, configuration, versions, and what the data were."""

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib_exdd.reporting.markup import escape
from anomalib_exdd.utils.files import sha256_of_file

from .results import MethodResults, Results
from .tables import run_table, scrolling
from .wording import count

MANIFEST_NAME = "data.csv"


def provenance_section(results: Results) -> str:
    """Make the section that a second person needs."""
    comparison = results.comparison
    methods = "".join(_method(method) for method in results.methods)
    return (
        f"<h3>Command</h3><pre><code>{escape(comparison.command)}</code></pre>"
        f"<h3>Machine and versions</h3>{_facts({'created': comparison.created, **comparison.machine})}"
        f"<h3>Data</h3>{_data(results)}"
        f"<h3>Details</h3>{_folded('Every run', run_table(results))}"
        f"{_folded('Configuration, resolved', _json(comparison.configuration))}"
        f"{_folded('Methods and their arguments', methods)}"
    )


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _json(content: Any) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def _facts(facts: Mapping[str, Any]) -> str:
    """List names and values."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _method(method: MethodResults) -> str:
    about = {"class": method.method.class_path}
    if method.method.notes:
        about["not the same as for the others"] = "; ".join(method.method.notes)
    return f"<h4>{escape(method.name)}</h4>{_facts(about)}{_json(method.method.arguments)}"


def _data(results: Results) -> str:
    recorded = str(results.comparison.data.get("sha256") or "")
    facts = {name.replace("_", " "): value for name, value in results.comparison.data.items() if name != "sha256"}
    path = results.folder / MANIFEST_NAME
    if not path.is_file():
        facts[f"SHA-256 of {MANIFEST_NAME}"] = recorded or "not recorded"
        return f"{_facts(facts)}<p>{MANIFEST_NAME} is gone from this folder.</p>"
    actual = sha256_of_file(path)
    facts[f"SHA-256 of {MANIFEST_NAME}"] = actual
    changed = ""
    if recorded and recorded != actual:
        changed = f'<p class="wrong">{MANIFEST_NAME} has changed since: the comparison recorded {escape(recorded)}.</p>'
    link = (
        f'<p><a href="{MANIFEST_NAME}">{MANIFEST_NAME}</a> beside this page lists every file with its split, label and '
        "SHA-256.</p>"
    )
    return _facts(facts) + changed + _manifest_table(path) + link


def _manifest_table(path: Path) -> str:
    """Count the manifest's lines by split and label; empty if it has no such columns."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"split", "label"} <= set(reader.fieldnames or ()):
            return ""
        counts = Counter((row["split"], row["label"]) for row in reader)
    rows = "".join(
        f"<tr><td>{escape(split)}</td><td>{escape(label)}</td><td>{count(number, 'line')}</td></tr>"
        for (split, label), number in sorted(counts.items())
    )
    head = '<tr><th scope="col">split</th><th scope="col">label</th><th scope="col">in the manifest</th></tr>'
    return scrolling(f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>", "Data by split and label")
