import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, get_datamodule
from jsonargparse import ArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torchvision.transforms import v2

from anomalib_exdd.data import KSDD2, annotations
from anomalib_exdd.data.ksdd2 import read_official_split
from anomalib_exdd.images.masks import inspect_masks
from made_up_images import invert, save_image, save_mask
from reading_back import kinds_by_name, split_counts

Make = Callable[..., Path]


def ready(root: Path, **arguments: Any) -> KSDD2:
    data = KSDD2(root, num_workers=0, **arguments)
    data.setup()
    return data


def names(dataset: Any, label: int | None = None) -> set[str]:
    samples = dataset.samples
    rows = samples if label is None else samples[samples.label_index == label]
    return {"/".join(Path(path).parts[-2:]) for path in rows.image_path}


def assignment(data: KSDD2) -> list[set[str]]:
    return [names(dataset) for dataset in (data.train_data, data.val_data, data.test_data)]


def test_every_image_is_used_once(make_ksdd2: Make) -> None:
    data = ready(make_ksdd2(train=(40, 20), test=(7, 5)), val_split_ratio=0.2)
    train, val, test = assignment(data)

    assert len(train) + len(val) == 60
    assert not train & val
    assert {name.split("/")[0] for name in train | val} == {"train"}
    assert len(test) == 12
    assert {name.split("/")[0] for name in test} == {"test"}
    assert split_counts(data) == {"train": (32, 16), "val": (8, 4), "test": (7, 5)}


@pytest.mark.filterwarnings("error")
def test_by_default_every_training_image_is_trained_with(make_ksdd2: Make, caplog: pytest.LogCaptureFixture) -> None:
    data = KSDD2(make_ksdd2(train=(40, 20), test=(7, 5)), num_workers=0)
    for stage in (TrainerFn.FITTING, TrainerFn.TESTING):
        data.setup(stage)
    assert split_counts(data) == {"train": (40, 20), "val": (0, 0), "test": (7, 5)}
    assert data.val_split_ratio == 0
    assert data.val_data.task == data.train_data.task
    assert data.val_dataloader() == []
    counts, consequence = [message for message in caplog.messages if message.startswith("KSDD2: ")]
    assert counts == "KSDD2: train 40 normal + 20 defective, test 7 normal + 5 defective."
    assert "other models then have none: for them, give `--data.val_split_ratio 0.2`" in consequence
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_validation_images_are_taken_from_the_training_images_alone(make_ksdd2: Make) -> None:
    root = make_ksdd2(train=(40, 20))
    everything, some = ready(root), ready(root, val_split_ratio=0.2)
    assert names(some.train_data) | names(some.val_data) == names(everything.train_data)
    assert names(some.test_data) == names(everything.test_data)


def test_labels_come_from_the_masks(make_ksdd2: Make) -> None:
    data = ready(make_ksdd2())
    for dataset in (data.train_data, data.val_data, data.test_data):
        for row in dataset.samples.itertuples():
            assert row.label_index == int(np.asarray(Image.open(row.mask_path)).any())
            assert Path(row.mask_path).name == Path(row.image_path).stem + "_GT.png"


def test_one_dark_pixel_makes_an_image_defective(make_ksdd2: Make) -> None:
    root = make_ksdd2(train=(12, 0), test=(3, 1))
    mask = np.zeros((12, 8), dtype=np.uint8)
    mask[11, 7] = 1
    Image.fromarray(mask).save(root / "train" / "10004_GT.png")
    assert names(ready(root).train_data, 1) == {"train/10004.png"}


def write_sources(root: Path, header: str, words: dict[str, str], separator: str = ",") -> None:
    lines = [f"{'train' if name[0] == '1' else 'test'},{name},{word},made up" for name, word in words.items()]
    text = "\n".join([f"split,id,{header},original", *lines, ""])
    (root / "sources.csv").write_text(text.replace(",", separator), encoding="utf-8-sig")


