"""Images that use a small part of their 16 bits."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from anomalib_exdd.images.predict_loader import PredictLoader
from anomalib_exdd.images.reading import WHITE_LEVEL, read_image, warn_of_unused_range


def save_deep(path: Path, highest: int) -> Path:
    pixels = np.full((4, 5), 7, dtype=np.uint16)
    pixels[1, 2] = highest
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(("highest", "white"), [(200, 255), (900, 1023), (1900, 4095), (4095, 4095), (9000, 16383)])
@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_the_advice_fits_the_camera(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, highest: int, white: int
) -> None:
    path = save_deep(tmp_path / name, highest)
    warn_of_unused_range([path] * 40, WHITE_LEVEL)
    assert f"the highest number in some of them is {highest} (`{path}`)" in caplog.text
    assert f"`white_level` {white} " in caplog.text
    loader = PredictLoader([path])
    loader.white_level = white
    (batch,) = loader
    assert batch.image.max() == pytest.approx(highest / white)
    caplog.clear()
    warn_of_unused_range([path], white)
    assert caplog.text == ""


def test_colour_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pillow keeps the upper eight bits of colour, of which such a camera fills four."""
    pixels = np.random.default_rng(0).integers(0, 4096, (12, 8, 3), dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        cv2.imwrite(str(tmp_path / name), pixels)
        warn_of_unused_range([tmp_path / name], WHITE_LEVEL)
        assert f"{name}`), and 65535 is white" in caplog.text
    assert "Save colour with 8 bits per channel" in caplog.text


def test_nothing_is_said_of_other_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [save_deep(tmp_path / "bright.png", 30000), save_deep(tmp_path / "dark.png", 900)]  # one bright one will do
    Image.new("RGB", (5, 4)).save(tmp_path / "black.png")
    (tmp_path / "broken.png").write_text("no image")
    warn_of_unused_range([*files, tmp_path / "black.png", tmp_path / "broken.png"], WHITE_LEVEL)
    warn_of_unused_range([tmp_path / "black.png", tmp_path / "broken.png", tmp_path / "gone.png"], WHITE_LEVEL)
    warn_of_unused_range([], WHITE_LEVEL)
    assert caplog.text == ""


def test_numbers_beyond_white_are_refused(tmp_path: Path) -> None:
    path = save_deep(tmp_path / "deep.png", 5000)
    with pytest.raises(ValueError, match=r"deep\.png` holds numbers from 7 to 5000, .* 0 and 4095, which is white"):
        read_image(path, 4095)
