"""A mixture of two synthesizers, as In&Out (arXiv 2406.00501) mixes diffusion with Perlin regions."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

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
        return self.first.needs_defects or self.second.needs_defects

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        """Prepare both."""
        for synthesizer in (self.first, self.second):
            synthesizer.device = self.device
            synthesizer.prepare(defects, normals)

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Pass each request to one of the two; see `Synthesizer.synthesize`."""
        turns = [self.turn(request.index) for request in requests]
        made: dict[bool, Iterator[Synthesis]] = {}
        for synthesizer, is_first in ((self.first, True), (self.second, False)):
            # Numbered among its own images: a mixture inside this mixture would otherwise see odd numbers only.
            own = [
                replace(each, index=turn[1]) for each, turn in zip(requests, turns, strict=True) if turn[0] == is_first
            ]
            synthesizer.device = self.device
            named = {"synthesizer": type(synthesizer).__name__}
            results = synthesizer.synthesize(own)
            made[is_first] = iter([replace(each, details={**named, **each.details}) for each in results])
        return [next(made[is_first]) for is_first, _ in turns]

    def turn(self, index: int) -> tuple[bool, int]:
        """Return whether the first synthesizer makes the image of a number, and its number among that one's images."""
        share = Fraction(str(self.share))  # without rounding: .29 of 100 is 29
        before, after = int(index * share), int((index + 1) * share)
        return (True, before) if after > before else (False, index - before)
