from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_fill_holes

from anomalib_exdd.synthesis import Defect
from anomalib_exdd.synthesis.base import Mask, Pixels
from anomalib_exdd.synthesis.foreground import foreground
from anomalib_exdd.synthesis.placement import MaskSource, fit_mask, place
from anomalib_exdd.synthesis.shapes import AREAS, LEAST_AREA, draw_shape
from made_up_defects import blob, textured, with_defect

seeds = st.integers(0, 2**32 - 1)


def pieces(mask: Mask) -> int:
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1


def defect_of(mask: Mask) -> Defect:
    return Defect(textured(5, *mask.shape), mask, "made/up.png")


def thin_line(height: int, width: int) -> Mask:
    canvas = np.zeros((height, width), dtype=np.uint8)
    cv2.polylines(canvas, [np.array([(8, 6), (20, 30), (22, 60), (40, 88)])], isClosed=False, color=1)
    return canvas > 0


def part_on(background: int, shape: tuple[int, int] = (120, 100)) -> tuple[Pixels, Mask]:
    part = blob(*shape, (shape[0] / 2, shape[1] / 2), (shape[0] * 0.4, shape[1] * 0.36))
    noise = np.random.default_rng(0).integers(-1, 2, (*shape, 3))
    image = np.where(part[..., None], textured(3, *shape), np.clip(background + noise, 0, 255)).astype(np.uint8)
    return image, part


# --- where the part is


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("roughness", [1.0, 6.0, 20.0])
def test_surface_that_fills_the_image_is_all_part(seed: int, roughness: float) -> None:
    assert foreground(textured(seed, 128, 96, roughness=roughness)).all()


@pytest.mark.parametrize("background", [0, 30, 230, 255])
def test_part_is_found_on_a_flat_background(background: int) -> None:
    image, part = part_on(background)
    found = foreground(image)
    assert np.count_nonzero(found & part) / np.count_nonzero(found | part) > 0.93


def test_flat_region_inside_the_part_stays_part() -> None:
    image, part = part_on(20)
    image[50:70, 40:60] = 20
    assert foreground(image)[50:70, 40:60].all()
    assert not foreground(image)[~cv2.dilate(part.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)].any()


def test_dirt_on_the_background_is_no_part() -> None:
    image, _ = part_on(255)
    image[4:7, 4:7] = 90
    assert not foreground(image)[:8, :8].any()


@pytest.mark.parametrize("levels", [0, 120, 135])
def test_background_without_a_clear_step_is_doubted(levels: int) -> None:
    image = textured(1, 128, 96)
    image[:, :30] = levels or int(image.mean())
    if levels == 0:  # one that fades into the part
        image[:, :30] = np.linspace(0, 120, 30).astype(np.uint8)[None, :, None]
    assert foreground(image).all()


def test_image_of_one_color_is_all_part() -> None:
    assert foreground(np.full((64, 64, 3), 255, dtype=np.uint8)).all()


