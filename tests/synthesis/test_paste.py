from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_exdd.synthesis import Defect, Request
from anomalib_exdd.synthesis.base import Mask, Pixels
from anomalib_exdd.synthesis.paste import Blend, PasteSynthesizer
from anomalib_exdd.synthesis.placement import place
from made_up_defects import blob, darkened, textured, with_defect

SHAPE = (140, 110)
blends = pytest.mark.parametrize("blend", ["poisson", "contrast"])


def spot(height: int, width: int, centre: tuple[float, float] = (70, 55)) -> Mask:
    return blob(height, width, centre, (9, 7))


def request_of(
    seed: int, defect: Defect | None = None, image: Pixels | None = None, at: tuple[float, float] = (70, 55)
) -> Request:
    image = textured(1, *SHAPE) if image is None else image
    return Request(
        seed, seed, image, spot(*image.shape[:2], at), "", with_defect(2, *SHAPE) if defect is None else defect
    )


def contrast_of(image: Pixels, mask: Mask) -> float:
    """How much brighter a defect is than its surroundings, in grey levels."""
    near, far = (cv2.dilate(mask.astype(np.uint8), np.ones((size, size), np.uint8)) > 0 for size in (15, 27))
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return float(image[core if core.any() else mask].mean() - image[far & ~near].mean())


@blends
@pytest.mark.parametrize("brightness", [-50, 0, 60])
def test_contrast_with_the_surroundings_is_kept(blend: Blend, brightness: int) -> None:
    image = np.clip(textured(1, *SHAPE).astype(int) + brightness, 0, 255).astype(np.uint8)
    for seed in range(6):
        result = PasteSynthesizer(blend).synthesize([request_of(seed, image=image)])[0]
        assert contrast_of(result.image, result.mask) == pytest.approx(-50, abs=9)
        assert result.details["blend"] == blend


