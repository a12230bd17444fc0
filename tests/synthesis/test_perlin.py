import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_exdd.synthesis import Request
from anomalib_exdd.synthesis.base import Mask
from anomalib_exdd.synthesis.perlin import PerlinSynthesizer, shuffled
from made_up_defects import blob, textured

pytestmark = pytest.mark.usefixtures("one_thread")


def request_of(seed: int, height: int = 96, width: int = 64) -> Request:
    mask = np.zeros((height, width), dtype=bool)
    mask[0, 0] = True
    return Request(seed, seed, textured(seed % 5, height, width), mask)


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    folder = tmp_path / "textures" / "plain"
    folder.mkdir(parents=True)
    for level in (0, 255):
        Image.fromarray(np.full((20, 30, 3), level, dtype=np.uint8)).save(folder / f"{level}.PNG")
    (folder / "README.txt").write_text("no image")
    return folder.parent


def test_only_the_returned_region_changes() -> None:
    for result, request in ((PerlinSynthesizer().synthesize([each])[0], each) for each in map(request_of, range(20))):
        changed = (result.image != request.image).any(axis=2)
        assert not changed[~result.mask].any()
        assert changed[result.mask].mean() > 0.3
        assert result.image.dtype == np.uint8
        assert result.mask.dtype == np.bool_


def test_batch_and_order_and_global_states_do_not_matter() -> None:
    requests = [request_of(seed) for seed in (3, 1, 2)]
    together = PerlinSynthesizer().synthesize(requests)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    for request, expected in zip(requests[::-1], together[::-1], strict=True):
        alone = PerlinSynthesizer().synthesize([request])[0]
        assert np.array_equal(alone.image, expected.image)
        assert np.array_equal(alone.mask, expected.mask)
        assert alone.details == expected.details


def test_seed_decides() -> None:
    request = request_of(1)
    images = {
        PerlinSynthesizer().synthesize([Request(0, seed, request.image, request.mask)])[0].image.tobytes()
        for seed in range(8)
    }
    assert len(images) == 8


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    PerlinSynthesizer().synthesize([request_of(1)])
    assert torch.equal(torch.rand(3), expected)


def test_regions_lie_on_the_part() -> None:
    part = blob(120, 100, (60, 50), (40, 30))
    image = np.where(part[..., None], textured(1, 120, 100), 0).astype(np.uint8)
    near = cv2.dilate(part.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    for seed in range(10):
        region = PerlinSynthesizer().synthesize([Request(0, seed, image, near)])[0].mask
        assert region.any()
        assert not (region & ~near).any()


@pytest.mark.parametrize("max_area", [0.02, 0.2])
def test_regions_are_neither_empty_nor_too_large(max_area: float) -> None:
    results = PerlinSynthesizer(max_area=max_area).synthesize([request_of(seed) for seed in range(40)])
    noise = [result.mask for result in results if result.details["region"] == "Perlin noise"]

    assert all(result.mask.any() for result in results)
    assert len(noise) > 20
    assert max(mask.mean() for mask in noise) <= max_area


def test_shape_is_drawn_where_noise_finds_nothing() -> None:
    result = PerlinSynthesizer(max_area=1e-6).synthesize([request_of(1)])[0]
    assert result.details["region"].startswith("drawn ")
    assert result.mask.any()


@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_any_size_will_do(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    result = PerlinSynthesizer().synthesize([Request(0, seed, image, np.ones((height, width), dtype=bool))])[0]
    assert result.image.shape == image.shape
    assert result.mask.any()


def test_opacity_is_the_share_of_the_texture(textures: Path) -> None:
    synthesizer = PerlinSynthesizer(textures, opacity=(0.25, 0.25))
    gray = np.full((64, 64, 3), 100, dtype=np.uint8)
    mask: Mask = np.ones((64, 64), dtype=bool)
    results = synthesizer.synthesize([Request(0, seed, gray, mask) for seed in range(12)])

    assert {result.details["opacity"] for result in results} == {0.25}
    for result in results:
        values = result.image[result.mask].astype(int)
        assert values.min() >= 75  # .75 * 100 + .25 * 0 to 255
        assert values.max() <= 139


def test_half_of_the_regions_take_a_texture(textures: Path) -> None:
    results = PerlinSynthesizer(textures).synthesize([request_of(seed) for seed in range(40)])
    names = [result.details["texture"] for result in results]

    assert set(names) == {"plain/0.PNG", "plain/255.PNG", "the image itself, shuffled"}
    assert 10 <= names.count("the image itself, shuffled") <= 30


@given(height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_shuffled_image_is_made_of_its_own_pixels(height: int, width: int) -> None:
    image = np.arange(height * width * 3, dtype=np.uint16).reshape(height, width, 3).astype(np.uint8)
    mixed = shuffled(image, np.random.default_rng(0))
    assert mixed.shape == image.shape
    assert {tuple(pixel) for pixel in mixed.reshape(-1, 3)} <= {tuple(pixel) for pixel in image.reshape(-1, 3)}
    if height % 8 == width % 8 == 0:
        assert np.array_equal(np.sort(mixed, axis=None), np.sort(image, axis=None))
        assert not np.array_equal(mixed, image)


def test_settings_are_plain(textures: Path) -> None:
    assert PerlinSynthesizer().settings == {"textures": None, "opacity": [0.15, 1.0], "max_area": 0.2}
    assert PerlinSynthesizer(textures).settings["textures"] == textures.as_posix()


def test_unusable_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`opacity` has to be two ascending numbers"):
        PerlinSynthesizer(opacity=(0.5, 0.2))
    with pytest.raises(ValueError, match=r"`max_area` has to be between 0 and 1, but got 2"):
        PerlinSynthesizer(max_area=2)
    with pytest.raises(ValueError, match=r"folder `.*missing` of `textures` holds no image"):
        PerlinSynthesizer(tmp_path / "missing")