@given(seed=seeds, height=st.integers(1, 60), width=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_some_part_is_always_left(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(256), dtype=np.uint8)
    image[: rng.integers(height + 1), : rng.integers(width + 1)] = rng.integers(256, size=3)
    assert foreground(image).any()


# --- masks of real defects as they are


def test_real_mask_is_taken_as_it_is() -> None:
    defects = [with_defect(seed) for seed in range(4)]
    mask, defect, description = place(textured(9), defects, "real", np.random.default_rng(1))

    assert any(defect is each for each in defects)
    assert np.array_equal(mask, defect.mask)
    assert defect.path in description


def test_every_real_mask_is_drawn() -> None:
    defects = [with_defect(seed) for seed in range(4)]
    drawn = {place(textured(9), defects, "real", np.random.default_rng(seed))[1].path for seed in range(60)}
    assert drawn == {defect.path for defect in defects}


def test_one_defect_is_read() -> None:
    class Counting(Sequence[Defect]):
        read = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Defect:
            self.read += 1
            return with_defect(index)

    defects = Counting()
    place(textured(9), defects, "moved", np.random.default_rng(1))
    assert defects.read == 1


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_stretched_mask_marks_every_pixel_that_it_covers(data: st.DataObject) -> None:
    sides = st.integers(1, 20)
    old, new = (data.draw(sides), data.draw(sides)), (data.draw(sides), data.draw(sides))
    mask = np.random.default_rng(data.draw(seeds)).random(old) < 0.15
    expected = np.zeros(new, dtype=bool)
    for row, column in np.ndindex(*new):
        spans = []
        for position, size, source in zip((row, column), new, old, strict=True):
            first = position * source // size
            spans.append(slice(first, first + 1 if size >= source else -(-(position + 1) * source // size)))
        expected[row, column] = mask[tuple(spans)].any()

    fitted = fit_mask(mask, new)

    assert np.array_equal(fitted, expected)
    assert fitted.any() == mask.any()


# --- masks of real defects, moved


@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_thin_line_stays_one_thin_line(seed: int) -> None:
    line = thin_line(96, 64)
    moved, _, _ = place(textured(2, 140, 150), [defect_of(line)], "moved", np.random.default_rng(seed))

    assert moved.shape == (140, 150)
    assert pieces(moved) == 1
    assert 0.7 < np.count_nonzero(moved) / np.count_nonzero(line) < 4  # longer, and two or three pixels wide


@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_solid_region_gets_no_holes_and_keeps_its_area(seed: int) -> None:
    mask = blob(96, 64, (40, 30), (18, 11))
    moved, _, _ = place(textured(2), [defect_of(mask)], "moved", np.random.default_rng(seed))

    assert np.array_equal(binary_fill_holes(moved), moved)
    # Scaled by .7 to 1.3 along both axes, a third of a pixel wider, and bent a little.
    assert 0.35 < np.count_nonzero(moved) / np.count_nonzero(mask) < 2.4


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_all_pieces_are_moved_together(seed: int) -> None:
    mask = blob(96, 64, (20, 12), (5, 5)) | blob(96, 64, (50, 40), (4, 6)) | blob(96, 64, (22, 44), (3, 3))
    moved, _, _ = place(textured(2, 120, 110), [defect_of(mask)], "moved", np.random.default_rng(seed))
    assert pieces(moved) == 3


@given(seed=seeds, height=st.integers(1, 48), width=st.integers(1, 48), rectangle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_defect_larger_than_the_image_still_gets_a_place(seed: int, height: int, width: int, rectangle: bool) -> None:
    mask = np.ones((96, 64), dtype=bool) if rectangle else thin_line(96, 64)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for source in ("real", "moved"):
        placed, _, _ = place(image, [defect_of(mask)], source, np.random.default_rng(seed))
        assert placed.shape == (height, width)
        assert placed.any()


def test_moved_masks_are_everywhere() -> None:
    defects = [with_defect(1)]
    masks = [place(textured(2), defects, "moved", np.random.default_rng(seed))[0] for seed in range(300)]
    reached = np.any(masks, axis=0)

    assert reached.mean() > 0.9
    assert len({mask.tobytes() for mask in masks}) == 300


def test_moved_masks_stay_on_the_part() -> None:
    image, part = part_on(0)
    near = cv2.dilate(part.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    for seed in range(40):
        mask = place(image, [with_defect(1)], "moved", np.random.default_rng(seed))[0]
        assert not (mask & ~near).any()


# --- made-up shapes


def test_drawn_shapes_have_realistic_areas_and_all_kinds() -> None:
    part = np.ones((200, 150), dtype=bool)
    shapes = [draw_shape(part, np.random.default_rng(seed)) for seed in range(200)]
    shares = np.array([mask.mean() for mask, _ in shapes])

    assert {kind for _, kind in shapes} == {"scratch", "spots", "blob", "mark"}
    assert all(np.count_nonzero(mask) >= LEAST_AREA for mask, _ in shapes)
    assert shares.max() < 2 * AREAS[1]
    assert np.quantile(shares, 0.1) < 0.002
    assert np.quantile(shares, 0.9) > 0.01
    scratches = [mask for mask, kind in shapes if kind == "scratch"]
    thickness = [cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5).max() for mask in scratches]
    assert max(thickness) <= 3.5  # radius of the thickest place


@given(seed=seeds, height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_drawn_shapes_lie_on_the_part_and_are_never_empty(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    part = rng.random((height, width)) < rng.random()
    part[rng.integers(height), rng.integers(width)] = True
    mask, _ = draw_shape(part, rng)
    assert mask.any()
    assert not (mask & ~part).any()


# --- all of them


def test_auto_draws_where_nothing_is_known() -> None:
    image, rng = textured(1), np.random.default_rng(0)
    assert place(image, [], "auto", rng)[1] is None
    assert place(image, [], "auto", rng)[2].startswith("drawn ")
    assert place(image, [with_defect(1)], "auto", rng)[1] is not None
    assert place(image, [with_defect(1)], "drawn", rng)[1] is None


@pytest.mark.parametrize("source", ["auto", "real", "moved", "drawn"])
def test_the_generator_decides_everything(source: MaskSource) -> None:
    image, defects = textured(4), [with_defect(seed) for seed in range(3)]
    first, second = (place(image, defects, source, np.random.default_rng(11)) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert first[2] == second[2]


def test_unusable_arguments_are_named() -> None:
    image, rng = textured(1), np.random.default_rng(0)
    empty = with_defect(1)
    with pytest.raises(ValueError, match=r"mask of defect `defects/00001.png` is empty"):
        place(image, [Defect(empty.image, np.zeros_like(empty.mask), empty.path)], "moved", rng)
    with pytest.raises(ValueError, match=r"of defect `a.png` have to be .* but are .* and \[96, 64\] of uint8"):
        place(image, [Defect(empty.image, empty.mask.astype(np.uint8), "a.png")], "real", rng)
    with pytest.raises(ValueError, match=r"of defect `a.png` have to be .* but are \[96, 64\] of uint8 and"):
        place(image, [Defect(empty.image[..., 0], empty.mask, "a.png")], "real", rng)
