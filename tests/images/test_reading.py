"""What is read of every kind of file: which pixels of a mask are defect, and how images are turned."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anomalib_exdd.comparison.report.pictures import read_picture
from anomalib_exdd.images.masks import looks_inverted, read_defect_pixels, read_mask
from anomalib_exdd.images.predict_loader import PredictLoader, leave_out_masks
from anomalib_exdd.images.reading import inspect_image, read_image
from made_up_images import save_image

Save = Callable[[NDArray[np.uint8], Path], None]


@pytest.fixture
def square() -> NDArray[np.uint8]:
    """A mask of 64 pixels of defect."""
    pixels = np.zeros((48, 40), dtype=np.uint8)
    pixels[9:17, 13:21] = 255
    return pixels


def white_on_transparent_white(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.merge("RGBA", [Image.new("L", pixels.shape[::-1], 255)] * 3 + [Image.fromarray(pixels)]).save(path)


def grey_with_alpha(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.merge("LA", [Image.new("L", pixels.shape[::-1], 255), Image.fromarray(pixels)]).save(path)


def transparent_palette(pixels: NDArray[np.uint8], path: Path) -> None:
    image = Image.fromarray(pixels // 255, mode="P")
    image.putpalette([255, 255, 255, 255, 0, 0])
    image.save(path, transparency=0)


def transparent_grey(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(np.where(pixels > 0, 200, 100).astype(np.uint8)).save(path, transparency=100)


def opaque_black(pixels: NDArray[np.uint8], path: Path) -> None:
    """A layer that is black in parts: neither it nor what is transparent is defect."""
    alpha = np.full_like(pixels, 255)
    alpha[30:] = 0
    colour = pixels.copy()
    colour[30:] = 255
    Image.merge("RGBA", [Image.fromarray(colour)] * 3 + [Image.fromarray(alpha)]).save(path)


@pytest.mark.parametrize(
    "save", [white_on_transparent_white, grey_with_alpha, transparent_palette, transparent_grey, opaque_black]
)
def test_what_is_transparent_is_background(tmp_path: Path, square: NDArray[np.uint8], save: Save) -> None:
    save(square, tmp_path / "mask.png")
    assert np.array_equal(read_defect_pixels(tmp_path / "mask.png"), square > 0)


def lossy_webp_with_alpha(pixels: NDArray[np.uint8], path: Path) -> None:
    grey = Image.fromarray(pixels)
    Image.merge("RGBA", [grey, grey, grey, Image.fromarray(np.full_like(pixels, 255))]).save(path, quality=40)


@pytest.mark.parametrize(
    ("suffix", "save"),
    [
        (".jpg", lambda pixels, path: Image.fromarray(pixels).save(path, quality=60)),
        (".webp", lambda pixels, path: Image.fromarray(pixels).save(path, quality=40)),
        (".webp", lossy_webp_with_alpha),
        (
            ".webp",
            lambda pixels, path: Image.fromarray(pixels).save(
                path, quality=40, save_all=True, append_images=[Image.fromarray(255 - pixels)]
            ),
        ),
        (".tif", lambda pixels, path: Image.fromarray(pixels).save(path, compression="jpeg", quality=60)),
        (".tif", lambda pixels, path: Image.fromarray(pixels).convert("RGB").save(path, compression="jpeg")),
        (".png", lambda pixels, path: Image.fromarray(pixels).save(path, format="JPEG", quality=60)),
    ],
    ids=["jpeg", "webp", "webp with alpha", "animated webp", "jpeg in tiff", "colour jpeg in tiff", "jpeg called png"],
)
def test_noise_of_lossy_compression_is_no_defect(
    tmp_path: Path, square: NDArray[np.uint8], suffix: str, save: Save
) -> None:
    path = tmp_path / f"mask{suffix}"
    save(square, path)
    with Image.open(path) as image:
        assert (np.asarray(image.convert("L")) > 0).sum() > 64, "the test needs compression noise"
    assert np.array_equal(read_defect_pixels(path), square > 0)


@pytest.mark.parametrize("value", [1, 127, 255])
@pytest.mark.parametrize(
    ("suffix", "arguments"),
    [(".webp", {"lossless": True}), (".tif", {"compression": "tiff_lzw"}), (".tif", {}), (".bmp", {}), (".gif", {})],
)
def test_any_value_counts_where_nothing_is_lost(
    tmp_path: Path, square: NDArray[np.uint8], suffix: str, arguments: dict[str, object], value: int
) -> None:
    Image.fromarray(square // 255 * value).save(tmp_path / f"mask{suffix}", **arguments)
    assert np.array_equal(read_defect_pixels(tmp_path / f"mask{suffix}"), square > 0)


def test_only_a_mask_that_takes_image_and_border_looks_inverted(square: NDArray[np.uint8]) -> None:
    defect = square > 0
    assert looks_inverted(~defect)
    assert looks_inverted(np.ones_like(defect))
    at_the_edge = defect.copy()
    at_the_edge[:, :8] = True
    assert looks_inverted(~at_the_edge)
    large = np.zeros_like(defect)
    large[1:-1, 1:-1] = True
    large[5:, 0] = True
    assert not any(looks_inverted(mask) for mask in (defect, large, np.zeros_like(defect)))


ORIENTATIONS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(np.transpose(stored), 2),
    8: lambda stored: np.rot90(stored, 1),
}
"""How an image is shown, by its EXIF orientation: the standard's row 0 and column 0."""


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(
    ("name", "depth", "arguments"),
    [
        ("a.png", 8, {}),
        ("a.png", 16, {}),
        ("a.tif", 8, {}),
        ("a.tif", 16, {}),
        ("a.tif", 8, {"compression": "tiff_lzw"}),
        ("a.webp", 8, {"lossless": True}),
        ("a.jpg", 8, {"quality": 100}),
    ],
)
def test_images_and_masks_are_turned_alike(
    tmp_path: Path, name: str, depth: int, arguments: dict[str, object], orientation: int
) -> None:
    stored = np.zeros((24, 40), dtype=np.uint8)
    stored[:8, :8] = 255
    stored[8:16, 8:24] = 130
    shown = ORIENTATIONS[orientation](stored)
    path = tmp_path / name
    pixels = stored if depth == 8 else stored.astype(np.uint16) * 257
    Image.fromarray(pixels).save(path, exif=with_orientation(orientation), **arguments)
    assert inspect_image(path) == shown.shape
    assert np.abs(read_image(path)[0].numpy() * 255 - shown).max() <= 2
    assert np.array_equal(read_defect_pixels(path), shown > 0)
    picture = read_picture(path)
    assert picture is not None
    assert np.abs(np.asarray(picture)[..., 0].astype(int) - shown).max() <= 2


