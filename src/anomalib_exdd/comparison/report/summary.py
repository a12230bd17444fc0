"""The paragraph at the top: which method to take, and how sure the data are of it.

Methods are ranked by image AP, averaged over seeds: it is the metric that a few defective parts among many good ones
leave room in.
"""

import math

from anomalib_exdd.comparison.results import METRICS, Difference

from .formatting import amount, count, listed, percent, points, strong
from .reader import MethodResults, Results

RANKING_METRIC = "image_AP"


def verdict(results: Results) -> str:
    """Say in a paragraph of HTML what the comparison found."""
    ranked = rank_methods(results)
    sentences = [_lead(results, ranked), *_evidence(results, ranked), _next(ranked), _speed(ranked)]
    sentences.append(_size_of_test(results))
    failed = [method for method in results.methods if method.failed and not method.runs]
    if failed:
        sentences.append(f"{listed([strong(method.name) for method in failed])} failed; the table says why.")
    return " ".join(sentence for sentence in sentences if sentence)


def rank_methods(results: Results) -> list[MethodResults]:
    """Sort the methods that have an image AP by it, best first; ties stay in the order of the table."""
    return sorted(
        (method for method in results.methods if method.values(RANKING_METRIC)),
        key=lambda method: -(method.mean(RANKING_METRIC) or 0.0),
    )


def _lead(results: Results, ranked: list[MethodResults]) -> str:
    if not any(method.runs for method in results.methods):
        return "No method has finished: there is nothing to compare yet."
    metric = METRICS[RANKING_METRIC]
    if not ranked:
        return f"Without an {metric} (normal and defective test images are needed) no method can be called the best."
    mean = ranked[0].mean(RANKING_METRIC)
    level = [method for method in ranked if method.mean(RANKING_METRIC) == mean]
    spread = ranked[0].spread(RANKING_METRIC)
    seeds = len(ranked[0].values(RANKING_METRIC))
    over = f"mean of {seeds} seeds, ± {percent(spread)}" if spread is not None else "one seed"
    names = listed([strong(method.name) for method in level])
    if len(ranked) == 1:
        return f"{names} has an {metric} of {percent(mean)} % ({over}); no other method has one to compare it with."
    if len(level) > 1:
        return f"{names} share the highest {metric}: {percent(mean)} % ({over}), of {len(ranked)} methods."
    return f"{names} has the highest {metric} of {len(ranked)} methods: {percent(mean)} % ({over})."


def _evidence(results: Results, ranked: list[MethodResults]) -> list[str]:
    """Say what the paired differences tell about the best method, or about its followers if it is the baseline."""
    if len(ranked) < 2:
        return []
    name = ranked[0].name
    known = {each.method: each for each in finite_differences(results) if each.metric == RANKING_METRIC}
    if name in known:
        return [_compared(known[name])]
    followers = [known[method.name] for method in ranked[1:] if method.name in known]
    followers = [each for each in followers if each.baseline == name]
    if not followers:
        return ["There is no paired difference of it to another method, so nothing says whether that is chance."]
    unclear = [each for each in followers if includes_zero(each)]
    if not unclear:
        closest = _compared(followers[0])
        return [f"It is the baseline, and the 95 % interval of every difference to it leaves out 0. {closest}"]
    names = listed([strong(each.method) for each in unclear])
    which = f"It is the baseline. The 95 % intervals of the differences of {names} to it include 0:"
    return [f"{which} these data do not show that it is better than those."]


def _compared(difference: Difference) -> str:
    """Say how a method differs from the baseline, and whether that may be chance."""
    pair = f"{strong(difference.method)} minus the baseline {strong(difference.baseline)}"
    interval = f"95 % interval {points(difference.low)} to {points(difference.high)}"
    text = f"{pair}: {points(difference.mean)} points ({interval})."
    if includes_zero(difference):
        return f"{text} The interval includes 0: these data do not show that the one is better than the other."
    return f"{text} The interval leaves out 0."


def includes_zero(difference: Difference) -> bool:
    """Whether a difference's interval holds 0, its ends included."""
    return difference.low <= 0 <= difference.high


def finite_differences(results: Results) -> list[Difference]:
    """Return the paired differences that are numbers; a metric that nothing has gives none."""
    return [
        each for each in results.comparison.differences if all(map(math.isfinite, (each.mean, each.low, each.high)))
    ]


def _next(ranked: list[MethodResults]) -> str:
    """Name the method that follows the best."""
    best = ranked[0].mean(RANKING_METRIC) if ranked else None
    behind = [method for method in ranked if method.mean(RANKING_METRIC) != best]
    if not behind:
        return ""
    return f"Next comes {strong(behind[0].name)} with {percent(behind[0].mean(RANKING_METRIC))} %."


def _speed(ranked: list[MethodResults]) -> str:
    timed = [method for method in ranked if method.mean("latency_ms") is not None]
    if len(timed) < 2:
        return ""
    fastest = min(timed, key=lambda method: method.mean("latency_ms") or 0.0)
    shortest = f"{amount(fastest.mean('latency_ms'))} ms"
    own = ranked[0].mean("latency_ms")
    if fastest is ranked[0] or own is None:
        return f"On a single image {strong(fastest.name)} is the fastest of them: {shortest}."
    return f"On a single image {strong(fastest.name)} is the fastest of them: {shortest}, against {amount(own)} ms."


def _size_of_test(results: Results) -> str:
    data = results.comparison.data
    normal, defective = data.get("test_normal"), data.get("test_defective")
    if normal is None or defective is None:
        return ""
    return f"Measured on {count(int(normal), 'normal test image')} and {count(int(defective), 'defective one')}."
