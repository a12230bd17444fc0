import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser

from anomalib_exdd.data import DefectFolder
from made_up_images import invert, save_image, save_mask
from reading_back import kinds_by_name, ready_folder, sample_rows, split_counts


def test_share_is_held_out_for_testing(folders: Path) -> None:
    data = ready_folder(folders, normal="good", defective="bad", masks="masks", test_split_ratio=0.3)

    assert split_counts(data) == {"train": (7, 4), "val": (0, 0), "test": (3, 2)}
    assert [row[0] for row in sample_rows(data)] == [f"b{n}.jpg" for n in range(6)] + [f"g{n}.png" for n in range(10)]
    assert all(mask == image.replace(".jpg", "_mask.png") for image, mask, label, _ in sample_rows(data) if label)
    assert data.test_data.task == TaskType.SEGMENTATION
    assert data.name == "parts"


def test_held_out_share_depends_on_nothing_but_names_and_seed(folders: Path) -> None:
    arguments = {"normal": "good", "defective": "bad", "masks": "masks"}
    moved = folders.parent / "moved" / "x"
    shutil.copytree(folders, moved)

    assert sample_rows(ready_folder(folders, **arguments)) == sample_rows(ready_folder(moved, **arguments))
    assert any(
        sample_rows(ready_folder(folders, **arguments)) != sample_rows(ready_folder(folders, seed=seed, **arguments))
        for seed in (1, 2)
    )


def test_fewer_defects_leave_the_test_images_alone(folders: Path) -> None:
    arguments = {"normal": "good", "defective": "bad", "masks": "masks"}
    everything, fewer = ready_folder(folders, **arguments), ready_folder(folders, num_defects=2, **arguments)
    assert split_counts(fewer)["train"][1] == 2
    assert everything.test_data.samples.equals(fewer.test_data.samples)


def test_test_folders_are_used_as_they_are(folders: Path) -> None:
    for number in range(3):
        save_image(folders / "test" / "good" / f"{number}.png")
        save_image(folders / "test" / "bad" / f"{number}.png")
        save_mask(folders / "test" / "masks" / f"{number}.png", defect=True)
    data = ready_folder(
        folders,
        normal="good",
        defective="bad",
        masks="masks",
        normal_test="test/good",
        defective_test="test/bad",
        masks_test="test/masks",
    )
    assert split_counts(data) == {"train": (10, 6), "val": (0, 0), "test": (3, 3)}
    assert data.test_data.task == TaskType.SEGMENTATION


def test_missing_kind_of_test_images_is_held_out(folders: Path) -> None:
    save_image(folders / "test_bad" / "1.png")
    arguments = {"normal": "good", "defective": "bad", "masks": "masks", "defective_test": "test_bad"}
    assert split_counts(ready_folder(folders, **arguments)) == {"train": (8, 6), "val": (0, 0), "test": (2, 1)}
    data = ready_folder(folders, val_split_ratio=0.2, **arguments)
    assert split_counts(data) == {"train": (6, 6), "val": (2, 0), "test": (2, 1)}


def test_test_images_without_masks_mean_classification(folders: Path) -> None:
    save_image(folders / "test_bad" / "1.png")
    data = ready_folder(folders, normal="good", defective="bad", masks="masks", defective_test="test_bad")

    assert (data.train_data.task, data.val_data.task) == (TaskType.SEGMENTATION, TaskType.SEGMENTATION)
    assert data.test_data.task == TaskType.CLASSIFICATION
    batch = next(iter(data.test_dataloader()))
    assert batch.gt_mask is None
    assert batch.gt_label.sum() == 1


def test_no_masks_at_all(folders: Path) -> None:
    data = ready_folder(folders, normal="good", defective="bad")
    assert {dataset.task for dataset in (data.train_data, data.val_data)} == {TaskType.CLASSIFICATION}


