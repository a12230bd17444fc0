"""How the report writes numbers and names."""

import math

NOTHING = "–"  # noqa: RUF001  stands where there is no number

COSTS: dict[str, tuple[str, str, bool]] = {
    "fit_seconds": ("fit", "s", False),
    "peak_memory_mb": ("peak memory", "MB", False),
    "peak_gpu_memory_mb": ("peak GPU memory", "MB", False),
    "images_per_second": ("speed", "images/s", True),
    "latency_ms": ("latency", "ms", False),
    "model_mb": ("model size", "MB", False),
}
"""Cost of a run -> name, unit, and whether more is better."""


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share as a percentage without the sign."""
    return NOTHING if share is None else f"{100 * share:.{digits}f}"


def points(difference: float) -> str:
    """Write a difference of two shares in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")  # noqa: RUF001  a minus sign


def amount(value: float | None) -> str:
    """Write a cost with three significant digits, without exponent."""
    if not value:
        return NOTHING if value is None else "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, from 1000 on without decimals; whole numbers in full."""
    if value is None:
        return NOTHING
    is_whole = isinstance(value, int) or 1000 <= abs(value) < 1e7
    text = f"{value:,.0f}" if is_whole else f"{value:.{digits}g}"
    return text.replace("-", "−")  # noqa: RUF001  a minus sign


def count(items: int, one: str) -> str:
    """Write a number of things: 1 image, 2 images."""
    return f"{items:,} {one if items == 1 else one + 's'}"
