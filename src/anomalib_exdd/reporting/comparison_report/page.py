"""The report of a comparison: `report.html`, one file that needs nothing else.

A reader finds the verdict and the table first, the evidence below, and at the end all that it takes to do it again.
Style and script are allowed by their hashes, pictures as data; a browser refuses everything else, and all network.
"""

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from anomalib_exdd.reporting.markup import asset, escape, fill
from anomalib_exdd.utils.files import write_file

from .bars import bars_section
from .curves import curves_section
from .errors import judge_images
from .forest import forest_section
from .gallery import gallery_section
from .histograms import histograms_section
from .patches import patches_section
from .provenance import provenance_section
from .results import Results, read_results
from .tables import summary_table
from .verdict import verdict
from .wording import count

REPORT_NAME = "report.html"
_FOLDER = "comparison_report"


def write_report(folder: Path) -> Path:
    """Write the report of a comparison's folder into it; an old one stays until the new one is complete.

    Args:
        folder: Folder that `anomalib compare` has written; see :mod:`anomalib_exdd.reporting.comparison`.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If the folder has no `results.json`.
        ValueError: If its files are of another version, or do not belong together.
    """
    page = report_page(read_results(folder))
    path = folder / REPORT_NAME
    write_file(path, page)
    return path


def report_page(results: Results) -> str:
    """Return the report as HTML."""
    comparison = results.comparison
    judged = judge_images(results)
    sections = [
        ("verdict", "Verdict", f'<p class="verdict">{verdict(results)}</p>{summary_table(results)}'),
        ("differences", "Differences to the baseline", forest_section(results)),
        ("curves", "Curves", curves_section(results)),
        ("scores", "Scores and thresholds", histograms_section(results)),
        ("errors", "Misses and false alarms", gallery_section(results, judged)),
        ("patches", "Nearest training patches", patches_section(results, judged)),
        ("costs", "Time, memory, size", bars_section(results)),
        ("again", "To do it again", provenance_section(results)),
    ]
    style = asset("base.css") + asset(f"{_FOLDER}/report.css") + _legend_rules(len(results.methods))
    script = asset(f"{_FOLDER}/report.js")
    finished = sum(bool(method.runs) for method in results.methods)
    about = [
        str(comparison.data.get("name") or ""),
        f"{finished} of {count(len(results.methods), 'method')}",
        comparison.created[:10],
    ]
    parts = {
        "POLICY": _policy(style, script),
        "TITLE": escape(comparison.title),
        "SUBTITLE": " · ".join(escape(each) for each in about if each),
        "CONTENTS": "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections),
        "SECTIONS": _sections(sections),
        "STYLE": style,
        "SCRIPT": script,
    }
    return fill(asset(f"{_FOLDER}/page.html"), parts)


def _sections(sections: Sequence[tuple[str, str, str]]) -> str:
    return "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in sections
    )


def _legend_rules(methods: int) -> str:
    """Write the style rules by which the check boxes of the legend hide lines."""
    return "\n".join(
        f'#curves:has(input[data-method="{number}"]:not(:checked)) g[data-method="{number}"] {{ display: none; }}'
        for number in range(methods)
    )


def _policy(style: str, script: str) -> str:
    hashes = [b64encode(sha256(each.encode()).digest()).decode() for each in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