def test_normal_images_only(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ready_folder(folders, normal="good")
    assert split_counts(data) == {"train": (8, 0), "val": (0, 0), "test": (2, 0)}
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
    data = ready_folder(folders, normal="good", defective="one", masks="one_masks")
    assert ("a1.jpeg", mask, 1, "train") in sample_rows(data)


def test_own_suffix_is_the_only_one(folders: Path) -> None:
    write_pair(folders, "one/a1.png", "one/a1.anno.png")
    write_pair(folders, "one/a1_mask.png", "one/a1_mask.anno.png")
    data = ready_folder(folders, normal="good", defective="one", masks="one", mask_suffix=".anno", defective_test="bad")
    assert {row[:2] for row in sample_rows(data) if row[2] and row[3] == "train"} == {
        ("a1.png", "a1.anno.png"),
        ("a1_mask.png", "a1_mask.anno.png"),
    }


def test_masks_in_the_folder_of_the_images(folders: Path) -> None:
    for number in range(4):
        write_pair(folders, f"mixed/{number}.png", f"mixed/{number}_GT.png")
    for number in range(5):
        save_image(folders / "mixed_good" / f"{number}.png")
        save_mask(folders / "mixed_good" / f"{number}_GT.png", defect=False)
    data = ready_folder(
        folders, normal="mixed_good", defective="mixed", masks=["mixed", "mixed_good"], defective_test="bad"
    )
    assert {row[:2] for row in sample_rows(data) if row[2] and row[3] == "train"} == {
        (f"{number}.png", f"{number}_GT.png") for number in range(4)
    }
    assert sum(1 for row in sample_rows(data) if not row[2]) == 5


def test_masks_in_a_folder_below_the_images(folders: Path) -> None:
    for number in range(3):
        write_pair(folders, f"deep/{number}.png", f"deep/masks/{number}.png")
    data = ready_folder(
        folders, normal="good", defective="deep", masks="deep/masks", normal_test="bad", defective_test="masks"
    )
    assert {Path(path).parent.name for path in data.train_data.samples.query("label_index == 1").mask_path} == {"masks"}
    assert split_counts(data)["train"][1] == 3


def test_same_names_in_several_folders_are_told_apart_by_the_folder(folders: Path) -> None:
    for kind in ("scratch", "dent"):
        for number in range(2):
            write_pair(folders, f"defects/{kind}/{number}.png", f"truth/{kind}/{number}_mask.png")
    data = ready_folder(folders, normal="good", defective="defects", masks="truth", defective_test="bad")
    samples = data.train_data.samples.query("label_index == 1")
    assert len(samples) == 4
    assert all(Path(row.image_path).parent.name == Path(row.mask_path).parent.name for row in samples.itertuples())


def kinds_folder(folders: Path) -> dict[str, str]:
    """Write defects of two kinds and of none to folders below `defects`, and return the kinds by name."""
    kinds = {"s0": "scratch", "s1": "scratch", "d0": "dent", "u0": ""}
    for name, kind in kinds.items():
        write_pair(folders, f"defects/{kind}/{name}.png", f"truth/{kind}/{name}_mask.png")
    return kinds | {f"g{number}": "" for number in range(10)}


def test_kinds_are_the_folders_below_the_one_that_is_named(folders: Path) -> None:
    kinds = kinds_folder(folders)
    data = ready_folder(folders, normal="good", defective="defects", masks="truth", test_split_ratio=0.5)
    assert kinds_by_name(data) == kinds
    assert {"scratch", "dent", ""} == set(kinds_by_name(data).values())
    without_masks = ready_folder(folders, normal="good", defective="defects")
    assert kinds_by_name(without_masks) == kinds


def test_kinds_are_the_folders_that_are_named(folders: Path) -> None:
    kinds = kinds_folder(folders)
    for number in range(2):
        write_pair(folders, f"test/dent/t{number}.png", f"test_masks/t{number}.png")
    data = ready_folder(
        folders,
        normal="good",
        defective=["defects/scratch", "defects/dent"],
        masks="truth",
        defective_test="test",
        masks_test="test_masks",
    )
    del kinds["u0"]
    assert kinds_by_name(data) == {**kinds, "t0": "dent", "t1": "dent"}


def test_a_single_folder_of_defects_tells_no_kind(folders: Path) -> None:
    data = ready_folder(folders, normal="good", defective="bad", masks="masks")
    assert set(kinds_by_name(data).values()) == {""}
    listed = ready_folder(folders, normal=["good/g[0-7].png"], defective=["bad"], normal_test="good/g[89].png")
    assert set(kinds_by_name(listed).values()) == {""}


def test_counts_name_the_commonest_kinds_first(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    for count, kind in enumerate("fedcba", start=1):
        for number in range(count):
            save_image(folders / "defects" / kind / f"{kind}{number}.png")
    ready_folder(folders, normal="good", defective="defects", defective_test="bad", val_split_ratio=0.01)
    (line,) = [message for message in caplog.messages if message.startswith("parts: train")]
    assert line.startswith("parts: train 7 normal + 21 defective (6 a, 5 b, 4 c, 3 d, 2 e, 1 f), val ")
    assert line.endswith("test 2 normal + 6 defective.")


def test_files_patterns_and_lists(folders: Path) -> None:
    (folders / "good" / "notes.txt").write_text("x")
    save_image(folders / "good" / ".hidden.png")
    save_image(folders / "good" / "G[1].PNG")
    data = ready_folder(
        folders,
        normal=["good/g[0-3].png", Path("good/g7.png"), folders / "good" / "G[1].PNG", "good/g7.png"],
        defective="bad/b?.jpg",
        masks="masks/*",
    )
    normal = {row[0] for row in sample_rows(data) if not row[2]}
    assert normal == {"g0.png", "g1.png", "g2.png", "g3.png", "g7.png", "G[1].PNG"}
    assert sum(row[2] for row in sample_rows(data)) == 6


def missing_mask(root: Path) -> tuple[dict[str, Any], str]:
    (root / "masks" / "b2_mask.png").unlink()
    return {}, r"`.*b2\.jpg` \(`defective`\) has no mask \(1 of 6 .* `masks` .*`b2\.png`, `b2_mask\.png`"


def wrong_suffix(_root: Path) -> tuple[dict[str, Any], str]:
    return {"mask_suffix": "_anno"}, r"b0\.jpg` \(`defective`\) has no mask \(6 of 6 .*`b0_anno\.png`"


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
    return {"defective": "baad"}, r"`defective` names `baad`, but there is no image .*`bad`, `good`, `masks`"


def no_image_in_folder(root: Path) -> tuple[dict[str, Any], str]:
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("x")
    return {"normal_test": "texts"}, r"`normal_test` names .* there is no image among the 1 files found.*\.png"


def pattern_without_match(_root: Path) -> tuple[dict[str, Any], str]:
    return {"normal": "good/x*.png"}, r"`normal` names .*x\*\.png`, but there is no image among the 0 files"


def no_image_file(root: Path) -> tuple[dict[str, Any], str]:
    (root / "a.txt").write_text("x")
    return {"normal": "a.txt"}, r"`normal` names `.*a\.txt`, but there is no image among the 1 files"


def few_normal_images(_root: Path) -> tuple[dict[str, Any], str]:
    arguments = {"normal": "good/g[0-1].png"}
    return arguments, r"There are 1 normal training images, besides .*, but at least 2 .* to train and to set the"


def few_normal_images_to_validate(_root: Path) -> tuple[dict[str, Any], str]:
    arguments = {"normal": "good/g[0-2].png", "val_split_ratio": 0.2}
    return arguments, r"There are 2 normal training images, besides .*, but at least 3 .* to train and validate"


def too_many_defects(_root: Path) -> tuple[dict[str, Any], str]:
    return {"num_defects": 6}, r"`num_defects` is 6, but there are only 5 defective training images"  # one is held out


def no_normal_images(_root: Path) -> tuple[dict[str, Any], str]:
    return {"normal": None}, "`normal` is missing"


def masks_of_no_images(_root: Path) -> tuple[dict[str, Any], str]:
    return {"defective": None}, "`masks` names masks, but `defective` names no images"


def masks_of_no_test_images(_root: Path) -> tuple[dict[str, Any], str]:
    return {"masks_test": "masks"}, "`masks_test` names masks, but `defective_test` names no images"


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
        few_normal_images,
        few_normal_images_to_validate,
        too_many_defects,
        no_normal_images,
        masks_of_no_images,
        masks_of_no_test_images,
    ],
)
def test_errors_name_what_is_wrong(folders: Path, damage: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    arguments, message = damage(folders)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready_folder(folders, **{"normal": "good", "defective": "bad", "masks": "masks", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a/b", "normal": "x"}, "`name` has to be usable as the name of a folder, but got `a/b`"),
        ({"name": "", "normal": "x"}, "`name` has to be usable"),
        ({"normal": "x", "csv": "y"}, "`csv` and `normal` exclude each other"),
        ({"mask_suffix": "x", "csv": "y"}, "`csv` and `mask_suffix` exclude each other"),
        ({"normal": "x", "test_split_ratio": 1.5}, "`test_split_ratio` has to lie between 0 and 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DefectFolder(**{"name": "parts", **arguments})


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
    assert data.paths["normal"] == ["good"]
    assert data.paths["defective"] == ["bad/a", "bad/b"]
    assert data.paths["masks"] == ["masks/a", "masks/b"]


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help=anomalib_exdd.data.DefectFolder"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Masks of the defective training images, given like ``normal``: one for each of them" in text
    assert "CSV file instead of the seven arguments above" in text


def test_what_is_left_out_is_told(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("good/x.jfif", "good/y.JFIF", "good/notes", "bad/z.gif", "good/.hidden.gif"):
        (folders / name).write_text("whatever")
    ready_folder(folders, normal="good", defective="bad/*", masks="masks")
    left_out = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Left out")]
    assert left_out == [
        "Left out of argument `normal`: 2 .jfif (such as x.jfif), 1 without ending (notes).",
        "Left out of argument `defective`: 1 .gif (z.gif).",
    ]


def test_inverted_masks_are_named_all_at_once(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    inverted = [invert(folders / "masks" / f"b{number}_mask.png") for number in (1, 4)]
    ready_folder(folders, normal="good", defective="bad", masks="masks")
    (warning,) = [record.getMessage() for record in caplog.records if "swapped" in record.getMessage()]
    assert [name for name in warning.split("`") if "_mask" in name] == [str(path) for path in inverted]

    caplog.clear()
    mask = save_mask(folders / "good" / "g3_mask.png", defect=False)
    invert(mask)
    with pytest.raises(ValueError, match="is named as normal"):
        ready_folder(folders, normal="good", defective="bad", masks=["masks", "good"])
    assert f"`{mask}`" in caplog.text, "the reason why it shows a defect"
