"""What the methods cost: a chart of bars for every quantity, with the range over seeds."""

from anomalib_exdd.reporting.markup import escape

from .charts import Scale, figure, line, panels, rows_of_names, svg, text, ticks, x_axis
from .formatting import COSTS, amount, count
from .reader import MethodResults, Results
from .tables import best_mean

_WIDTH, _LEFT, _RIGHT = 420, 116, 336
_ROW, _BAR, _TOP = 26, 16, 6


def bars_section(results: Results) -> str:
    """Make the section of time, memory, speed and size."""
    drawn = [_panel(results, quantity) for quantity in COSTS if any(each.values(quantity) for each in results.methods)]
    if not drawn:
        return "<p>Nothing was measured.</p>"
    explained = (
        '<p class="faint">Bars: mean over seeds; whiskers: least to greatest. ★: the best. Every chart starts at 0. '
        "Times are those of the machine named below.</p>"
    )
    return explained + panels(drawn) + _banks(results)


def _panel(results: Results, quantity: str) -> str:
    measured = [method for method in results.methods if method.values(quantity)]
    best = best_mean(results.methods, quantity)
    high = max(max(method.values(quantity)) for method in measured)
    scale = Scale(0, high or 1.0, _LEFT, _RIGHT)
    rows, bottom = rows_of_names([method.name for method in measured], _LEFT - 8, _TOP, _ROW)
    body = x_axis(scale, ticks(0, scale.high, 3), _TOP, bottom, _tick)
    for method, row in zip(measured, rows, strict=True):
        body += _row(method, quantity, scale, row, is_best=method.mean(quantity) == best)
    name, unit, more = COSTS[quantity]
    better = "higher is better" if more else "lower is better"
    return figure(
        svg(_WIDTH, bottom + 20, f"{name} of every method, {unit}", body),
        f"<h3>{name[0].upper()}{name[1:]}, {unit}</h3> {better}",
    )


def _row(method: MethodResults, quantity: str, scale: Scale, row: tuple[str, float], *, is_best: bool) -> str:
    values, mean = method.values(quantity), method.mean(quantity) or 0.0
    name, y = row
    drawn = f'<rect x="{_LEFT}" width="{scale(mean) - _LEFT:.1f}" y="{y - _BAR / 2}" height="{_BAR}" class="bar"/>'
    if len(values) > 1:
        drawn += line(scale(min(values)), y, scale(max(values)), y, "interval")
        drawn += "".join(line(scale(end), y - 4, scale(end), y + 4, "interval") for end in (min(values), max(values)))
    star = "★ " if is_best else ""
    label = text(scale(max(values)) + 8, y + 4, f"{star}{amount(mean)}", classes="bold" if is_best else "")
    spoken = (
        f"{method.name}: {amount(mean)} ({amount(min(values))} to {amount(max(values))}, {count(len(values), 'seed')})"
    )
    return f"<g><title>{escape(spoken)}</title>{name}{drawn}{label}</g>"


def _tick(value: float) -> str:
    return f"{value:,.10g}"


def _banks(results: Results) -> str:
    """Say how large the memory banks are, for the methods that have some."""
    rows = []
    for method in results.methods:
        normal, defective = method.mean("negative_entries"), method.mean("positive_entries")
        if normal is not None:
            defects = f" and {round(defective):,} of defective patches" if defective is not None else ""
            rows.append(f"<li>{escape(method.name)}: {round(normal):,} entries of normal{defects}</li>")
    return f"<h3>Memory banks</h3><ul>{''.join(rows)}</ul>" if rows else ""
