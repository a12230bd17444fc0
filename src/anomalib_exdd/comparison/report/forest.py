"""Paired differences to the baseline as forest plots, one for every metric."""

from collections.abc import Sequence

from anomalib_exdd.comparison.results import METRICS, Difference
from anomalib_exdd.reporting.markup import escape

from .charts import Scale, figure, line, panels, rows_of_names, svg, text, ticks, x_axis
from .formatting import count, points
from .reader import Results
from .summary import finite_differences, includes_zero

_WIDTH, _LEFT, _RIGHT = 420, 116, 240  # the plot lies between the methods' names and the numbers
_ROW, _TOP = 26, 8


def forest_section(results: Results) -> str:
    """Make the section of paired differences."""
    by_metric: dict[str, list[Difference]] = {}
    differences = finite_differences(results)
    for difference in differences:
        by_metric.setdefault(difference.metric, []).append(difference)
    if not by_metric:
        return "<p>There are no paired differences: they need a baseline and another method that has finished.</p>"
    order = [
        *(metric for metric in METRICS if metric in by_metric),
        *(each for each in by_metric if each not in METRICS),
    ]
    baselines = ", ".join(sorted({escape(each.baseline) for each in differences}))
    explained = (
        f'<p class="faint">Each method minus the baseline ({baselines}) on the same seeds and images, in percentage '
        "points, with the 95 % confidence interval. To the right of the line the method is better. "
        "A filled mark: the interval leaves out 0. A hollow one: it includes 0, so these data do not show a "
        "difference. Each metric has a scale of its own.</p>"
    )
    return explained + panels([_panel(metric, by_metric[metric]) for metric in order])


def _panel(metric: str, differences: Sequence[Difference]) -> str:
    low = min(0.0, *(each.low for each in differences))
    high = max(0.0, *(each.high for each in differences))
    margin = 0.05 * (high - low) or 0.01
    scale = Scale(low - margin, high + margin, _LEFT, _RIGHT)
    rows, bottom = rows_of_names([each.method for each in differences], _LEFT - 8, _TOP, _ROW)
    body = x_axis(scale, ticks(scale.low, scale.high, 3), _TOP, bottom, points)
    body += line(scale(0), _TOP, scale(0), bottom, "zero")
    body += "".join(_row(each, scale, *row) for each, row in zip(differences, rows, strict=True))
    name = METRICS.get(metric, metric)
    drawing = svg(_WIDTH, bottom + 20, f"Differences in {name} to the baseline", body)
    seeds = sorted({each.seeds for each in differences})
    over = " to ".join(str(number) for number in dict.fromkeys((seeds[0], seeds[-1])))
    return figure(drawing, f"<h3>{escape(name)}</h3> over {over} {'seed' if seeds[-1] == 1 else 'seeds'}")


def _row(difference: Difference, scale: Scale, name: str, y: float) -> str:
    kind = "hollow" if includes_zero(difference) else "filled"
    interval = f"{points(difference.low)} to {points(difference.high)}"
    spoken = f"{difference.method}: {points(difference.mean)}, 95 % interval {interval}"
    drawn = line(scale(difference.low), y, scale(difference.high), y, "interval")
    for end in (difference.low, difference.high):
        drawn += line(scale(end), y - 4, scale(end), y + 4, "interval")
    drawn += f'<circle cx="{scale(difference.mean):.1f}" cy="{y:.1f}" r="5" class="{kind}"/>'
    numbers = text(_RIGHT + 8, y + 4, f"{points(difference.mean)} ({interval})")
    return f"<g><title>{escape(spoken)}, {count(difference.seeds, 'seed')}</title>{name}{drawn}{numbers}</g>"
