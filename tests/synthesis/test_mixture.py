from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_exdd.synthesis import Defect, Request, Synthesis, Synthesizer
from anomalib_exdd.synthesis.base import Pixels
from anomalib_exdd.synthesis.mixture import InAndOutSynthesizer
from made_up_defects import textured, with_defect


class Painter(Synthesizer):
    """Fills the mask with one grey level and keeps a diary."""

    def __init__(self, level: int) -> None:
        self.level = level
        self.prepared_on: list[str] = []
        self.batches: list[list[int]] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {"level": self.level}

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        assert len(defects) == 1
        assert len(normals) == 2
        self.prepared_on.append(self.device)

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        self.batches.append([request.index for request in requests])
        return [
            Synthesis(
                np.where(each.mask[..., None], np.uint8(self.level), each.image), each.mask, {"level": self.level}
            )
            for each in requests
        ]


class GreedyPainter(Painter):
    needs_defects = True


def requests(count: int) -> list[Request]:
    mask = np.zeros((8, 8), dtype=bool)
    mask[2, 3] = True
    return [Request(i, 100 + i, textured(0, 8, 8), mask) for i in range(count)]


def levels(results: list[Synthesis]) -> list[int]:
    return [int(result.image[2, 3, 0]) for result in results]


@given(hundredths=st.integers(0, 100), count=st.integers(1, 300))
def test_share_is_exact_for_any_number_of_images(hundredths: int, count: int) -> None:
    mixture = InAndOutSynthesizer(Painter(1), Painter(2), share=hundredths / 100)
    made = [mixture.turn(index)[0] for index in range(count)]
    assert sum(made) == count * hundredths // 100
    for part in range(1, count + 1):  # and evenly spread
        assert abs(sum(made[:part]) - part * hundredths / 100) < 1


def test_results_come_in_order_and_batches_are_passed_on() -> None:
    first, second = Painter(1), Painter(2)
    results = InAndOutSynthesizer(first, second).synthesize(requests(7))

    assert levels(results) == [2, 1, 2, 1, 2, 1, 2]
    assert [len(batch) for batch in first.batches] == [3]
    assert [len(batch) for batch in second.batches] == [4]
    assert results[1].details == {"synthesizer": "Painter", "level": 1}


def test_batches_do_not_matter() -> None:
    mixture = InAndOutSynthesizer(Painter(1), Painter(2), share=0.3)
    wanted = requests(10)
    together = levels(mixture.synthesize(wanted))
    alone = [levels(mixture.synthesize([request]))[0] for request in reversed(wanted)][::-1]
    assert together == alone
    assert together.count(1) == 3


def test_mixture_of_three() -> None:
    inner = InAndOutSynthesizer(Painter(1), Painter(2))
    results = InAndOutSynthesizer(inner, Painter(3)).synthesize(requests(40))

    assert [levels(results).count(level) for level in (1, 2, 3)] == [10, 10, 20]
    assert results[1].details["synthesizer"] == "Painter", "the one who painted is named, not the mixture"


def test_device_and_material_are_passed_on() -> None:
    first, second = Painter(1), Painter(2)
    mixture = InAndOutSynthesizer(first, second)
    mixture.device = "cuda:1"
    mixture.prepare([with_defect(1)], [textured(1), textured(2)])
    mixture.synthesize(requests(2))
    assert first.prepared_on == second.prepared_on == ["cuda:1"]
    assert first.device == second.device == "cuda:1"


def test_defects_are_needed_if_one_of_the_two_needs_them() -> None:
    assert InAndOutSynthesizer(GreedyPainter(1), Painter(2)).needs_defects
    assert InAndOutSynthesizer(Painter(2), GreedyPainter(1)).needs_defects
    assert not InAndOutSynthesizer(Painter(2), Painter(1)).needs_defects


def test_settings_are_nested() -> None:
    assert InAndOutSynthesizer(Painter(1), GreedyPainter(2), 0.25).settings == {
        "share": 0.25,
        "first": {"synthesizer": "Painter", "level": 1},
        "second": {"synthesizer": "GreedyPainter", "level": 2},
    }


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"`share` has to be between 0 and 1, but got"):
        InAndOutSynthesizer(Painter(1), Painter(2), share)
