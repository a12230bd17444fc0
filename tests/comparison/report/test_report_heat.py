from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw

from anomalib_exdd.comparison.report.pictures import (
    LEVELS,
    SIDE,
    TILE,
    common_decades,
    decade_names,
    heat_levels,
    heat_picture,
    outline,
    palette,
    patch_tile,
    photo,
    read_mask,
    read_picture,
    share_above,
    small_size,
)

HALVES = arrays(np.float16, st.integers(1, 40), elements=st.floats(width=16, allow_nan=False))


def levels_of(normal: np.ndarray, values: np.ndarray, decades: int) -> np.ndarray:
    return heat_levels(share_above(values, np.sort(normal).astype(np.float32)), decades)


def opened(picture: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(picture.partition(",")[2]))).convert("RGB"))


@given(HALVES, HALVES)
def test_levels_are_those_of_going_through_all_pixels(normal: np.ndarray, values: np.ndarray) -> None:
    levels = levels_of(normal, values, 2)
    above = np.array([np.mean(normal >= value) for value in values])
    expected = np.clip(-np.log10(np.maximum(above, 1e-3)) / 2, 0, 1) * (LEVELS - 1)
    assert levels == pytest.approx(expected, abs=0.501)


def test_higher_values_never_get_lower_levels_and_decades_are_even() -> None:
    normal = np.arange(1000, dtype=np.float16)
    levels = levels_of(normal, np.linspace(-5, 1500, 4000).astype(np.float16), 3).astype(int)
    assert (np.diff(levels) >= 0).all()
    assert (levels[0], levels[-1]) == (0, LEVELS - 1)
    # 90 % of the normal pixels lie below 900, 99 % below 990: a third and two thirds of 63.
    assert levels_of(normal, np.array([900, 990], dtype=np.float16), 3).tolist() == [
        21,
        42,
    ]


def test_equal_ranks_get_equal_colours_whatever_the_scale() -> None:
    random = np.random.default_rng(1)
    one = np.unique(random.normal(size=600).astype(np.float16))
    other = (np.arange(len(one)) * 3 - 700).astype(np.float16)  # same order, other numbers
    assert len(np.unique(other)) == len(one)
    values = random.permutation(len(one))[:50]
    levels = [levels_of(maps, maps[values], 3) for maps in (one, other)]
    assert (levels[0] == levels[1]).all()


def test_scale_spans_what_all_runs_can_tell_apart() -> None:
    assert [common_decades(pixels) for pixels in ([10**6, 5000], [10**9], [3], [100, 10**5])] == [3, 4, 1, 2]
    assert decade_names(4) == ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]


def test_palette_grows_brighter_evenly() -> None:
    linear = np.where(palette() / 255 <= 0.04045, palette() / 255 / 12.92, ((palette() / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert steps.max() < 3 * steps.mean()


def test_heat_pictures_have_the_colours_of_the_palette() -> None:
    levels = np.repeat(np.array([[0, 21], [42, 63]], dtype=np.uint8), 40, axis=0).repeat(40, axis=1)
    mask = Image.new("L", (80, 80))
    ImageDraw.Draw(mask).rectangle((30, 8, 50, 12), fill=255)
    picture, edge = opened(heat_picture(levels, (80, 80), mask)), outline(mask, (80, 80))
    for row, column in ((20, 20), (20, 60), (60, 20), (60, 60), (10, 35), (10, 45)):
        assert picture[row, column].tolist() == palette()[levels[row, column]].tolist()
    (colour,) = np.unique(picture[edge], axis=0).tolist()
    assert colour not in palette().tolist()


def test_a_hot_spot_survives_a_smaller_picture() -> None:
    levels = np.zeros((400, 200), dtype=np.uint8)
    levels[123, 77] = LEVELS - 1
    for width, height in ((50, 100), (199, 399), (33, 71)):
        bright = (opened(heat_picture(levels, (width, height))) == palette()[-1]).all(axis=-1)
        ((row, column),) = np.argwhere(bright)
        assert row * 400 // height <= 123 < (row + 1) * 400 / height
        assert column * 200 // width <= 77 < (column + 1) * 200 / width


def test_outline_surrounds_the_defect_even_a_thin_one() -> None:
    mask = Image.new("L", (800, 400))
    ImageDraw.Draw(mask).line((200, 100, 600, 100), fill=255)  # a single row
    size = small_size(mask.size)
    assert max(size) == SIDE
    edge = outline(mask, size)
    row = round(100 * size[1] / 400)
    assert not edge[row, size[0] // 2]
    assert edge[row - 2 : row, size[0] // 2].any()
    assert edge[row + 1 : row + 4, size[0] // 2].any()
    rows, columns = edge.nonzero()
    assert abs(rows.mean() - row) < 1.5
    assert abs(columns.mean() - size[0] / 2) < 2


def test_pictures_of_all_kinds_and_none(tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.linspace(0, 60000, 64).reshape(8, 8).astype(np.uint16)).save(deep)
    picture = read_picture(deep)
    assert picture is not None
    grey = np.asarray(picture)[..., 0].ravel()
    assert (grey[0], grey[-1]) == (0, 255)
    assert abs(int(grey[32]) - 129) < 3  # not clipped to white
    (tmp_path / "torn.png").write_bytes(deep.read_bytes()[:60])
    (tmp_path / "text.png").write_text("not a picture")
    for path in (tmp_path / "torn.png", tmp_path / "text.png", tmp_path / "absent.png"):
        assert read_picture(path) is None
        assert read_mask(path) is None


def test_masks_are_what_is_not_black(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[1, 2, 2] = 1  # so dark a blue that its grey is 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask is not None
    assert np.argwhere(np.asarray(mask)).tolist() == [[1, 2]]


def test_tiles_are_centred_on_the_patch_even_at_the_border() -> None:
    pixels = np.zeros((100, 100, 3), dtype=np.uint8)
    pixels[:, 48:52] = 255
    tile = opened(patch_tile(Image.fromarray(pixels), row=0.0, column=0.5)).astype(int)
    assert tile.shape == (TILE, TILE, 3)
    bright = (tile.min(axis=-1) > 180).any(axis=0).nonzero()[0]
    assert abs(bright.mean() - TILE / 2) < 4
    assert tile[: TILE // 2 - 20].max() < 40  # above the image there is nothing


def test_small_images_keep_their_size_and_kinds_are_named() -> None:
    picture = photo(Image.new("RGB", (30, 20), (200, 10, 10)))
    assert opened(picture).shape == (20, 30, 3)
    assert picture.startswith("data:image/jpeg;base64,")
    assert heat_picture(np.zeros((3, 3), dtype=np.uint8), (3, 3)).startswith("data:image/png;base64,")
