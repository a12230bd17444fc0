"""The paragraph at the top of the report: which method is best, and whether that may be chance.

Methods are ranked by image AP, averaged over seeds: with few defective images among many normal ones it separates
methods better than AUROC does.
"""

import math

from markupsafe import Markup

from anomalib_exdd.comparison.results import METRICS, Difference

from .formatting import amount, count, listed, percent, points, strong
from .reader import MethodResults, Results

RANKING_METRIC = "image_AP"


def summarize(results: Results) -> Markup:
    """Return the paragraph as HTML."""
    ranked = rank_methods(results)
    sentences = [_best(results, ranked), *_evidence(results, ranked), _second(ranked), _fastest(ranked)]
    data = results.comparison.data
    normal, defective = data.get("test_normal"), data.get("test_defective")
    if normal is not None and defective is not None:
        images = f"{count(int(normal), 'normal test image')} and {count(int(defective), 'defective one')}"
        sentences.append(f"Measured on {images}.")
    if failed := [strong(method.name) for method in results.methods if method.failed and not method.runs]:
        sentences.append(Markup("{} failed; the table says why.").format(listed(failed)))
    return Markup(" ").join(sentence for sentence in sentences if sentence)


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


def _best(results: Results, ranked: list[MethodResults]) -> str:
    metric = METRICS[RANKING_METRIC]
    if not any(method.runs for method in results.methods):
        return "No method has finished: there is nothing to compare yet."
    if not ranked:
        return f"Without an {metric} (normal and defective test images are needed) no method can be called the best."
    best, mean = ranked[0], ranked[0].mean(RANKING_METRIC)
    names = listed([strong(method.name) for method in ranked if method.mean(RANKING_METRIC) == mean])
    tied = names != strong(best.name)
    deviation, seeds = best.deviation(RANKING_METRIC), len(best.values(RANKING_METRIC))
    over = "one seed" if deviation is None else f"mean of {seeds} seeds, ± {percent(deviation)}"
    value = f"{percent(mean)} % ({over})"
    if len(ranked) == 1:
        return Markup("{} has an {} of {}; no other method has one to compare it with.").format(names, metric, value)
    if tied:
        return Markup("{} share the highest {}: {}, of {} methods.").format(names, metric, value, len(ranked))
    return Markup("{} has the highest {} of {} methods: {}.").format(names, metric, len(ranked), value)


def _evidence(results: Results, ranked: list[MethodResults]) -> list[str]:
    """Say what the paired differences tell about the best method, or about the others if it is the baseline."""
    if len(ranked) < 2:
        return []
    best = ranked[0].name
    known = {each.method: each for each in finite_differences(results) if each.metric == RANKING_METRIC}
    if best in known:
        return [_interval(known[best])]
    others = [known[method.name] for method in ranked[1:] if method.name in known]
    others = [each for each in others if each.baseline == best]
    if not others:
        return ["There is no paired difference of it to another method, so nothing says whether that is chance."]
    unclear = listed([strong(each.method) for each in others if includes_zero(each)] or [""])
    if not unclear:
        claim = Markup("It is the baseline, and the 95 % interval of every difference to it leaves out 0. {}")
        return [claim.format(_interval(others[0]))]
    claim = Markup("It is the baseline. The 95 % intervals of the differences of {} to it include 0: {}")
    return [claim.format(unclear, "these data do not show that it is better than those.")]


def _interval(difference: Difference) -> Markup:
    if includes_zero(difference):
        conclusion = "The interval includes 0: these data do not show that the one is better than the other."
    else:
        conclusion = "The interval leaves out 0."
    return Markup("{} minus the baseline {}: {} points (95 % interval {} to {}). {}").format(
        strong(difference.method),
        strong(difference.baseline),
        *map(points, (difference.mean, difference.low, difference.high)),
        conclusion,
    )


def _second(ranked: list[MethodResults]) -> str:
    behind = [method for method in ranked if method.mean(RANKING_METRIC) != ranked[0].mean(RANKING_METRIC)]
    if not behind:
        return ""
    return Markup("Next comes {} with {} %.").format(strong(behind[0].name), percent(behind[0].mean(RANKING_METRIC)))


def _fastest(ranked: list[MethodResults]) -> str:
    latencies = [(latency, method.name) for method in ranked if (latency := method.mean("latency_ms")) is not None]
    if len(latencies) < 2:
        return ""
    fastest, name = min(latencies, key=lambda each: each[0])
    own = ranked[0].mean("latency_ms")
    against = "" if own is None or name == ranked[0].name else f", against {amount(own)} ms"
    claim = Markup("On a single image {} is the fastest of them: {} ms{}.")
    return claim.format(strong(name), amount(fastest), against)
