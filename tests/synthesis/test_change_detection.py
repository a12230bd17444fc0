import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_exdd.synthesis.base import Mask, Pixels
from anomalib_exdd.synthesis.change_detection import BEYOND, changed_mask, measure_change
from made_up_defects import blob, darkened, textured

SHAPE = (160, 120)
GIVEN = blob(*SHAPE, (80, 60), (40, 32))
DEFECT = blob(*SHAPE, (84, 56), (14, 9)) | blob(*SHAPE, (66, 72), (5, 6))


def redrawn(seed: int, roughness: float, *, levels: float) -> tuple[Pixels, Pixels]:
    """A surface, and the same with other texture inside the given mask, as diffusion redraws it, and a defect."""
    original, other = (textured(number, *SHAPE, roughness=roughness) for number in (seed, seed + 1000))
    light = cv2.GaussianBlur(original.astype(np.float32), (0, 0), 12)
    other = np.clip(light + other - cv2.GaussianBlur(other.astype(np.float32), (0, 0), 12), 0, 255).astype(np.uint8)
    surface = np.where(GIVEN[..., None], other, original).astype(np.uint8)
    return original, darkened(surface, DEFECT, levels)


def overlap(first: Mask, second: Mask) -> float:
    return np.count_nonzero(first & second) / np.count_nonzero(first | second)


@pytest.mark.parametrize("roughness", [2.0, 6.0, 10.0])
@pytest.mark.parametrize("mode", ["difference", "intersection"])
def test_mask_of_the_change_is_nearer_to_the_defect_than_the_given_one(roughness: float, mode: str) -> None:
    given_overlap = overlap(GIVEN, DEFECT)
    found = [overlap(changed_mask(*redrawn(seed, roughness, levels=45), GIVEN, mode), DEFECT) for seed in range(6)]
    assert min(found) > 1.5 * given_overlap
    assert np.mean(found) > 2.5 * given_overlap


def test_threshold_on_the_difference_is_not_as_good() -> None:
    better = []
    for seed in range(6):
        original, generated = redrawn(seed, 12.0, levels=45)
        plain = (np.abs(generated.astype(int) - original).mean(axis=2) > 20) & GIVEN
        better.append(
            overlap(changed_mask(original, generated, GIVEN, "intersection"), DEFECT) - overlap(plain, DEFECT)
        )
    assert np.mean(better) > 0.1


@pytest.mark.parametrize("roughness", [2.0, 6.0, 10.0])
def test_defect_is_told_from_redrawn_texture(roughness: float) -> None:
    with_defect = [measure_change(*redrawn(seed, roughness, levels=60), GIVEN) for seed in range(6)]
    without = [measure_change(*redrawn(seed, roughness, levels=0), GIVEN) for seed in range(6)]
    assert min(change.visible for change in with_defect) > 1.8 * max(change.visible for change in without)
    assert min(change.contrast for change in with_defect) > 1.5 * max(change.contrast for change in without)


def test_nothing_changed() -> None:
    image = textured(1, *SHAPE)
    change = measure_change(image, image, GIVEN)
    assert change.visible == 0
    assert change.changed_share == 0
    assert change.background_psnr == float("inf")
    assert change.background_difference == 0
    assert np.array_equal(changed_mask(image, image, GIVEN, "difference"), GIVEN), "the given mask is believed"


def test_numbers_of_a_known_change() -> None:
    image = np.full((*SHAPE, 3), 100, dtype=np.uint8)
    generated = darkened(image, GIVEN, 30)
    generated[0, 0] = 110
    change = measure_change(image, generated, GIVEN)

    assert change.visible == pytest.approx(30, abs=0.1)
    assert change.changed_share == pytest.approx(1, abs=0.01)
    assert change.background_difference == 10
    error = 10**2 / np.count_nonzero(~GIVEN)
    assert change.background_psnr == pytest.approx(10 * np.log10(255**2 / error))


def test_small_defect_in_a_large_mask_is_visible() -> None:
    image = textured(2, *SHAPE)
    small = blob(*SHAPE, (80, 60), (8, 12))  # more than a twentieth of the mask: the percentile sees it
    assert small.sum() > 0.05 * GIVEN.sum()
    assert measure_change(image, darkened(image, small, 60), GIVEN).visible > 40


def test_colored_defect_of_the_same_brightness_is_seen() -> None:
    image = textured(3, *SHAPE, roughness=3.0)
    generated = image.astype(int)
    generated[DEFECT] += (40, -40, 0)
    found = changed_mask(image, np.clip(generated, 0, 255).astype(np.uint8), GIVEN, "intersection")
    assert overlap(found, DEFECT) > 0.7


def test_intersection_stays_inside_and_difference_looks_a_little_beyond() -> None:
    image = textured(4, *SHAPE)
    tight = blob(*SHAPE, (80, 60), (20, 20))
    wide = blob(*SHAPE, (80, 60), (24, 24))
    generated = darkened(image, wide, 50)
    generated[:20] = 0  # far away

    inside = changed_mask(image, generated, tight, "intersection")
    beyond = changed_mask(image, generated, tight, "difference")

    assert not (inside & ~tight).any()
    assert (beyond & ~tight).any()
    assert not beyond[: 60 - BEYOND].any()
    assert overlap(beyond, wide) > overlap(inside, wide)


def test_pixels_that_are_as_they_were_are_never_marked() -> None:
    image = textured(5, *SHAPE)
    image[70:74, 30:36] = 0  # the surface's own dark spot stands out as much as a defect
    generated = darkened(image, blob(*SHAPE, (95, 60), (9, 9)), 60)
    assert not changed_mask(image, generated, GIVEN, "difference")[70:74, 30:36].any()


def test_too_little_found_falls_back_to_the_given_mask() -> None:
    image = textured(6, *SHAPE)
    tiny = blob(*SHAPE, (80, 60), (3, 3))
    assert tiny.sum() < 0.03 * GIVEN.sum()
    assert np.array_equal(changed_mask(image, darkened(image, tiny, 90), GIVEN, "intersection"), GIVEN)


def test_input_mode_returns_a_copy() -> None:
    image = textured(7, *SHAPE)
    mask = changed_mask(image, image, GIVEN, "input")
    assert np.array_equal(mask, GIVEN)
    assert mask is not GIVEN


@given(seed=st.integers(0, 2**31), height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_mask_is_never_empty(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    original, generated = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    mask = rng.random((height, width)) < rng.random()
    mask[rng.integers(height), rng.integers(width)] = True
    for mode in ("input", "difference", "intersection"):
        assert changed_mask(original, generated, mask, mode).any()
    assert not (changed_mask(original, generated, mask, "intersection") & ~mask).any()
    assert np.isfinite(measure_change(original, generated, mask).visible)
