"""One colour scale for the heat maps of all methods.

Map values of different methods have no common unit. Comparable is the share of the pixels of normal test images below
a value. Colours follow that share on a logarithmic scale (0 %, 90 %, 99 %, 99.9 %, ...): a value that one of ten
thousand normal pixels exceeds has the same colour for all methods.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

LEVELS = 64
MAX_DECADES = 4
_CODES = 1 << 16  # bit patterns of a half-precision number

# Ten colours of the map "inferno" (S. van der Walt and N. Smith, public domain): its brightness ascends evenly, which
# is visible to people with any colour vision and in a grey print.
_INFERNO = np.array([
    (0, 0, 4), (27, 12, 65), (74, 12, 107), (120, 28, 109), (165, 44, 96),
    (207, 68, 70), (237, 105, 37), (251, 155, 6), (247, 209, 61), (252, 255, 164),
])  # fmt: skip


def palette() -> NDArray[np.uint8]:
    """Return the colour of every level, RGB, shape (LEVELS, 3)."""
    places = np.linspace(0, len(_INFERNO) - 1, LEVELS)
    channels = [np.interp(places, np.arange(len(_INFERNO)), _INFERNO[:, channel]) for channel in range(3)]
    return np.column_stack(channels).round().astype(np.uint8)


def order_codes(values: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Map half-precision numbers to integers of the same order; NaN becomes the lowest, -0 equals 0.

    Exact ranks then need no sorting, only counts of 65,536 codes.
    """
    numbers = np.where(np.isnan(values), np.float16(-np.inf), values) + np.float16(0)
    bits = np.ascontiguousarray(numbers).view(np.uint16)
    return np.where(bits & 0x8000, ~bits, bits | 0x8000).astype(np.uint16)


class HeatScale:
    """The colour scale of one run.

    Args:
        normal_maps: Maps of the normal test images, float16, any shapes; iterated once.

    Raises:
        ValueError: If they have no pixel.
    """

    def __init__(self, normal_maps: Iterable[NDArray[np.float16]]) -> None:
        counts = np.zeros(_CODES, dtype=np.int64)
        for normal_map in normal_maps:
            counts += np.bincount(order_codes(normal_map).ravel(), minlength=_CODES)
        self.pixels = int(counts.sum())
        if not self.pixels:
            msg = "Argument `normal_maps` has to have at least one pixel to compare with, but has none."
            raise ValueError(msg)
        self._share_above = np.cumsum(counts[::-1])[::-1] / self.pixels

    def share_below(self, values: NDArray[np.float16]) -> NDArray[np.float64]:
        """Return the share of normal pixels below each value, 0 to 1, in the shape of the values."""
        return 1 - self._share_above[order_codes(values)]

    def levels(self, values: NDArray[np.float16], decades: int) -> NDArray[np.uint8]:
        """Return the level of the palette of each value, for a scale of so many powers of ten."""
        above = np.maximum(self._share_above, 10.0 ** -(decades + 1))
        of_code = (np.clip(-np.log10(above) / decades, 0, 1) * (LEVELS - 1)).round().astype(np.uint8)
        return of_code[order_codes(values)]


def common_decades(pixels: Iterable[int]) -> int:
    """Return how many powers of ten all scales can resolve, given the number of pixels of each: 1 to 4."""
    return max(1, min(MAX_DECADES, *(math.floor(math.log10(count)) for count in pixels)))


def decade_names(decades: int) -> list[str]:
    """Name the powers of ten by the share of normal pixels below: 0 %, 90 %, 99 %, 99.9 %."""
    return [f"{100 - 100 / 10**decade:.10g} %" for decade in range(decades + 1)]
