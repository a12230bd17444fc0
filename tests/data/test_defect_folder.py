import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser
from made_up_images import save_image, save_mask

from anomalib_exdd.data import DefectFolder


def ready(root: Path | None, **arguments: Any) -> DefectFolder:
    data = DefectFolder("parts", root=root, num_workers=0, **arguments)
    data.setup()
    return data


def rows(data: DefectFolder) -> list[tuple[str, str, int, str]]:
    """(image, mask, label, train or test) by file name; validation counts as training."""
    return sorted(
        (Path(row.image_path).name, Path(row.mask_path).name, row.label_index, split)
        for dataset, split in ((data.train_data, "train"), (data.val_data, "train"), (data.test_data, "test"))
        for row in dataset.samples.itertuples()
    )


def counts(data: DefectFolder) -> dict[str, tuple[int, int]]:
    return {
        name: (int((dataset.samples.label_index == 0).sum()), int((dataset.samples.label_index == 1).sum()))
        for name, dataset in (("train", data.train_data), ("val", data.val_data), ("test", data.test_data))
    }


def test_share_is_held_out_for_testing(folders: Path) -> None:
    data = ready(folders, normal="good", defective="bad", masks="masks", test_split_ratio=0.3)

    assert counts(data) == {"train": (6, 4), "val": (1, 0), "test": (3, 2)}
    assert [row[0] for row in rows(data)] == [f"b{n}.jpg" for n in range(6)] + [f"g{n}.png" for n in range(10)]
    assert all(mask == image.replace(".jpg", "_mask.png") for image, mask, label, _ in rows(data) if label)
    assert data.test_data.task == TaskType.SEGMENTATION
    assert data.name == "parts"


def test_held_out_share_depends_on_nothing_but_names_and_seed(folders: Path) -> None:
    arguments = {"normal": "good", "defective": "bad", "masks": "masks"}
    moved = folders.parent / "moved" / "x"
    shutil.copytree(folders, moved)

    assert rows(ready(folders, **arguments)) == rows(ready(moved, **arguments))
    assert any(rows(ready(folders, **arguments)) != rows(ready(folders, seed=seed, **arguments)) for seed in (1, 2))


def test_fewer_defects_leave_the_test_images_alone(folders: Path) -> None:
    arguments = {"normal": "good", "defective": "bad", "masks": "masks"}
    everything, fewer = ready(folders, **arguments), ready(folders, num_defects=2, **arguments)
    assert counts(fewer)["train"][1] == 2
    assert everything.test_data.samples.equals(fewer.test_data.samples)


def test_test_folders_are_used_as_they_are(folders: Path) -> None:
    for number in range(3):
        save_image(folders / "test" / "good" / f"{number}.png")
        save_image(folders / "test" / "bad" / f"{number}.png")
        save_mask(folders / "test" / "masks" / f"{number}.png", defect=True)
    data = ready(
        folders,
        normal="good",
        defective="bad",
        masks="masks",
        normal_test="test/good",
        defective_test="test/bad",
        masks_test="test/masks",
    )
    assert counts(data) == {"train": (8, 6), "val": (2, 0), "test": (3, 3)}
    assert data.test_data.task == TaskType.SEGMENTATION


def test_missing_kind_of_test_images_is_held_out(folders: Path) -> None:
    save_image(folders / "test_bad" / "1.png")
    data = ready(folders, normal="good", defective="bad", masks="masks", defective_test="test_bad")
    assert counts(data) == {"train": (6, 6), "val": (2, 0), "test": (2, 1)}


def test_test_images_without_masks_mean_classification(folders: Path) -> None:
    save_image(folders / "test_bad" / "1.png")
    data = ready(folders, normal="good", defective="bad", masks="masks", defective_test="test_bad")

    assert (data.train_data.task, data.val_data.task) == (TaskType.SEGMENTATION, TaskType.SEGMENTATION)
    assert data.test_data.task == TaskType.CLASSIFICATION
    batch = next(iter(data.test_dataloader()))
    assert batch.gt_mask is None
    assert batch.gt_label.sum() == 1


