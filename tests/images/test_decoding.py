"""Which pixels of a mask are defect, in every kind of file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anomalib_exdd.images.decoding import read_defect_pixels
from anomalib_exdd.images.reading import looks_inverted

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
