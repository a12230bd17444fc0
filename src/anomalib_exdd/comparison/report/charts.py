"""Small charts, written as SVG by hand: scales, axes, lines, and the legend that all of them share.

Colours and line styles are classes of the style sheet (`m0` to `m7`, `d0` to `d3`), so that they follow the theme. A
chart is drawn about 400 units wide, which is a phone's width: its texts stay readable wherever it stands.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.reporting.markup import escape

from .reader import MethodResults

COLOURS = 8
DASHES = 4
_STEPS = (1, 2, 2.5, 5, 10)
_NARROW, _WIDE = frozenset("iljtfrI.,;:'|()[] "), frozenset("mwMWO@%…")
_FONT, _LINE = 13, 15  # size of letters, and distance of lines
_LETTER_WIDTHS = (5.0, 7.9, 12.0)  # narrow, usual and wide letters of that size, in wide fonts


@dataclass(frozen=True)
class Scale:
    """A linear scale from values to positions in a drawing.

    Attributes:
        low: Value at `start`.
        high: Value at `end`.
        start: Position of `low`.
        end: Position of `high`; may lie before `start`, as it does for heights.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        span = self.high - self.low
        return self.start + (value - self.low) / span * (self.end - self.start) if span else self.start


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Choose round values within a range, about as many as asked for.

    Args:
        low: Lower end; finite.
        high: Upper end, not below it.
        about: How many.
    """
    if not high > low:
        return [low]
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in _STEPS if factor * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step + 0.0 for number in range(first, math.floor(high / step + 1e-9) + 1)]


def style_of(method: MethodResults) -> str:
    """Return the classes that give a method its colour and line style: no two of the first 32 share both."""
    return f"m{method.number % COLOURS} d{(method.number + method.number // COLOURS) % DASHES}"


def svg(width: float, height: float, title: str, body: str) -> str:
    """Wrap a drawing; its title is what a screen reader says instead of it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def text(x: float, y: float, content: object, anchor: str = "start", classes: str = "") -> str:
    """Write a text whose baseline is at `y`."""
    kind = f' class="{classes}"' if classes else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(content)}</text>'


def wrapped(name: str, width: float) -> list[str]:
    """Divide a name into lines that take no more than a width, after spaces and the like where there are some."""
    lines: list[str] = []
    current = ""
    for part in re.findall(r"[^\s_/,-]*[\s_/,-]*", name):
        if text_width((current + part).rstrip()) > width:
            lines, current = [*lines, current], ""
        for letter in part:
            if text_width(current + letter) > width:
                lines, current = [*lines, current], ""
            current += letter
    return [each.strip() for each in (*lines, current) if each.strip()]


def rows_of_names(
    names: Sequence[str], right: float, top: float, least: float
) -> tuple[list[tuple[str, float]], float]:
    """Write names below each other, over several lines where they are long, each in a row that is as high as it needs.

    Args:
        names: The names.
        right: Where they end.
        top: Where the first row begins.
        least: Height of a row with a name of one line.

    Returns:
        Each name as drawn with the middle of its row, and where the last row ends.
    """
    rows = []
    for name in names:
        lines = wrapped(name, right)
        height = least + _LINE * (len(lines) - 1)
        first = top + (least + _FONT) / 2 - 2.5  # baseline of the first line
        drawn = "".join(text(right, first + _LINE * number, each, "end") for number, each in enumerate(lines))
        rows.append((drawn, top + height / 2))
        top += height
    return rows, top


def text_width(name: str) -> float:
    """Return a width that a text does not exceed in whatever font a browser takes."""
    narrow, usual, wide = _LETTER_WIDTHS
    return sum(narrow if letter in _NARROW else wide if letter in _WIDE else usual for letter in name)


def line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    """Draw a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"/>'


def polyline(points_N2: NDArray[np.float64], x: Scale, y: Scale, classes: str) -> str:
    """Draw a line through points, shape (N, 2); points that do not turn it are left out."""
    kept = corners(points_N2)
    path = " ".join(f"{x(first):.1f},{y(second):.1f}" for first, second in kept.tolist())
    return f'<polyline points="{path}" class="{classes}"/>'


def corners(points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Leave out points that repeat the one before, or lie on the way from it to the one after.

    Args:
        points_N2: Points of a line that never turns back, shape (N, 2).
    """
    moved = np.concatenate(([True], np.diff(points_N2, axis=0).any(axis=1)))
    points_N2 = points_N2[moved]
    if len(points_N2) < 3:
        return points_N2
    steps = np.diff(points_N2, axis=0)
    turns = np.abs(steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]) > 1e-12
    return points_N2[np.concatenate(([True], turns, [True]))]


def x_axis(scale: Scale, values: Iterable[float], top: float, bottom: float, write: Callable[[float], str]) -> str:
    """Draw vertical grid lines with their numbers below."""
    return "".join(
        line(scale(value), top, scale(value), bottom, "grid") + text(scale(value), bottom + 15, write(value), "middle")
        for value in values
    )


def y_axis(scale: Scale, values: Iterable[float], left: float, right: float, write: Callable[[float], str]) -> str:
    """Draw horizontal grid lines with their numbers to the left."""
    return "".join(
        line(left, scale(value), right, scale(value), "grid") + text(left - 5, scale(value) + 4, write(value), "end")
        for value in values
    )


def key(method: MethodResults) -> str:
    """Draw the sample of a method's line that legends show."""
    sample = f'<line x1="1" y1="6" x2="33" y2="6" class="mean {style_of(method)}"/>'
    return f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true">{sample}</svg>'


def figure(drawing: str, caption: str) -> str:
    """Put a drawing and its caption (HTML) together."""
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def panels(figures: Sequence[str]) -> str:
    """Stand figures beside each other, as many as the window is wide."""
    return f'<div class="panels">{"".join(figures)}</div>'
