"""Which method is best, and whether that may be chance: facts for the paragraph at the top of the report.

Methods are ranked by image AP, averaged over seeds: with few defective images among many normal ones it separates
methods better than AUROC does.
"""

import math
from typing import Any

from anomalib_exdd.comparison.results import Difference

from .reader import MethodResults, Results

RANKING_METRIC = "image_AP"


def summary_facts(results: Results) -> dict[str, Any]:
    """Return what `templates/summary.html` says: ranking, differences of the best method, and the fastest one."""
    ranked = rank_methods(results)
    best = ranked[0] if ranked else None
    tied = [method for method in ranked if method.mean(RANKING_METRIC) == ranked[0].mean(RANKING_METRIC)]
    known = {each.method: each for each in finite_differences(results) if each.metric == RANKING_METRIC}
    others = [known[method.name] for method in ranked[1:] if method.name in known]
    timed = [method for method in ranked if method.mean("latency_ms") is not None]
    return {
        "metric": RANKING_METRIC,
        "ranked": ranked,
        "tied": tied,
        "second": next((method for method in ranked if method not in tied), None),
        "to_baseline": known.get(best.name) if best is not None else None,
        "as_baseline": [each for each in others if best is not None and each.baseline == best.name],
        "fastest": min(timed, key=lambda method: method.mean("latency_ms") or 0.0) if len(timed) > 1 else None,
        "failed": [method.name for method in results.methods if method.failed and not method.runs],
    }


def rank_methods(results: Results) -> list[MethodResults]:
    """Sort the methods that have an image AP by it, best first; ties stay in the order of the table."""
    found = [method for method in results.methods if method.values(RANKING_METRIC)]
    return sorted(found, key=lambda method: -(method.mean(RANKING_METRIC) or 0.0))


def includes_zero(difference: Difference) -> bool:
    """Whether 0 is in a difference's confidence interval."""
    return difference.low <= 0 <= difference.high


def finite_differences(results: Results) -> list[Difference]:
    """Return the paired differences that are finite."""
    return [
        each for each in results.comparison.differences if all(map(math.isfinite, (each.mean, each.low, each.high)))
    ]