@pytest.mark.parametrize(("header", "separator"), [("class", ","), ("kind", ","), ("Class", ";")])
def test_kinds_come_from_the_table_beside_the_images(make_ksdd2: Make, header: str, separator: str) -> None:
    root = make_ksdd2()
    data = ready(root)
    ids = [sorted(Path(name).stem for name in names(dataset, 1)) for dataset in (data.train_data, data.test_data)]
    words = {ids[0][0]: "dent", ids[0][1]: "scratch", ids[0][2]: "defective", ids[1][0]: "dent"}
    (normal,) = sorted(Path(name).stem for name in names(data.test_data, 0))[:1]
    write_sources(root, header, {**words, "19999": "crack", normal: "Free"}, separator)
    kinds = kinds_by_name(ready(root))
    assert kinds.keys() == kinds_by_name(data).keys()
    del words[ids[0][2]]  # no kind
    assert {name: kind for name, kind in kinds.items() if kind} == words


def test_without_the_table_no_kind_is_known(make_ksdd2: Make) -> None:
    assert set(kinds_by_name(ready(make_ksdd2())).values()) == {""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"sources\.csv` has to name a column `split`, but it is \[\]"),
        ("split,class\ntrain,dent\n", r"has to name a column `id`, but it is \['split', 'class'\]"),
        ("split,id\ntrain,10000\n", r"a column `kind` or `defect_type` or `class`, but it is \['split', 'id'\]"),
        ("split,id,class\ntrain,10000\n", r"Line 2 of `.*sources\.csv` has 2 cells, but the header has 3"),
    ],
)
def test_a_malformed_table_of_kinds_is_an_error(make_ksdd2: Make, text: str, message: str) -> None:
    root = make_ksdd2()
    (root / "sources.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        ready(root)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("magnetic_tile", {"Blowhole": 115, "Break": 85, "Crack": 57, "Fray": 32, "Uneven": 98}),
        ("commutator", {"crack": 25}),
        ("composite", {}),
        (
            "screw",
            {"manipulated_front": 14, "scratch_head": 19, "scratch_neck": 16, "thread_side": 17, "thread_top": 12},
        ),
    ],
)
def test_kinds_of_real_data(shared_dir: Path, name: str, kinds: dict[str, int]) -> None:
    found = kinds_by_name(ready(shared_dir / "data" / name))
    assert Counter(kind for kind in found.values() if kind) == kinds


def test_split_does_not_depend_on_place_or_listing(make_ksdd2: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_ksdd2(train=(40, 20))
    arguments = {"num_defects": 15, "val_split_ratio": 0.2}
    expected = assignment(ready(root, **arguments))
    moved = root.parent / "somewhere" / "else"
    shutil.copytree(root, moved)
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(listing(folder), reverse=True)))

    assert assignment(ready(moved, **arguments)) == expected
    monkeypatch.chdir(moved.parent)
    assert assignment(ready(Path("else"), **arguments)) == expected
    assert assignment(ready(moved, seed=1, **arguments)) != expected


def test_draws_of_defects_are_nested(make_ksdd2: Make) -> None:
    root = make_ksdd2(train=(20, 12))
    drawn = []
    for number in (0, 5, 10, 12):
        data = ready(root, num_defects=number, val_split_ratio=0.2)
        drawn.append(names(data.train_data, 1) | names(data.val_data, 1))
        assert len(names(data.train_data, 0) | names(data.val_data, 0)) == 20

    assert [len(draw) for draw in drawn] == [0, 5, 10, 12]
    assert drawn[0] < drawn[1] < drawn[2] < drawn[3]


def test_too_many_defects_are_asked_for(make_ksdd2: Make) -> None:
    with pytest.raises(ValueError, match=r"`num_defects` is 7, but there are only 6 defective training images"):
        ready(make_ksdd2(), num_defects=7)


def test_few_defects_stay_in_training(make_ksdd2: Make, caplog: pytest.LogCaptureFixture) -> None:
    data = ready(make_ksdd2(train=(20, 12)), val_split_ratio=0.2)
    data.setup("validate")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert len(names(data.train_data, 1)) == 12
    assert names(data.val_data, 1) == set()
    assert len(warnings) == 1
    assert "Validation gets normal images only, and the threshold comes from these alone" in warnings[0]
    assert "0.2 of 12 defective training images is less than 3" in warnings[0]
    assert data.val_data.task == "segmentation"
    assert not data.val_data[0].gt_mask.any()