def test_a_broken_orientation_is_none(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for number, exif in enumerate((b"Exif\x00\x00nothing of the kind", b"Exif\x00\x00II*\x00\x08\x00", b"")):
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path, exif=exif)
        assert inspect_image(path) == (6, 8)
        assert np.array_equal((read_image(path)[0] * 255).round().numpy(), pixels)
    Image.fromarray(pixels).save(tmp_path / "9.png", exif=with_orientation(9))
    assert np.array_equal((read_image(tmp_path / "9.png")[0] * 255).round().numpy(), pixels)


def test_larger_images_than_pillow_decodes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_image(tmp_path / "large.png", (30, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for read in (read_image, read_mask, inspect_image):
        with pytest.raises(ValueError, match=r"large\.png` has more .*1200 pixels.* set ANOMALIB_EXDD_MAX_PIXELS"):
            read(path)
    loader = PredictLoader([path])
    assert list(loader) == []
    assert "ANOMALIB_EXDD_MAX_PIXELS" in loader.take_unreadable()[0].reason
    assert leave_out_masks([path, save_image(tmp_path / "large_mask.png", (30, 40))])[1] == []


@pytest.mark.parametrize(("limit", "expected"), [(None, "89478485"), ("1200000000", "1200000000")])
def test_the_limit_of_pixels_can_be_raised(limit: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ANOMALIB_EXDD_MAX_PIXELS"}
    environment |= {} if limit is None else {"ANOMALIB_EXDD_MAX_PIXELS": limit}
    code = "import anomalib_exdd.images.reading; from PIL import Image; print(Image.MAX_IMAGE_PIXELS)"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == expected
