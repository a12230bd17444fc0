"""A mixture of two synthesizers, as In&Out (arXiv 2406.00501) mixes diffusion with Perlin regions."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from .base import Defect, Pixels, Request, Synthesis, Synthesizer, check_range


class InAndOutSynthesizer(Synthesizer):
    """Make a given share of the images with one synthesizer and the rest with another.

    Of the first n images, the first synthesizer makes `floor(n * share)`, evenly spread: the image's number alone
    decides.

    Args:
        first: Makes this share of the images.
        second: Makes the rest.
        share: Between 0 and 1. The paper takes one half.
    """

    def __init__(self, first: Synthesizer, second: Synthesizer, share: float = 0.5) -> None:
        check_range(0, 1, share=share)
        self.first = first
        self.second = second
        self.share = share

    @property
    def needs_defects(self) -> bool:  # type: ignore[override]  # known only when the two are
        """Whether one of the two requires real defects."""
        return any(synthesizer.needs_defects for synthesizer in self._used)

    @property
    def settings(self) -> dict[str, Any]:
        """The share, and the settings of both under their names."""
        both = {"first": self.first, "second": self.second}
        named = {name: {"synthesizer": type(each).__name__, **each.settings} for name, each in both.items()}
        return {"share": self.share, **named}

    @property
    def _used(self) -> list[Synthesizer]:
        return [each for each, share in ((self.first, self.share), (self.second, 1 - self.share)) if share > 0]

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        """Prepare those of the two that make images."""
        for synthesizer in self._used:
            synthesizer.device = self.device
            synthesizer.prepare(defects, normals)

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Pass each request to one of the two; see `Synthesizer.synthesize`."""
        results: dict[int, Synthesis] = {}
        for synthesizer, is_first in ((self.first, True), (self.second, False)):
            positions = [i for i, request in enumerate(requests) if self.is_first(request.index) == is_first]
            # Numbered among its own images: a mixture inside this mixture would otherwise see odd numbers only.
            own = [replace(requests[i], index=self._number(requests[i].index)) for i in positions]
            synthesizer.device = self.device
            for i, result in zip(positions, synthesizer.synthesize(own), strict=True):
                details = {"synthesizer": type(synthesizer).__name__, **result.details}
                results[i] = replace(result, details=details)
        return [results[i] for i in range(len(requests))]

    def is_first(self, index: int) -> bool:
        """Return whether the first synthesizer makes the image of this number."""
        return self._firsts_before(index + 1) > self._firsts_before(index)

    def _firsts_before(self, index: int) -> int:
        """Images with a smaller number that the first one makes, without rounding: .29 of 100 is 29."""
        return int(index * Fraction(str(self.share)))

    def _number(self, index: int) -> int:
        before = self._firsts_before(index)
        return before if self.is_first(index) else index - before
