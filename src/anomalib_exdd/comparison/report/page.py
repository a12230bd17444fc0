"""The report of a comparison: `report.html`, one file that needs nothing else.

The summary and the table come first, the evidence below, and at the end what it takes to reproduce it. Style and script
are allowed by their hashes and pictures as data; a browser refuses everything else, and all network.
"""

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment

from anomalib_exdd.comparison.results import METRICS, MethodResults, Results, read_results
from anomalib_exdd.utils.files import write_file
from anomalib_exdd.utils.templates import template_environment

from . import formatting
from .charts import cost_charts, curve_charts, difference_charts, histogram_charts, style_of
from .formatting import COSTS
from .gallery import ERRORS_OF_EACH, MAX_IMAGES, error_cards, explained_methods, image_outcomes
from .pictures import decade_names, palette

REPORT_NAME = "report.html"
RANKING_METRIC = "image_AP"
"""With few defective images among many normal ones it separates methods better than AUROC does."""


def write_report(folder: Path) -> Path:
    """Write the report into a folder that `anomalib compare` wrote, and return its path.

    Raises:
        FileNotFoundError: If the folder has no `results.json`.
        ValueError: If its schema is another version's.
    """
    path = folder / REPORT_NAME
    write_file(path, report_page(read_results(folder)))
    return path


def report_page(results: Results) -> str:
    """Return the report as HTML."""
    environment = build_environment()
    images = image_outcomes(results)
    cards, decades = error_cards(results, images)
    costs = [cost for cost in COSTS if any(method.values(cost) for method in results.methods)]
    style = environment.get_template("report.css").render(methods=results.methods)
    script = environment.get_template("report.js").render()
    hashes = [b64encode(sha256(each.encode()).digest()).decode() for each in (style, script)]
    return environment.get_template("page.html").render(
        results=results,
        comparison=results.comparison,
        style=style,
        script=script,
        hashes=hashes,
        facts=summary_facts(results),
        costs=costs,
        best={quantity: _best_mean(results.methods, quantity) for quantity in (*METRICS, *costs)},
        difference_charts=difference_charts(results),
        curve_charts=curve_charts(results),
        histogram_charts=histogram_charts(results),
        cost_charts=cost_charts(results),
        num_images=len(images),
        num_errors=sum(bool(image.errors) for image in images),
        cards=cards,
        limits=(ERRORS_OF_EACH, MAX_IMAGES),
        scale=None if decades is None else decade_names(decades),
        explained=explained_methods(results, images),
    )


def summary_facts(results: Results) -> dict[str, Any]:
    """Return what `templates/summary.html` says: ranking, differences of the best method, and the fastest one."""
    ranked = rank_methods(results)
    best = ranked[0].name if ranked else ""
    tied = [method for method in ranked if method.mean(RANKING_METRIC) == ranked[0].mean(RANKING_METRIC)]
    known = {each.method: each for each in results.differences if each.metric == RANKING_METRIC}
    others = [known[method.name] for method in ranked[1:] if method.name in known]
    timed = [method for method in ranked if method.values("latency_ms")]
    return {
        "metric": RANKING_METRIC,
        "ranked": ranked,
        "tied": tied,
        "second": next((method for method in ranked if method not in tied), None),
        "to_baseline": known.get(best),
        "as_baseline": [each for each in others if each.baseline == best],
        "fastest": min(timed, key=lambda method: method.mean("latency_ms") or 0.0) if len(timed) > 1 else None,
        "failed": [method.name for method in results.methods if method.failed and not method.runs],
    }


def rank_methods(results: Results) -> list[MethodResults]:
    """Sort the methods that have an image AP by its mean, best first; ties stay in the order of the table."""
    found = [method for method in results.methods if method.values(RANKING_METRIC)]
    return sorted(found, key=lambda method: -(method.mean(RANKING_METRIC) or 0.0))


def build_environment() -> Environment:
    """Return the environment of the templates, with the filters that write numbers."""
    environment = template_environment("anomalib_exdd.comparison.report")
    environment.filters.update(
        amount=formatting.amount,
        count_of=formatting.count,
        json=lambda content: json.dumps(content, indent=2, ensure_ascii=False),
        name_of=lambda path: PurePath(path).name,
        number=formatting.number,
        percent=formatting.percent,
        points=formatting.points,
        px=lambda position: f"{position:.1f}",
        style_of=style_of,
    )
    environment.globals.update(METRICS=METRICS, COSTS=COSTS, NOTHING=formatting.NOTHING, palette=palette().tolist())
    return environment


def _best_mean(methods: Sequence[MethodResults], quantity: str) -> float | None:
    """Return the best mean of a metric or cost; None if fewer than two methods have one."""
    means = [mean for method in methods if (mean := method.mean(quantity)) is not None]
    if len(means) < 2:
        return None
    return max(means) if quantity in METRICS or COSTS[quantity][2] else min(means)
