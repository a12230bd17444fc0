from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_exdd.synthesis.review_page import LONGEST_SIDE, MAX_IMAGES, contact_sheet, preview
from made_up_records import record_of


def pictures(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    original = np.full((height, width, 3), 100, dtype=np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 2] = True  # a line of one pixel
    result = original.copy()
    result[mask, 1] -= 20  # one channel, darker
    return original, mask, result


def panels(small: Image.Image) -> list[np.ndarray]:
    strip = np.asarray(small.convert("L"), dtype=int)
    width = (strip.shape[1] - 3 * 4) // 4
    return [strip[:, start : start + width] for start in range(0, strip.shape[1], width + 4)]


def test_preview_shows_four_panels() -> None:
    original, mask, result, difference = panels(preview(*pictures(40, 24)))
    assert original.shape == mask.shape == result.shape == difference.shape == (40, 24)
    assert abs(original - 100).max() < 12
    assert mask[20].min() > 200
    assert mask[[5, 35]].max() < 30
    assert (original - result)[20].mean() > 5
    assert abs(difference[20].mean() - 4 * 20) < 12  # multiplied, of the channel that changed
    assert difference[[5, 35]].max() < 12


@pytest.mark.parametrize("size", [(2400, 900), (900, 2400)])
def test_large_images_become_small_and_thin_lines_stay(size: tuple[int, int]) -> None:
    original, mask, *_ = panels(preview(*pictures(*size)))
    assert max(original.shape) == LONGEST_SIDE
    assert mask[mask.shape[0] // 2].min() > 150


def saved(root: Path, count: int, small: Image.Image) -> None:
    (root / "previews").mkdir()
    for number in range(count):
        small.save(root / "previews" / f"{number:05d}.jpg")


def test_sheet_has_a_place_for_each_and_marks_the_rejected(tmp_path: Path) -> None:
    small = preview(*pictures(40, 24))
    saved(tmp_path, 5, small)
    records = [record_of(number, accepted=number != 1, prompt="a long description " * 20) for number in range(5)]
    sheet = np.asarray(contact_sheet(tmp_path, records, columns=2), dtype=int)
    assert 2 * small.width < sheet.shape[1] < 2.3 * small.width
    red = (sheet[..., 0] - sheet[..., 1]) > 100
    rows, columns = red.nonzero()
    assert len(rows)
    assert columns.min() > sheet.shape[1] // 2  # the second of the first row
    assert rows.max() < sheet.shape[0] // 2


def test_sheet_ends_somewhere(tmp_path: Path) -> None:
    saved(tmp_path, MAX_IMAGES, preview(*pictures(8, 8)))
    records = [record_of(number, prompt="Kratzer, 傷") for number in range(MAX_IMAGES + 9)]
    assert contact_sheet(tmp_path, records) == contact_sheet(tmp_path, records[:MAX_IMAGES])