@blends
def test_pixels_away_from_the_defect_stay_as_they_are(blend: Blend) -> None:
    for seed in range(6):
        request = request_of(seed)
        result = PasteSynthesizer(blend, margin=5).synthesize([request])[0]
        distance = cv2.distanceTransform((~result.mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        changed = (result.image != request.image).any(axis=2)
        assert not changed[distance >= 6].any()
        assert changed[result.mask].mean() > 0.9


@blends
def test_mask_is_where_the_defect_is(blend: Blend) -> None:
    """The image and its mask are moved alike, to within a pixel: no half of it is missing or shifted."""
    for seed in range(8):
        request = request_of(seed, image=np.full((*SHAPE, 3), 128, dtype=np.uint8))
        smooth = Defect(darkened(np.full((*SHAPE, 3), 90, dtype=np.uint8), spot(*SHAPE), 60), spot(*SHAPE), "s.png")
        result = PasteSynthesizer(blend).synthesize([replace(request, defect=smooth)])[0]
        dark = result.image.mean(axis=2) < 98  # half of the step
        assert np.count_nonzero(dark & result.mask) / np.count_nonzero(dark | result.mask) > 0.8


@given(
    seed=st.integers(0, 2**31),
    row=st.integers(0, 139),
    column=st.integers(0, 109),
    blend=st.sampled_from(Blend.__args__),
)
@settings(max_examples=50, deadline=None)
def test_defect_lies_as_near_to_the_wanted_place_as_possible(seed: int, row: int, column: int, blend: Blend) -> None:
    request = request_of(seed, at=(row, column))
    result = PasteSynthesizer(blend).synthesize([request])[0]
    rows, columns = np.nonzero(result.mask)
    radius = np.hypot(rows.max() - rows.min(), columns.max() - columns.min()) / 2
    wanted = np.argwhere(request.mask)
    wanted = (wanted.min(axis=0) + wanted.max(axis=0)) / 2
    centre = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
    reachable = np.clip(wanted, radius + 9, np.array(SHAPE) - radius - 10)
    assert np.abs(centre - reachable).max() <= radius
    if np.array_equal(wanted, reachable):
        assert np.abs(centre - wanted).max() <= 0.5
    assert result.details["blend"] == blend, "there is always room for blending"


@blends
def test_thin_scratch_survives(blend: Blend) -> None:
    canvas = np.zeros(SHAPE, dtype=np.uint8)
    cv2.line(canvas, (30, 30), (75, 90), 1)
    scratch = canvas > 0
    defect = Defect(darkened(textured(3, *SHAPE), scratch, 70), scratch, "scratch.png")
    for seed in range(6):
        request = request_of(seed, defect)
        result = PasteSynthesizer(blend).synthesize([request])[0]
        change = result.image.astype(int).mean(axis=2) - request.image.mean(axis=2)
        assert cv2.connectedComponents(result.mask.astype(np.uint8), connectivity=8)[0] == 2
        assert change[result.mask].mean() < -20
        assert result.details["blend"] == blend


@blends
def test_flat_gray_defect_stays_visible(blend: Blend) -> None:
    image = textured(3, *SHAPE)
    image[spot(*SHAPE)] = 40
    for seed in range(4):
        result = PasteSynthesizer(blend).synthesize([request_of(seed, Defect(image, spot(*SHAPE), "hole.png"))])[0]
        assert contrast_of(result.image, result.mask) < -60


def test_defect_that_fills_its_image_is_pasted_without_poisson_editing() -> None:
    everything = Defect(textured(7, 30, 24), np.ones((30, 24), dtype=bool), "all.png")
    result = PasteSynthesizer().synthesize([request_of(1, everything)])[0]
    assert result.details["blend"] == "contrast, as the defect touches the border of its own image"
    assert result.mask.any()


def test_defect_at_the_border_of_its_image_keeps_its_contrast() -> None:
    mask = spot(*SHAPE, (0, 40))
    defect = Defect(darkened(textured(4, *SHAPE), mask), mask, "cut.png")
    for seed in range(4):
        result = PasteSynthesizer().synthesize([request_of(seed, defect)])[0]
        assert "its own image" in result.details["blend"]
        assert contrast_of(result.image, result.mask) == pytest.approx(-50, abs=12)


def test_defect_stays_on_the_part() -> None:
    part = blob(*SHAPE, (70, 55), (55, 40))
    image = np.where(part[..., None], textured(1, *SHAPE), 0).astype(np.uint8)
    near = cv2.dilate(part.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    for at in ((70, 55), (8, 8), (130, 100)):
        result = PasteSynthesizer().synthesize([request_of(3, image=image, at=at)])[0]
        assert not (result.mask & ~near).any()
        assert np.array_equal(result.image[~near], image[~near])


def test_batch_and_order_do_not_matter() -> None:
    requests = [request_of(seed) for seed in (4, 2, 9)]
    together = PasteSynthesizer().synthesize(requests)
    for request, expected in zip(requests[::-1], together[::-1], strict=True):
        alone = PasteSynthesizer().synthesize([request])[0]
        assert np.array_equal(alone.image, expected.image)
        assert np.array_equal(alone.mask, expected.mask)
    assert len({result.mask.tobytes() for result in together}) == 3


@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(16, 60), st.integers(16, 60)),
    defect_size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    share=st.floats(0, 1),
    blend=st.sampled_from(Blend.__args__),
)
@settings(max_examples=60, deadline=None)
def test_no_defect_is_impossible(
    seed: int, size: tuple[int, int], defect_size: tuple[int, int], share: float, blend: Blend
) -> None:
    """OpenCV asserts where a region leaves the image: no mask, however odd, may get there."""
    rng = np.random.default_rng(seed)
    mask = rng.random(defect_size) < share**3
    mask[rng.integers(defect_size[0]), rng.integers(defect_size[1])] = True
    defect = Defect(rng.integers(0, 256, (*defect_size, 3), dtype=np.uint8), mask, "odd.png")
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask, _, _ = place(image, [defect], "moved", rng)
    result = PasteSynthesizer(blend).synthesize([Request(0, seed, image, mask, "", defect)])[0]
    assert result.image.shape == image.shape
    assert result.mask.shape == size
    assert result.mask.any()


def test_scale_is_kept_within_its_limits() -> None:
    areas = [
        np.count_nonzero(PasteSynthesizer(scales=(0.8, 1.1)).synthesize([request_of(seed)])[0].mask)
        for seed in range(30)
    ]
    area = np.count_nonzero(with_defect(2, *SHAPE).mask)
    assert 0.8**2 * area < min(areas) < 0.8 * area
    assert 1.05 * area < max(areas) < 1.7 * area  # every pixel that is touched counts


def test_settings_and_needs() -> None:
    assert PasteSynthesizer.needs_defects
    assert PasteSynthesizer("contrast", margin=8).settings == {"blend": "contrast", "scales": [0.7, 1.3], "margin": 8}


def test_unusable_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`scales` has to be two ascending numbers"):
        PasteSynthesizer(scales=(1.2, 0.8))
    with pytest.raises(ValueError, match=r"`margin` has to be at least 4, but got 2"):
        PasteSynthesizer(margin=2)
    request = request_of(1)
    with pytest.raises(ValueError, match=r"has no real defect, which is needed"):
        PasteSynthesizer().synthesize([replace(request, defect=None)])
