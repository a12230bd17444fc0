"""A mixture of two synthesizers, as In&Out (arXiv 2406.00501) mixes diffusion with Perlin regions."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from .base import Defect, Pixels, Request, Synthesis, Synthesizer, check


class InAndOutSynthesizer(Synthesizer):
    """Make a given share of the images with one synthesizer and the rest with another.

    An image's number alone decides who makes it: of the first n images, the first synthesizer makes `floor(n * share)`,
    evenly spread. What an image looks like is up to its own seed, as always.

    Args:
        first: Makes this share of the images.
        second: Makes the rest.
        share: Between 0 and 1. The paper takes one half.

    Raises:
        ValueError: If `share` is out of its range.
    """

    def __init__(self, first: Synthesizer, second: Synthesizer, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            msg = f"Argument `share` has to be between 0 and 1, but got {share}."
            raise ValueError(msg)
        self.first = first
        self.second = second
        self.share = share

    @property
    def needs_defects(self) -> bool:  # type: ignore[override]  # known only when the two are
        """Whether one of the two can do nothing without real defects."""
        return (self.share > 0 and self.first.needs_defects) or (self.share < 1 and self.second.needs_defects)

    @property
    def settings(self) -> dict[str, Any]:
        """The share, and the settings of both under their names."""
        return {
            "share": self.share,
            "first": {"synthesizer": type(self.first).__name__, **self.first.settings},
            "second": {"synthesizer": type(self.second).__name__, **self.second.settings},
        }

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        """Let those learn that will make images."""
        for synthesizer, wanted in ((self.first, self.share > 0), (self.second, self.share < 1)):
            if wanted:
                synthesizer.device = self.device
                synthesizer.prepare(defects, normals)

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Hand each request to the one whose turn it is; see `Synthesizer.synthesize`."""
        for request in requests:
            check(request)
        results: dict[int, Synthesis] = {}
        for synthesizer, firsts in ((self.first, True), (self.second, False)):
            positions = [i for i, request in enumerate(requests) if self._is_first(request.index) == firsts]
            if not positions:
                continue
            synthesizer.device = self.device
            # Numbered among its own images: a mixture inside this mixture would otherwise see odd numbers only.
            own = [replace(requests[i], index=self._number(requests[i].index)) for i in positions]
            for i, result in zip(positions, synthesizer.synthesize(own), strict=True):
                name = {"synthesizer": type(synthesizer).__name__}
                results[i] = replace(result, details={**name, **result.details})
        return [results[i] for i in range(len(requests))]

    def _firsts_before(self, index: int) -> int:
        """How many images with a smaller number the first one makes, without rounding: .29 of 100 is 29."""
        return int(index * Fraction(str(self.share)))

    def _is_first(self, index: int) -> bool:
        return self._firsts_before(index + 1) > self._firsts_before(index)

    def _number(self, index: int) -> int:
        before = self._firsts_before(index)
        return before if self._is_first(index) else index - before
