"""Data listed in a CSV file, read through the data module that takes it, and kinds of defects by words and folders."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from anomalib_exdd.data.annotations import kinds_of, words_of_folders
from made_up_images import save_image, save_mask
from reading_back import kinds_by_name, ready_folder, sample_rows, split_counts


def write_csv(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def good_and_bad(split: str = "") -> list[str]:
    good = [f"good/g{number}.png,,good{split}" for number in range(10)]
    return good + [f"bad/b{number}.jpg,masks/b{number}_mask.png,bad{split}" for number in range(6)]


def test_csv_without_splits_holds_out_a_share(folders: Path) -> None:
    path = write_csv(folders / "list.csv", "image,mask,label", *good_and_bad())
    from_csv = ready_folder(None, csv=path)
    from_folders = ready_folder(folders, normal="good", defective="bad", masks="masks")
    assert sample_rows(from_csv) == sample_rows(from_folders)


def test_csv_of_another_folder_separator_and_encoding(folders: Path) -> None:
    lines = [line.replace(",", ";").replace("/", "\\") for line in ["Image_Path, mask ,Label", *good_and_bad()]]
    (folders.parent / "lists").mkdir()
    path = write_csv(folders.parent / "lists" / "list.csv", *lines, "", encoding="utf-8-sig")
    assert len(sample_rows(ready_folder(folders, csv=path))) == 16


def test_csv_with_splits(folders: Path) -> None:
    lines = [line + (",test" if "g1" in line or "b1" in line else ",train") for line in good_and_bad()]
    data = ready_folder(None, csv=write_csv(folders / "list.csv", "image,mask,label,split", *lines))
    assert [row[0] for row in sample_rows(data) if row[3] == "test"] == ["b1.jpg", "g1.png"]


@pytest.mark.parametrize(("good", "bad"), [("good", "bad"), ("normal", "defective"), ("0", "1"), ("OK", "NOK")])
def test_csv_labels(folders: Path, good: str, bad: str) -> None:
    lines = [line.replace(",good", f",{good}").replace(",bad", f",{bad}") for line in good_and_bad()]
    data = ready_folder(None, csv=write_csv(folders / "list.csv", "image,mask,label", *lines))
    assert [row[2] for row in sample_rows(data)] == [1] * 6 + [0] * 10


def test_csv_without_labels_takes_them_from_the_masks(folders: Path) -> None:
    save_mask(folders / "masks" / "g1.png", defect=False)
    lines = [line.rsplit(",", 1)[0] for line in good_and_bad()]
    lines[1] = "good/g1.png,masks/g1.png"
    data = ready_folder(None, csv=write_csv(folders / "list.csv", "image,mask", *lines))
    assert [row[2] for row in sample_rows(data)] == [1] * 6 + [0] * 10


@pytest.mark.parametrize("column", ["kind", "class", "defect_type", "Class"])
def test_csv_names_the_kinds_of_defects(folders: Path, column: str) -> None:
    words = {
        "b0": "scratch",
        "b1": "dent",
        "b2": "bad",
        "b3": "",
        "b4": "1",
        "b5": " dent ",
        "g1": "good",
        "g2": "dent",
    }
    lines = [f"{line},{words.get(Path(line.split(',')[0]).stem, '')}" for line in good_and_bad()]
    data = ready_folder(None, csv=write_csv(folders / "list.csv", f"image,mask,label,{column}", *lines))
    expected = {"b0": "scratch", "b1": "dent", "b4": "1", "b5": "dent"}
    assert {name: kind for name, kind in kinds_by_name(data).items() if kind} == expected


def test_csv_kind_goes_before_class(folders: Path) -> None:
    lines = [f"{line},bolt,{'dent' if ',bad' in line else ''}" for line in good_and_bad()]
    data = ready_folder(None, csv=write_csv(folders / "list.csv", "image,mask,label,class,kind", *lines))
    assert set(kinds_by_name(data).values()) == {"", "dent"}


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("image,mask,label", "bad/b0.jpg,,maybe", r"Line 18 of .*label `maybe`, but it has to be `normal`"),
        ("image,mask,label", "good/none.png,,good", r"Line 18 .*image `good/none\.png`, but there is no such file"),
        ("image,mask,label", "bad/b0.jpg,masks/none.png,bad", r"Line 18 .*mask `masks/none\.png`, but there is no"),
        ("image,mask,label", ",,good", "Line 18 .*names the image ``, but there is no such file"),
        ("image,mask,label", "good/g1.png,,good", r"g1\.png` is named by Line 3 of .* and by Line 18 of `.*list\.csv`"),
        ("image,mask,label", "good/g1.png,good", "Line 18 .*has 2 cells, but the header has 3"),
        ("image,mask,label", "extra.jpg,,bad", r"extra\.jpg` \(Line 18 of .*has no mask \(1 of 7 have none\)"),
        ("path,mask,label", "x,,good", r"has to name a column `image`, .*\['path', 'mask', 'label'\]"),
        ("image,a,b", "x,,good", "has to name a column `label` or `mask`"),
    ],
)
def test_csv_errors_name_the_line(folders: Path, header: str, line: str, message: str) -> None:
    save_image(folders / "extra.jpg")
    path = write_csv(folders / "list.csv", header, *good_and_bad(), line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready_folder(None, csv=path)


def test_csv_with_some_splits_or_other_splits(folders: Path) -> None:
    header = "image,mask,label,split"
    some = write_csv(folders / "some.csv", header, *good_and_bad(",train")[:-1], good_and_bad(",")[-1])
    with pytest.raises(ValueError, match=r"Line 17 .*has no split, as 1 of 16"):
        ready_folder(None, csv=some)
    other = write_csv(folders / "other.csv", header, *good_and_bad(",val"))
    with pytest.raises(ValueError, match=r"Line 2 .*split `val`, but it has to be `train` or `test`.*val_split_ratio"):
        ready_folder(None, csv=other)


def test_csv_that_is_missing_empty_or_not_utf_8(folders: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        ready_folder(None, csv=folders / "none.csv")
    with pytest.raises(ValueError, match="There are 0 normal training images"):
        ready_folder(None, csv=write_csv(folders / "empty.csv", "image,label"))
    with pytest.raises(ValueError, match="has to name a column `image`"):
        ready_folder(None, csv=write_csv(folders / "nothing.csv"))
    with pytest.raises(ValueError, match="not in UTF-8"):
        ready_folder(None, csv=write_csv(folders / "latin.csv", "image,label", "größe.png,good", encoding="latin-1"))


@pytest.mark.shared
def test_real_images_listed_in_a_csv(shared_dir: Path, tmp_path: Path) -> None:
    root = shared_dir / "data" / "magnetic_tile"
    lines = ["image,mask,split"]
    for split in ("train", "test"):
        images = sorted((root / split).glob("?????.png"))
        lines += [f"{split}/{image.name},{split}/{image.stem}_GT.png,{split}" for image in images]
    data = ready_folder(root, csv=write_csv(tmp_path / "tiles.csv", *lines))
    assert split_counts(data) == {"train": (600, 100), "val": (0, 0), "test": (352, 287)}


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


def words(root: Path, entries: Sequence[str | Path], images: Sequence[str]) -> list[str]:
    return words_of_folders([save_image(root / image) for image in images], entries, root)


def test_folders_below_a_single_one_are_kinds(tmp_path: Path) -> None:
    images = ["bad/scratch/1.png", "bad/dent/monday/1.png", "bad/images/stain/1.png", "bad/1.png", "bad/images/2.png"]
    expected = ["scratch", "dent", "stain", "", ""]
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
    assert words(tmp_path, [], []) == []