def test_no_masks_at_all(folders: Path) -> None:
    data = ready(folders, normal="good", defective="bad")
    assert {dataset.task for dataset in (data.train_data, data.val_data)} == {TaskType.CLASSIFICATION}


def test_normal_images_only(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ready(folders, normal="good")
    assert counts(data) == {"train": (6, 0), "val": (2, 0), "test": (2, 0)}
    assert "have no defective images" in caplog.text


def write_pair(root: Path, image: str, mask: str) -> None:
    save_image(root / image)
    save_mask(root / mask, defect=True)


@pytest.mark.parametrize(
    "mask",
    ["a1.png", "a1.bmp", "a1_mask.png", "a1_GT.png", "a1_gt.tif", "a1_label.png", "a1_seg.png", "a1-Mask.png"],
)
def test_usual_names_of_masks(folders: Path, mask: str) -> None:
    write_pair(folders, "one/a1.jpeg", f"one_masks/sub/{mask}")
    data = ready(folders, normal="good", defective="one", masks="one_masks")
    assert ("a1.jpeg", mask, 1, "train") in rows(data)


def test_own_suffix_is_the_only_one(folders: Path) -> None:
    write_pair(folders, "one/a1.png", "one/a1.anno.png")
    write_pair(folders, "one/a1_mask.png", "one/a1_mask.anno.png")
    data = ready(folders, normal="good", defective="one", masks="one", mask_suffix=".anno", defective_test="bad")
    assert {row[:2] for row in rows(data) if row[2] and row[3] == "train"} == {
        ("a1.png", "a1.anno.png"),
        ("a1_mask.png", "a1_mask.anno.png"),
    }


def test_masks_in_the_folder_of_the_images(folders: Path) -> None:
    for number in range(4):
        write_pair(folders, f"mixed/{number}.png", f"mixed/{number}_GT.png")
    for number in range(5):
        save_image(folders / "mixed_good" / f"{number}.png")
        save_mask(folders / "mixed_good" / f"{number}_GT.png", defect=False)
    data = ready(folders, normal="mixed_good", defective="mixed", masks=["mixed", "mixed_good"], defective_test="bad")
    assert {row[:2] for row in rows(data) if row[2] and row[3] == "train"} == {
        (f"{number}.png", f"{number}_GT.png") for number in range(4)
    }
    assert sum(1 for row in rows(data) if not row[2]) == 5


def test_masks_in_a_folder_below_the_images(folders: Path) -> None:
    for number in range(3):
        write_pair(folders, f"deep/{number}.png", f"deep/masks/{number}.png")
    data = ready(
        folders, normal="good", defective="deep", masks="deep/masks", normal_test="bad", defective_test="masks"
    )
    assert {Path(path).parent.name for path in data.train_data.samples.query("label_index == 1").mask_path} == {"masks"}
    assert counts(data)["train"][1] == 3


def test_same_names_in_several_folders_are_told_apart_by_the_folder(folders: Path) -> None:
    for kind in ("scratch", "dent"):
        for number in range(2):
            write_pair(folders, f"defects/{kind}/{number}.png", f"truth/{kind}/{number}_mask.png")
    data = ready(folders, normal="good", defective="defects", masks="truth", defective_test="bad")
    samples = data.train_data.samples.query("label_index == 1")
    assert len(samples) == 4
    assert all(Path(row.image_path).parent.name == Path(row.mask_path).parent.name for row in samples.itertuples())


def test_files_patterns_and_lists(folders: Path) -> None:
    (folders / "good" / "notes.txt").write_text("x")
    save_image(folders / "good" / ".hidden.png")
    save_image(folders / "good" / "G[1].PNG")
    data = ready(
        folders,
        normal=["good/g[0-3].png", Path("good/g7.png"), folders / "good" / "G[1].PNG", "good/g7.png"],
        defective="bad/b?.jpg",
        masks="masks/*",
    )
    normal = {row[0] for row in rows(data) if not row[2]}
    assert normal == {"g0.png", "g1.png", "g2.png", "g3.png", "g7.png", "G[1].PNG"}
    assert sum(row[2] for row in rows(data)) == 6


def missing_mask(root: Path) -> tuple[dict[str, Any], str]:
    (root / "masks" / "b2_mask.png").unlink()
    return {}, r"`.*b2\.jpg` has no mask \(1 of 6 .*`b2\.png`, `b2_mask\.png`.*`masks`, such as `b0_mask\.png`"


def wrong_suffix(_root: Path) -> tuple[dict[str, Any], str]:
    return {"mask_suffix": "_anno"}, r"b0\.jpg` has no mask \(6 of 6 .*`b0_anno\.png`, with any"


def two_masks(root: Path) -> tuple[dict[str, Any], str]:
    save_mask(root / "masks" / "b2.png", defect=True)
    return {}, r"Two masks fit the image `.*b2\.jpg`: `.*b2\.png` and `.*b2_mask\.png`\. Set `mask_suffix`"


def two_images(root: Path) -> tuple[dict[str, Any], str]:
    save_image(root / "bad" / "b2.png")
    return {}, r"mask `.*b2_mask\.png` fits two images: `.*b2\.jpg` and `.*b2\.png`"


def empty_mask(root: Path) -> tuple[dict[str, Any], str]:
    save_mask(root / "masks" / "b2_mask.png", defect=False)
    return {}, r"`.*b2\.jpg` is named as defective .* mask `.*b2_mask\.png` is all black"


def other_size(root: Path) -> tuple[dict[str, Any], str]:
    save_mask(root / "masks" / "b2_mask.png", defect=True, size=(5, 5))
    return {}, r"b2_mask\.png` is 5 x 5 pixels"


def broken_image(root: Path) -> tuple[dict[str, Any], str]:
    (root / "good" / "g3.png").write_text("x")
    return {}, r"image `.*g3\.png` cannot be decoded"


def broken_mask(root: Path) -> tuple[dict[str, Any], str]:
    (root / "masks" / "b2_mask.png").write_text("x")
    return {}, r"mask `.*b2_mask\.png` cannot be decoded"


def listed_twice(_root: Path) -> tuple[dict[str, Any], str]:
    return {"defective_test": "bad"}, r"b0\.jpg` is named by `defective` and by `defective_test`"


def covers_everything(_root: Path) -> tuple[dict[str, Any], str]:
    return {"normal": ["good", "bad"]}, r"b0\.jpg` is named by `normal` and by `defective`"


def forgotten_masks(root: Path) -> tuple[dict[str, Any], str]:
    save_mask(root / "good" / "g1_mask.png", defect=False)
    return {}, r"g1_mask\.png` was found as an image of argument `normal`, but looks like the mask"


def normal_with_defect(root: Path) -> tuple[dict[str, Any], str]:
    save_mask(root / "good" / "g1_mask.png", defect=True)
    return {"masks": ["masks", "good"]}, r"g1\.png` is named as normal .* mask `.*g1_mask\.png` shows a defect"


def masks_are_the_images(_root: Path) -> tuple[dict[str, Any], str]:
    return {"masks": "bad"}, r"All 6 files of argument `defective`.* are named as masks too"


def missing_folder(_root: Path) -> tuple[dict[str, Any], str]:
    return {"defective": "baad"}, r"`defective` names `baad`, but there is no .*`bad`, `good`, `masks`"


def no_image_in_folder(root: Path) -> tuple[dict[str, Any], str]:
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("x")
    return {"normal_test": "texts"}, r"`normal_test` names .* there is no image: 1 files or folders were found.*\.png"


def pattern_without_match(_root: Path) -> tuple[dict[str, Any], str]:
    return {"normal": "good/x*.png"}, r"`normal` names .*x\*\.png`, but there is no image: 0 files"


def no_image_file(root: Path) -> tuple[dict[str, Any], str]:
    (root / "a.txt").write_text("x")
    return {"normal": "a.txt"}, r"`normal` names `.*a\.txt`, which is no image"


def empty_list(_root: Path) -> tuple[dict[str, Any], str]:
    return {"normal": []}, r"`normal` is an empty list"


def few_normal_images(_root: Path) -> tuple[dict[str, Any], str]:
    return {"normal": "good/g[0-2].png"}, r"There are 3 normal images, but at least 4"


def too_many_defects(_root: Path) -> tuple[dict[str, Any], str]:
    return {"num_defects": 6}, r"number of defective training images, 5, but got 6"  # one is held out


@pytest.mark.parametrize(
    "damage",
    [
        missing_mask,
        wrong_suffix,
        two_masks,
        two_images,
        empty_mask,
        other_size,
        broken_image,
        broken_mask,
        listed_twice,
        covers_everything,
        forgotten_masks,
        normal_with_defect,
        masks_are_the_images,
        missing_folder,
        no_image_in_folder,
        pattern_without_match,
        no_image_file,
        empty_list,
        few_normal_images,
        too_many_defects,
    ],
)
def test_errors_name_what_is_wrong(folders: Path, damage: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    arguments, message = damage(folders)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready(folders, **{"normal": "good", "defective": "bad", "masks": "masks", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`normal` is missing"),
        ({"name": "a/b", "normal": "x"}, "`name` has to be usable as the name of a folder, but got `a/b`"),
        ({"name": "", "normal": "x"}, "`name` has to be usable"),
        ({"normal": "x", "csv": "y"}, "`csv` and `normal` exclude each other"),
        ({"mask_suffix": "x", "csv": "y"}, "`csv` and `mask_suffix` exclude each other"),
        ({"normal": "x", "masks": "y"}, "`masks` names masks, but argument `defective` names no images"),
        ({"normal": "x", "masks_test": "y"}, "`masks_test` names masks, but argument `defective_test`"),
        ({"normal": "x", "test_split_ratio": 1.5}, "`test_split_ratio` has to lie between 0 and 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DefectFolder(**{"name": "parts", **arguments})


def write_csv(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def good_and_bad(split: str = "") -> list[str]:
    good = [f"good/g{number}.png,,good{split}" for number in range(10)]
    return good + [f"bad/b{number}.jpg,masks/b{number}_mask.png,bad{split}" for number in range(6)]


def test_csv_without_splits_holds_out_a_share(folders: Path) -> None:
    path = write_csv(folders / "list.csv", "image,mask,label", *good_and_bad())
    from_csv = ready(None, csv=path)
    from_folders = ready(folders, normal="good", defective="bad", masks="masks")
    assert rows(from_csv) == rows(from_folders)


def test_csv_of_another_folder_separator_and_encoding(folders: Path) -> None:
    lines = [line.replace(",", ";").replace("/", "\\") for line in ["Image_Path, mask ,Label", *good_and_bad()]]
    (folders.parent / "lists").mkdir()
    path = write_csv(folders.parent / "lists" / "list.csv", *lines, "", encoding="utf-8-sig")
    assert len(rows(ready(folders, csv=path))) == 16


def test_csv_with_splits(folders: Path) -> None:
    lines = [line + (",test" if "g1" in line or "b1" in line else ",train") for line in good_and_bad()]
    data = ready(None, csv=write_csv(folders / "list.csv", "image,mask,label,split", *lines))
    assert [row[0] for row in rows(data) if row[3] == "test"] == ["b1.jpg", "g1.png"]


@pytest.mark.parametrize(("good", "bad"), [("good", "bad"), ("normal", "defective"), ("0", "1"), ("OK", "NOK")])
def test_csv_labels(folders: Path, good: str, bad: str) -> None:
    lines = [line.replace(",good", f",{good}").replace(",bad", f",{bad}") for line in good_and_bad()]
    data = ready(None, csv=write_csv(folders / "list.csv", "image,mask,label", *lines))
    assert [row[2] for row in rows(data)] == [1] * 6 + [0] * 10


def test_csv_without_labels_takes_them_from_the_masks(folders: Path) -> None:
    save_mask(folders / "masks" / "g1.png", defect=False)
    lines = [line.rsplit(",", 1)[0] for line in good_and_bad()]
    lines[1] = "good/g1.png,masks/g1.png"
    data = ready(None, csv=write_csv(folders / "list.csv", "image,mask", *lines))
    assert [row[2] for row in rows(data)] == [1] * 6 + [0] * 10


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("image,mask,label", "bad/b0.jpg,,maybe", r"Line 18 of .*label `maybe`, but it has to be `normal`"),
        ("image,mask,label", "good/none.png,,good", r"Line 18 .*image `good/none\.png`, but there is no such file"),
        ("image,mask,label", "bad/b0.jpg,masks/none.png,bad", r"Line 18 .*mask `masks/none\.png`, but there is no"),
        ("image,mask,label", ",,good", "Line 18 .*names no image"),
        ("image,mask,label", "good/g1.png,,good", r"Lines 3 and 18 .*both list the image `.*g1\.png`"),
        ("image,mask,label", "good/g1.png,good", "Line 18 .*has 2 cells, but the header has 3"),
        ("image,mask,label", "extra.jpg,,bad", r"extra\.jpg` \(line 18 of .*has no mask, while others have one"),
        ("path,mask,label", "x,,good", r"has to name the column `image`.*\['path', 'mask', 'label'\]"),
        ("image,a,b", "x,,good", "has to name a column `label` or `mask`"),
        ("image,mask,mask_path", "x,,good", "names the column `mask` twice"),
    ],
)
def test_csv_errors_name_the_line(folders: Path, header: str, line: str, message: str) -> None:
    save_image(folders / "extra.jpg")
    path = write_csv(folders / "list.csv", header, *good_and_bad(), line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready(None, csv=path)


def test_csv_with_some_splits_or_other_splits(folders: Path) -> None:
    header = "image,mask,label,split"
    some = write_csv(folders / "some.csv", header, *good_and_bad(",train")[:-1], "bad/b5.jpg,masks/b5_mask.png,bad,")
    with pytest.raises(ValueError, match=r"Line 17 .*has no split \(1 of 16 lines\)"):
        ready(None, csv=some)
    other = write_csv(folders / "other.csv", header, *good_and_bad(",val"))
    with pytest.raises(ValueError, match=r"Line 2 .*split `val`, but it has to be `train` or `test`.*val_split_ratio"):
        ready(None, csv=other)


def test_csv_that_is_missing_empty_or_not_utf_8(folders: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`csv` names `.*none\.csv`"):
        ready(None, csv=folders / "none.csv")
    with pytest.raises(ValueError, match="lists no image"):
        ready(None, csv=write_csv(folders / "empty.csv", "image,label"))
    with pytest.raises(ValueError, match="has to name the column `image`"):
        ready(None, csv=write_csv(folders / "nothing.csv"))
    with pytest.raises(ValueError, match="not in UTF-8"):
        ready(None, csv=write_csv(folders / "latin.csv", "image,label", "größe.png,good", encoding="latin-1"))


def test_command_line_takes_names_and_lists(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    config = parser.parse_args(
        [
            "--data=anomalib_exdd.data.DefectFolder",
            "--data.name=bolts",
            f"--data.root={tmp_path}",
            "--data.normal=good",
            '--data.defective=["bad/a", "bad/b"]',
            "--data.masks+=masks/a",
            "--data.masks+=masks/b",
        ]
    )
    data = parser.instantiate_classes(config).data

    assert isinstance(data, DefectFolder)
    assert data.name == "bolts"
    assert data.sources["normal"] == "good"
    assert data.sources["defective"] == ["bad/a", "bad/b"]
    assert data.sources["masks"] == ["masks/a", "masks/b"]


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help=anomalib_exdd.data.DefectFolder"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Masks of the defective training images, given like ``normal``: one for each of them" in text
    assert "CSV file instead of the seven arguments above" in text


@pytest.mark.shared
def test_real_images_listed_in_a_csv(shared_dir: Path, tmp_path: Path) -> None:
    root = shared_dir / "data" / "magnetic_tile"
    lines = ["image,mask,split"]
    for split in ("train", "test"):
        images = sorted((root / split).glob("?????.png"))
        lines += [f"{split}/{image.name},{split}/{image.stem}_GT.png,{split}" for image in images]
    data = ready(root, csv=write_csv(tmp_path / "tiles.csv", *lines))
    assert counts(data) == {"train": (480, 80), "val": (120, 20), "test": (352, 287)}