def test_files_are_read_once_for_all_stages(make_ksdd2: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    monkeypatch.setattr(annotations, "inspect_masks", lambda pairs: scans.append(pairs) or inspect_masks(pairs))
    data = KSDD2(make_ksdd2(), num_workers=0)
    for stage in (TrainerFn.FITTING, TrainerFn.VALIDATING, TrainerFn.TESTING, None):
        data.setup(stage)
    assert len(scans) == 1


def test_model_resize_reaches_image_and_mask(make_ksdd2: Make) -> None:
    root = make_ksdd2(train=(12, 6), test=(3, 1))
    thin = np.zeros((90, 70), dtype=np.uint8)
    thin[40, :] = 255
    Image.fromarray(thin).save(root / "test" / "30000_GT.png")
    save_image(root / "test" / "30000.png", (90, 70))
    data = KSDD2(root, num_workers=0, train_augmentations=v2.RandomHorizontalFlip(p=1))
    transform = v2.Compose([v2.Resize((7, 5)), v2.Normalize([0.5] * 3, [0.5] * 3)])
    data.trainer = SimpleNamespace(model=SimpleNamespace(pre_processor=SimpleNamespace(transform=transform)))
    data.setup(TrainerFn.FITTING)

    train = next(iter(data.train_dataloader()))
    test = next(iter(data.test_dataloader()))

    for batch in (train, test):
        assert batch.image.shape[-2:] == batch.gt_mask.shape[-2:] == (7, 5)
        assert batch.gt_mask.dtype == torch.bool
        assert torch.equal(batch.gt_mask.flatten(1).any(1), batch.gt_label)


@pytest.mark.parametrize("stray", ["10301 (copy).png", "10301_GT (copy).png", "._10000.png", "notes.txt", "123.png"])
def test_stray_files_are_ignored(make_ksdd2: Make, stray: str) -> None:
    root = make_ksdd2()
    (root / "train" / stray).write_bytes(b"stray")
    (root / "README.md").write_text("text")
    assert sum(map(len, assignment(ready(root)))) == 23


def remove_mask(root: Path) -> str:
    (root / "train" / "10003_GT.png").unlink()
    return r"`.*10003\.png` has no mask `10003_GT\.png` \(1 of 18 have none\)"


def remove_image(root: Path) -> str:
    (root / "test" / "20001.png").unlink()
    return r"mask `.*20001_GT\.png` has no image `20001\.png`"


def enlarge_mask(root: Path) -> str:
    save_mask(root / "train" / "10003_GT.png", defect=True, size=(20, 20))
    return r"10003_GT\.png` is 20 x 20 pixels.*10003\.png` is 8 x 12"


def break_image(root: Path) -> str:
    (root / "train" / "10003.png").write_text("broken")
    return r"The image `.*10003\.png` cannot be decoded"


def break_mask(root: Path) -> str:
    (root / "train" / "10003_GT.png").write_text("broken")
    return r"The mask `.*10003_GT\.png` cannot be decoded"


def only_defects(root: Path) -> str:
    for path in (root / "train").glob("*_GT.png"):
        save_mask(path, defect=True)
    return r"0 normal training images, besides .*, but at least 2 are needed to train and to set the threshold with"


def remove_test(root: Path) -> str:
    shutil.rmtree(root / "test")
    return (
        r"`test/NNNNN\.png` .* are expected, but `.*KSDD2` holds `train`\. Other names and layouts are for DefectFolder"
    )


def empty_train(root: Path) -> str:
    for path in (root / "train").iterdir():
        path.unlink()
    return r"`train/NNNNN\.png` .* are expected, but `.*train` is empty"


def other_names(root: Path) -> str:
    for path in (root / "train").iterdir():
        path.rename(path.with_name("x" + path.name))
    return r"train` holds `x10000\.png`, .* and 31 more\. Other names and layouts are for DefectFolder"


def nest(root: Path) -> str:
    (root / "KolektorSDD2").mkdir()
    for split in ("train", "test"):
        (root / split).rename(root / "KolektorSDD2" / split)
    return r"one level deeper: try `root=.*KolektorSDD2`"


def vanish(root: Path) -> str:
    shutil.rmtree(root)
    return r"KSDD2` does not exist.*by hand, download https://go\.vicos\.si/kolektorsdd2"


@pytest.mark.parametrize(
    "damage",
    [
        remove_mask,
        remove_image,
        enlarge_mask,
        break_image,
        break_mask,
        only_defects,
        remove_test,
        empty_train,
        other_names,
        nest,
        vanish,
    ],
)
def test_errors_name_what_is_wrong(make_ksdd2: Make, damage: Callable[[Path], str]) -> None:
    root = make_ksdd2()
    message = damage(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready(root)


def test_official_split_leaves_out_the_other_defects(make_ksdd2: Make, write_split: Make) -> None:
    root = make_ksdd2(train=(20, 30))
    path = write_split(root, 16)
    data = ready(root, official_split=16)
    released = {name for name, is_released in read_official_split(path)["train"].items() if is_released}

    used = names(data.train_data, 1) | names(data.val_data, 1)
    assert len(used) == 16
    assert {Path(name).stem for name in used} <= released
    assert len(names(data.train_data, 0) | names(data.val_data, 0)) == 20
    assert len(data.test_data) == 5


def test_official_split_of_zero_leaves_normal_images(make_ksdd2: Make, write_split: Make) -> None:
    root = make_ksdd2()
    write_split(root, 0)
    data = ready(root, official_split=0)
    assert len(names(data.train_data, 0) | names(data.val_data, 0)) == 12
    assert names(data.train_data, 1) | names(data.val_data, 1) == set()


def test_official_split_with_another_count_is_refused(make_ksdd2: Make, write_split: Make) -> None:
    root = make_ksdd2(train=(20, 30))
    write_split(root, 16, released=15)
    with pytest.raises(ValueError, match=r"releases the masks of 15 of the 30 .* but its name says 16"):
        ready(root, official_split=16)


def test_official_split_without_its_file(make_ksdd2: Make) -> None:
    with pytest.raises(FileNotFoundError, match=r"no `.*split_weakly_53\.pyb`.*use `num_defects` instead"):
        ready(make_ksdd2(), official_split=53)


def test_folder_that_lacks_listed_images_is_incomplete(make_ksdd2: Make, write_split: Make) -> None:
    root = make_ksdd2()
    write_split(root, 0)
    for name in ("10005.png", "10005_GT.png"):
        (root / "train" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete copy.*lists 18 train images, but 1 .*`train/10005\.png`"):
        ready(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"official_split": 17}, r"`official_split` has to be one of \[0, 16, 53, 126, 246\], but got 17"),
        ({"official_split": 16, "num_defects": 5}, r"`official_split` \(16\) or `num_defects` \(5\), not both"),
        ({"num_defects": -1}, r"`num_defects` has to be at least 0, but got -1"),
        ({"val_split_ratio": -0.1}, r"`val_split_ratio` has to be at least 0 \(none\)"),
        ({"val_split_ratio": 1.0}, r"`val_split_ratio` has to be at least 0 .* and less than 1, but got 1\.0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KSDD2(**arguments)


def test_name_and_command_line(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    config = parser.parse_args(
        ["--data", "anomalib_exdd.data.KSDD2", f"--data.root={tmp_path}", "--data.official_split=16"]
    )
    data = parser.instantiate_classes(config).data

    assert isinstance(data, KSDD2)
    assert data.name == "KSDD2"
    assert data.official_split == 16
    assert data.root == tmp_path


def test_from_anomalibs_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib.data.KSDD2", KSDD2, raising=False)
    data = get_datamodule({"data": {"class_path": "KSDD2", "init_args": {"root": str(tmp_path), "num_defects": 3}}})
    assert isinstance(data, KSDD2)
    assert data.num_defects == 3


@pytest.mark.shared
def test_real_images_in_this_layout(shared_dir: Path) -> None:
    data = ready(shared_dir / "data" / "magnetic_tile")
    assert split_counts(data) == {"train": (600, 100), "val": (0, 0), "test": (352, 287)}
    data = ready(shared_dir / "data" / "magnetic_tile", val_split_ratio=0.2)
    assert split_counts(data) == {"train": (480, 80), "val": (120, 20), "test": (352, 287)}
    item = data.test_data[0]
    assert item.image.shape[-2:] == item.gt_mask.shape


def test_inverted_masks_are_named_all_at_once(make_ksdd2: Make, caplog: pytest.LogCaptureFixture) -> None:
    root = make_ksdd2()
    ready(root)
    assert "swapped" not in caplog.text
    inverted = [invert(root / name) for name in ("train/10002_GT.png", "train/10007_GT.png", "test/20001_GT.png")]
    ready(root)
    (warning,) = [record.getMessage() for record in caplog.records if "swapped" in record.getMessage()]
    assert "by these masks (3)" in warning
    assert [name for name in warning.split("`") if "_GT" in name] == [str(path) for path in inverted]
