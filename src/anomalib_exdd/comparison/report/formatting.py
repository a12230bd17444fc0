"""How the report writes numbers and names."""

import math
from collections.abc import Sequence

from anomalib_exdd.comparison.results import METRICS
from anomalib_exdd.reporting.markup import escape

NOTHING = "–"  # noqa: RUF001  what a table shows where there is no number

COSTS: dict[str, tuple[str, str, bool]] = {
    "fit_seconds": ("fit", "s", False),
    "peak_memory_mb": ("peak memory", "MB", False),
    "peak_gpu_memory_mb": ("peak GPU memory", "MB", False),
    "images_per_second": ("speed", "images/s", True),
    "latency_ms": ("latency", "ms", False),
    "model_mb": ("model size", "MB", False),
}
"""Costs of a run -> what tables call them, unit, and whether more is better."""


def higher_is_better(quantity: str) -> bool:
    """Whether more of a metric or cost is better."""
    return quantity in METRICS or COSTS[quantity][2]


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share as a percentage without its sign; tables say the unit in their heads."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}"


def points(difference: float) -> str:
    """Write a difference of two shares in percentage points, always with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")  # noqa: RUF001  a minus sign is wanted


def amount(value: float | None) -> str:
    """Write a cost with three significant digits, thousands apart, never with an exponent."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def number(value: float) -> str:
    """Write a score with three significant digits, in thousands and more without decimals."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "−")  # noqa: RUF001  a minus sign is wanted


def count(items: int, one: str, many: str = "") -> str:
    """Write how many of something there are."""
    return f"{items:,} {one if items == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """Join texts as a sentence does: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def strong(name: object) -> str:
    """Escape a name and set it in bold."""
    return f"<strong>{escape(name)}</strong>"
