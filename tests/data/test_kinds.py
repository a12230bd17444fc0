"""What words and folders say about the kinds of defects."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from anomalib_exdd.data.annotations import kinds_of, words_of_folders
from made_up_images import save_image


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["scratch", " Thread Top ", ""], ["scratch", "Thread Top", ""]),
        (
            ["Good", "NORMAL", "ok", "bad", "Defect", "defects", "defective", "NOK", "anomaly", "dent"],
            [""] * 9 + ["dent"],
        ),
        (["1", "1", ""], ["", "", ""]),  # a label, not a class
        (["True", "1.0"], ["", ""]),
        (["1", "3", "2", "bad"], ["1", "3", "2", ""]),  # classes
        (["0", "dent"], ["0", "dent"]),
    ],
)
def test_words_that_say_no_more_than_defective_are_no_kinds(words: list[str], expected: list[str]) -> None:
    assert kinds_of(words) == expected


def words(root: Path, source: str | list[str | Path] | None, images: Sequence[str]) -> list[str]:
    return words_of_folders([save_image(root / image) for image in images], source, root)


def test_folders_below_a_single_one_are_kinds(tmp_path: Path) -> None:
    images = ["bad/scratch/1.png", "bad/dent/monday/1.png", "bad/images/stain/1.png", "bad/1.png", "bad/images/2.png"]
    expected = ["scratch", "dent", "stain", "", ""]
    assert words(tmp_path, "bad", images) == expected
    assert words(tmp_path, ["bad"], images) == expected
    assert words(tmp_path, [tmp_path / "bad"], images) == expected


def test_several_folders_are_kinds_by_their_own_names(tmp_path: Path) -> None:
    images = ["scratch/1.png", "dent/monday/1.png", "defects/stain/1.png", "defects/2.png"]
    assert words(tmp_path, ["scratch", "dent", "defects"], images) == ["scratch", "dent", "stain", ""]
    assert words(tmp_path, ["dent", "./dent"], images[1:2]) == ["monday"]  # one folder, named twice


def test_the_innermost_of_nested_folders_counts(tmp_path: Path) -> None:
    images = ["bad/1.png", "bad/dent/1.png", "bad/dent/deep/1.png"]
    assert words(tmp_path, ["bad", "bad/dent"], images) == ["", "dent", "dent"]


def test_files_and_patterns_tell_no_kind(tmp_path: Path) -> None:
    images = ["scratch/1.png", "dent/1.png"]
    assert words(tmp_path, ["scratch/*.png", "dent/1.png"], images) == ["", ""]
    assert words(tmp_path, ["scratch", "dent/*.png"], images) == ["", ""]
    assert words(tmp_path, None, []) == []
