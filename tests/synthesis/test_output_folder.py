import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_exdd.synthesis.manifest import (
    DECISIONS,
    FORMAT,
    Record,
    read_review,
    read_synthetic,
    to_json,
    write_manifest,
)

START = {"count": 3, "settings": {"seed": 0}, "versions": {"numpy": "2"}, "command": "anomalib synthesize --seed 0"}
GOOD = Record(
    index=0,
    image="train/00000.png",
    mask="train/00000_GT.png",
    source="parts/a.png",
    defect=None,
    placement="drawn scratch",
    prompt="deep scratch",
    seed=7,
    attempts=1,
    synthesizer="DiagSynthesizer",
    model="some/model",
    revision="abc",
    details={"steps": 30},
    change={"visible": 21.5, "background_psnr": None},
    accepted=True,
    reason="",
)
WEAK = replace(
    GOOD, index=1, image="rejected/00001.png", mask="rejected/00001_GT.png", accepted=False, reason="No visible change"
)
OTHER = replace(GOOD, index=2, image="train/00002.png", mask="train/00002_GT.png", defect="parts/bad.png")
RECORDS = [GOOD, WEAK, OTHER]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished folder; whether the files are images is not its readers' business."""
    for record in RECORDS:
        touch(tmp_path / record.image)
        touch(tmp_path / record.mask)
    (tmp_path / "synthesis.json").write_text(to_json({"format": FORMAT, **START}))
    write_manifest(tmp_path, START, RECORDS)
    return tmp_path


Decide = Callable[..., None]


@pytest.fixture
def decide(folder: Path) -> Decide:
    def write(*rows: str, header: str = "image,decision,comment", encoding: str = "utf-8") -> None:
        (folder / "review.csv").write_text("\n".join([header, *rows]) + "\n", encoding=encoding)

    return write


def names(root: Path, **options: bool) -> list[str]:
    return [image.image_path.name for image in read_synthetic(root, **options)]


def test_manifest_holds_everything_and_is_read_back(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    assert content["format"] == FORMAT
    assert content["settings"] == START["settings"]
    assert content["versions"] == START["versions"]
    assert content["counts"] == {"images": 3, "accepted": 2, "rejected": 1}
    assert {"source", "placement", "prompt", "seed", "synthesizer", "model", "revision", "change", "accepted"} <= set(
        content["images"][0]
    )
    assert [image.record for image in read_synthetic(folder, with_rejected=True)] == RECORDS


def test_table_has_a_column_for_every_entry_and_measurement(tmp_path: Path) -> None:
    write_manifest(tmp_path, START, [replace(GOOD, prompt='a "bent", edge\nof it'), WEAK])
    with (tmp_path / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["prompt"] == 'a "bent", edge\nof it'
    assert float(rows[0]["visible"]) == 21.5
    assert rows[0]["background_psnr"] == ""
    assert json.loads(rows[0]["details"]) == {"steps": 30}
    assert rows[1]["accepted"] == "False"
    assert rows[1]["reason"] == "No visible change"


def test_training_gets_what_the_measurement_accepts(folder: Path) -> None:
    images = read_synthetic(folder)
    assert [image.record for image in images] == [GOOD, OTHER]
    assert images[1].image_path == folder / "train" / "00002.png"
    assert images[1].mask_path == folder / "train" / "00002_GT.png"
    assert names(folder, with_rejected=True) == ["00000.png", "00001.png", "00002.png"]


def test_review_goes_before_the_measurement(folder: Path, decide: Decide) -> None:
    decide("train/00000.png,reject,blurred", "rejected/00001.png,Accept ,faint but real")
    assert names(folder) == ["00001.png", "00002.png"]
    by_name = {image.image_path.name: image for image in read_synthetic(folder, with_rejected=True)}
    assert (by_name["00000.png"].decision, by_name["00000.png"].comment) == ("reject", "blurred")
    assert not by_name["00000.png"].accepted
    assert by_name["00001.png"].accepted


@pytest.mark.parametrize(
    ("rows", "header", "encoding"),
    [
        (["train/00000.png;reject;zu dunkel, fleckig"], "image;decision;comment", "utf-8-sig"),
        (["schief über Kante\treject\ttrain\\00000.png"], "Comment\tDecision\tImage", "cp1252"),
        (["00000.png,REJECT"], "image,decision", "utf-8"),
        (["00000.png,reject,", ",,", ""], "image,decision,comment", "utf-8"),
    ],
    ids=["semicolons", "tabs, other order, old encoding", "no comments, no folder", "empty lines"],
)
def test_review_survives_spreadsheets(
    folder: Path, decide: Decide, rows: list[str], header: str, encoding: str
) -> None:
    decide(*rows, header=header, encoding=encoding)
    assert names(folder) == ["00002.png"]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["train/00000.png,,", "train/00002.png,maybe,"], "image,decision,comment", r"Line 3 .*`maybe`.*accept or rej"),
        (["train/00009.png,reject,"], "image,decision,comment", r"Line 2 .*`train/00009.png`, which is not in"),
        (["train/00000.png,reject"], "picture,verdict", r"first line .* is `picture,verdict`"),
    ],
    ids=["word", "image", "header"],
)
def test_mistakes_in_the_review_are_named(
    folder: Path, decide: Decide, rows: list[str], header: str, message: str
) -> None:
    decide(*rows, header=header)
    with pytest.raises(ValueError, match=message):
        read_synthetic(folder)


@given(
    comment=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    word=st.sampled_from(("", *DECISIONS)),
)
@settings(max_examples=60, deadline=None)
def test_any_comment_comes_back(tmp_path_factory: pytest.TempPathFactory, comment: str, word: str) -> None:
    root = tmp_path_factory.mktemp("review")
    with (root / "review.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "decision", "comment"), ("train/00000.png", word, comment)])
    assert read_review(root, ["00000.png"]) == {"00000.png": {"decision": word, "comment": comment.strip()}}


def test_folder_without_review_or_with_rows_missing(folder: Path, decide: Decide) -> None:
    decide()
    assert names(folder) == ["00000.png", "00002.png"]
    (folder / "review.csv").unlink()
    assert names(folder) == ["00000.png", "00002.png"]


def test_unfinished_folder_names_the_command(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    touch(folder / "records" / "00000.json")
    with pytest.raises(ValueError, match=r"1 of 3 images are there.*run `anomalib synthesize --seed 0` again"):
        read_synthetic(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / OTHER.mask).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002_GT\.png` is missing.*`anomalib synthesize --seed 0` again"):
        read_synthetic(folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_synthetic(folder / "nowhere")


def test_manifest_of_another_version_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 99, "images": []}')
    with pytest.raises(ValueError, match="has format 99, but this version reads"):
        read_synthetic(folder)


def test_folder_made_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no synthetic images"):
        read_synthetic(tmp_path)
    for name in ("b.png", "b_GT.png", "00001.png"):
        touch(tmp_path / "train" / name)
    with pytest.raises(FileNotFoundError, match=r"00001_GT\.png` is missing"):
        read_synthetic(tmp_path)
    touch(tmp_path / "train" / "00001_GT.png")
    images = read_synthetic(tmp_path)
    assert [(image.image_path.name, image.mask_path.name, image.record) for image in images] == [
        ("00001.png", "00001_GT.png", None),
        ("b.png", "b_GT.png", None),
    ]
    (tmp_path / "review.csv").write_text("image,decision\nb.png,reject\n")
    assert names(tmp_path) == ["00001.png"]
