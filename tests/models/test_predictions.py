"""`anomalib predict` with ExDD: a table beside the pictures, whatever lies in the folder."""

import csv
import gc
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from copy import deepcopy
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, PredictDataset
from anomalib.data.utils import path as anomalib_path
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, RandomHorizontalFlip, Resize

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.cli import has_control_characters, main
from anomalib_exdd.models.callbacks.prediction_row import predict_file
from anomalib_exdd.models.callbacks.predictions import UNREADABLE, Predictions
from anomalib_exdd.models.record import Record, model_version
from anomalib_exdd.models.regions import find_regions

Make = Callable[..., Any]
Command = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the generated surfaces well enough to find their defects."""
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("trained"), accelerator="cpu", devices=1, logger=False)
    engine.fit(model=ExDD(backbone="filter_bank", image_size=(316, 112)), datamodule=KSDD2(sample_root, num_workers=0))
    return Path(str(engine.best_model_path))


@pytest.fixture
def photos(sample_root: Path, tmp_path: Path) -> Path:
    """A folder as people have it: images, masks beside them, two broken files and a note."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted((sample_root / "test").iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "10000.jpg").write_bytes(b"no image")
    (folder / "20001b.png").write_bytes((folder / "20003.png").read_bytes()[:3000])
    (folder / "notes.txt").write_text("no image either")
    (folder / ".hidden").write_text("nobody's business")
    (folder / "more").mkdir()
    for name in ("b.JFIF", "a.jfif", "more/c.gif"):
        (folder / name).write_bytes((folder / "20000.png").read_bytes())
    return folder


@pytest.fixture
def command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `anomalib predict` in this process, and return the folder of its results."""
    monkeypatch.chdir(tmp_path)

    def run(data: Path, *arguments: str) -> Path:
        words = ["predict", "--model", "ExDD", "--data", str(data), "--ckpt_path", str(checkpoint), *arguments]
        AnomalibCLI([*words, "--trainer.accelerator", "cpu"])
        return tmp_path / "results" / "ExDD" / "latest"

    return run


def table(folder: Path) -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads((folder / "predictions.json").read_text())
    return content["predictions"]  # type: ignore[no-any-return]


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "predictions.json").read_text())
    return content["summary"]  # type: ignore[no-any-return]


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def json_of(content: Any) -> Any:
    return json.loads(json.dumps(content))


def test_command_says_what_it_predicted_and_what_it_could_not_read(
    command: Command, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(SystemExit) as left:
        command(photos)
    assert left.value.code == UNREADABLE == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Not predicted: ")]
    assert [name in line for name, line in zip(("10000.jpg", "20001b.png"), told, strict=True)] == [True, True]
    assert "6 images: " in caplog.text
    told = "2 .jfif (such as a.jfif), 1 .gif (c.gif), 1 .txt (notes.txt)"
    assert f"2 unreadable; 6 masks left out; other files left out: {told}" in caplog.text

    results = tmp_path / "results" / "ExDD" / "latest"
    assert sorted(path.name for path in results.iterdir()) == [
        "config.yaml",
        "images",
        "predictions.csv",
        "predictions.json",
    ]
    rows = table(results)
    names = [Path(row["path"]).name for row in rows]
    assert names == sorted([f"2000{number}.png" for number in range(6)] + ["10000.jpg", "20001b.png"])
    assert {path.name for path in (results / "images" / "photos").iterdir()} == {f"2000{n}.png" for n in range(6)}
    for row in rows:
        if row["error"] is not None:
            assert set(row) - {name for name, value in row.items() if value is None} == {"path", "error"}
            continue
        assert row["probability"] == row["raw_score"]
        assert row["label"] == ("defective" if row["score"] > row["threshold"] else "normal")
        below, above = row["probability"] < row["accept_threshold"], row["probability"] >= row["reject_threshold"]
        assert row["decision"] == ("accept" if below else "reject" if above else "review")
        assert row["num_regions"] == len(row["regions"])
        assert row["seconds"] > 0
    counts = summary(results)
    assert counts["images"] == 6
    assert counts["masks_left_out"] == 6
    assert counts["files_left_out"] == {
        ".jfif": {"number": 2, "example": "a.jfif"},
        ".gif": {"number": 1, "example": "c.gif"},
        ".txt": {"number": 1, "example": "notes.txt"},
    }
    assert sum(counts["decisions"].values()) == sum(counts["labels"].values()) == 6

    with (results / "predictions.csv").open(newline="") as file:
        for row, cells in zip(rows, csv.DictReader(file), strict=True):
            assert list(cells) == list(row)
            texts = {name: json.dumps(v) if name == "regions" and v is not None else v for name, v in row.items()}
            assert cells == {name: "" if value is None else str(value) for name, value in texts.items()}


def test_a_record_has_every_row_and_a_file_alone_gives_the_same(
    command: Command, checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    """What the record and `predict_file` have of an image is what the command's table has."""
    for _ in range(2):
        with pytest.raises(SystemExit):
            command(photos, "--model.record", str(tmp_path / "new" / "record.db"), "--model.visualizer", "false")
    rows = table(tmp_path / "results" / "ExDD" / "latest")
    record = Record(tmp_path / "new" / "record.db")
    events = list(record.events())
    record.close()
    model = ExDD.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    states = [event for event in events if event.action == "model"]
    assert [(event.path, event.content) for event in states] == [(str(checkpoint), json_of(model.facts()))] * 2
    assert {event.model for event in events} == {model_version(model)}
    events = [event for event in events if event.action == "prediction"]
    key = itemgetter("path")
    assert [event.path for event in events] == [event.content["path"] for event in events]
    assert sorted((event.content for event in events[len(rows) :]), key=key) == sorted(rows, key=key)
    assert len(events) == 2 * len(rows)
    for row in rows:
        found, batch = predict_file(model, Path(row["path"]))
        assert without_time(json_of(found.to_dict())) == without_time(row)
        assert (batch is None) == (row["error"] is not None)
        assert row["error"] is not None or row["normal_distance"] > 0


def test_scores_are_anomalibs_own(checkpoint: Path, sample_root: Path, engine: Make, tmp_path: Path) -> None:
    """The table has what `predict` returns, and that is what Anomalib's own reading gives, whatever the batch size."""

    class Own(PredictDataset):  # type: ignore[misc]  # not Anomalib's: it is left as it is
        pass

    folder = tmp_path / "images"
    folder.mkdir()
    for path in (sample_root / "test").glob("200??.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    expected = engine().predict(model=ExDD(visualizer=False), dataset=Own(folder), ckpt_path=checkpoint)
    returned = engine().predict(model=ExDD(visualizer=False), data_path=folder, ckpt_path=checkpoint)
    assert len(returned) == len(expected) == 6
    rows = table(tmp_path / "results" / "ExDD" / "latest")
    for row, ours, theirs in zip(rows, returned, expected, strict=True):
        assert ours.image_path == theirs.image_path == [row["path"]]
        assert torch.equal(ours.anomaly_map, theirs.anomaly_map)
        assert ours.pred_score.item() == theirs.pred_score.item() == row["score"]
        assert ours.explanation[0].startswith(f"{row['decision']}: probability {row['probability']:.3f}")

    dataset = PredictDataset(folder)
    batches = DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn)
    engine().predict(model=ExDD(visualizer=False), dataloaders=batches, ckpt_path=checkpoint, return_predictions=False)
    for row, before in zip(table(tmp_path / "results" / "ExDD" / "latest"), rows, strict=True):
        assert row["path"] == before["path"]
        assert row["probability"] == pytest.approx(before["probability"], abs=1e-5)


def test_python_gets_warnings_instead_of_an_exit(
    checkpoint: Path, photos: Path, engine: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    returned = engine().predict(model=ExDD(visualizer=False), data_path=photos, ckpt_path=checkpoint)
    assert len(returned) == 6
    assert caplog.text.count("Not predicted: The image") == 2
    counts = summary(tmp_path / "results" / "ExDD" / "latest")
    assert counts["unreadable"] == 2
    assert list(counts["files_left_out"]) == [".jfif", ".gif", ".txt"]
    engine().predict(model=ExDD(visualizer=False), data_path=photos / "20000.png", ckpt_path=checkpoint)
    assert summary(tmp_path / "results" / "ExDD" / "latest")["files_left_out"] == {}, "one photo was asked for"


def test_memory_does_not_grow_with_the_folder(
    command: Command, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes((sample_root / "test" / "20000.png").read_bytes())
    alive: list[int] = []
    finish = Predictions.on_predict_end

    def counting(self: Predictions, trainer: Any, pl_module: Any) -> None:
        gc.collect()
        alive.append(sum(isinstance(each, ImageBatch) for each in gc.get_objects()))
        assert trainer.predict_loop.predictions in ([], [[]])
        finish(self, trainer, pl_module)

    gc.collect()
    before = sum(isinstance(each, ImageBatch) for each in gc.get_objects())
    monkeypatch.setattr(Predictions, "on_predict_end", counting)
    results = command(folder, "--model.visualizer", "false")
    assert alive[0] - before <= 1
    assert len(table(results)) == 12
    assert not (results / "images").exists()


def test_boxes_are_in_pixels_of_the_original(command: Command, sample_root: Path, tmp_path: Path) -> None:
    """A defect is found where it is in an image of another size and shape than the model's."""
    folder = tmp_path / "stretched"
    folder.mkdir()
    truth = {}
    for mask_path in sorted((sample_root / "test").glob("*_GT.png")):
        name = mask_path.name.replace("_GT", "")
        with Image.open(mask_path) as mask, Image.open(mask_path.with_name(name)) as image:
            size = (image.width * 3, image.height)
            image.resize(size).save(folder / name)
            truth[name] = np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 0
    found = 0
    for row in table(command(folder, "--model.visualizer", "false")):
        mask = truth[Path(row["path"]).name]
        for region in row["regions"]:
            left, top, width, height = region["box"]
            assert left + width <= mask.shape[1]
            assert top + height <= mask.shape[0]
            assert 0 < region["area"] <= width * height
        if not mask.any():
            continue
        (ys, xs), worst = np.nonzero(mask), row["regions"][0]
        left, top, width, height = worst["box"]
        assert mask[top : top + height, left : left + width].any()
        assert xs.min() - 60 <= left + width / 2 <= xs.max() + 60  # in an image 690 pixels wide
        assert ys.min() - 20 <= top + height / 2 <= ys.max() + 20
        found += 1
    assert found == 3


def test_regions_are_those_of_the_predicted_mask(checkpoint: Path, photos: Path, engine: Make, tmp_path: Path) -> None:
    returned = engine().predict(model=ExDD(visualizer=False), data_path=photos / "20003.png", ckpt_path=checkpoint)
    (row,) = table(tmp_path / "results" / "ExDD" / "latest")
    (mask,), (anomaly_map,) = returned[0].pred_mask, returned[0].anomaly_map
    with Image.open(photos / "20003.png") as image:
        width, height = image.size
    labels, count = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    assert row["num_regions"] == count > 0
    assert row["regions"][0]["value"] == anomaly_map[mask].max()
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1)) * width * height / labels.size
    assert sorted(region["area"] for region in row["regions"]) == pytest.approx(sorted(sizes), abs=1)


@pytest.mark.parametrize(
    ("resize", "crop"),
    [(Resize((316, 112)), CenterCrop((200, 100))), (Resize(150), CenterCrop((330, 120)))],
    ids=["to one size", "by the shorter side"],
)
def test_regions_of_cropped_images_lie_where_they_belong(
    checkpoint: Path, sample_root: Path, engine: Make, tmp_path: Path, resize: Resize, crop: CenterCrop
) -> None:
    """They are those of the predicted mask put back into the image that is resized only."""
    model = ExDD.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    model.pre_processor = PreProcessor(Compose([resize, crop]))
    located = 0
    sources: dict[str, dict[str, Any]] = {
        "latest": {"data_path": sample_root / "test"},
        "KSDD2/latest": {"datamodule": KSDD2(sample_root, num_workers=0, eval_batch_size=1)},
    }
    for folder, source in sources.items():
        returned = engine().predict(model=model, **source)
        rows = table(tmp_path / "results" / "ExDD" / folder)
        for row, batch in zip(rows, returned, strict=True):
            with Image.open(row["path"]) as image:
                size = image.size[::-1]
            whole = resize(torch.zeros(2, *size))
            top, left = ((whole.shape[axis] - crop.size[axis]) / 2 for axis in (-2, -1))
            part = whole[:, round(top) : round(top) + crop.size[0], round(left) : round(left) + crop.size[1]]
            part[:] = torch.stack([batch.pred_mask[0], batch.anomaly_map.reshape(crop.size)])
            expected = find_regions(whole[0].numpy() > 0, whole[1].numpy(), size)
            reasons = [{name: region[name] for name in ("reason", "kind")} for region in row["regions"]]
            assert row["regions"] == [
                {**region._asdict(), "box": list(region.box), **reason}
                for region, reason in zip(expected, reasons, strict=True)
            ]
            assert {reason["reason"] for reason in reasons} <= {"known", "unfamiliar"}
            located += len(expected)
    assert located


def test_deep_images_are_not_clipped(command: Command, sample_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    with Image.open(sample_root / "test" / "20003.png") as image:
        grey = np.asarray(image.convert("L"))
    Image.fromarray(grey).save(folder / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "16.png")
    deep, plain = table(command(folder, "--model.visualizer", "false"))
    assert deep["probability"] == pytest.approx(plain["probability"], abs=1e-5)
    assert deep["decision"] == plain["decision"]


def test_turned_photos_are_predicted_as_viewers_show_them(command: Command, sample_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "turned"
    folder.mkdir()
    with Image.open(sample_root / "test" / "20003.png") as image:
        for orientation, back in ((1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
            exif = Image.Exif()
            exif[274] = orientation
            stored = image.copy() if back is None else image.transpose(back)
            stored.save(folder / f"{orientation}.png", exif=exif)
    upright, *turned = table(command(folder))
    assert upright["num_regions"] > 0
    same = ("score", "raw_score", "regions", "decision")
    assert [[row[name] for name in same] for row in turned] == [[upright[name] for name in same]] * 2
    pictures = [path.read_bytes() for path in sorted(tmp_path.rglob("images/turned/*.png"))]
    assert pictures[1:] == pictures[:1] * 2


def test_what_cannot_be_known_is_left_empty(
    checkpoint: Path, photos: Path, engine: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ExDD.load_from_checkpoint(checkpoint, map_location="cpu", visualizer=False)
    bare = deepcopy(model)
    bare.post_processor = PostProcessor(enable_normalization=False, enable_thresholding=False)
    results = tmp_path / "results" / "ExDD" / "latest"
    engine().predict(model=bare, data_path=photos / "20003.png")
    (row,) = table(results)
    assert row["score"] == row["raw_score"] == row["probability"]
    assert [row[name] for name in ("label", "threshold", "regions", "num_regions")] == [None] * 4

    model.pre_processor = PreProcessor(Compose([Resize((316, 112)), RandomHorizontalFlip(1.0)]))
    engine().predict(model=model, data_path=photos / "20003.png")
    (row,) = table(results)
    assert row["label"] is not None
    assert row["regions"] is None
    assert "crops images" not in caplog.text

    engine().predict(
        model=ExDD(image_scoring="normal", visualizer=False), data_path=photos / "20003.png", ckpt_path=checkpoint
    )
    (row,) = table(results)
    assert row["raw_score"] > 0
    assert [row[name] for name in ("probability", "decision", "accept_threshold", "reject_threshold")] == [None] * 4


def test_interrupted_prediction_leaves_no_half_table(
    checkpoint: Path, photos: Path, engine: Make, tmp_path: Path
) -> None:
    class Interrupt(Callback):
        def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
            if batch_idx == 2:
                msg = "The power is out."
                raise RuntimeError(msg)

    results = tmp_path / "results" / "ExDD" / "latest"

    def contents() -> Iterator[bytes]:
        return (path.read_bytes() for path in sorted(results.glob("predictions.*")))

    with pytest.raises(RuntimeError, match="power"):
        engine(callbacks=[Interrupt()]).predict(model=ExDD(visualizer=False), data_path=photos, ckpt_path=checkpoint)
    assert [path.name for path in results.glob("predictions.*")] == ["predictions.partial-0.jsonl"]
    lines = (results / "predictions.partial-0.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["path"]).name for line in lines] == ["10000.jpg", "20000.png", "20001.png"]
    engine().predict(model=ExDD(visualizer=False), data_path=photos / "20003.png", ckpt_path=checkpoint)
    complete = list(contents())
    assert len(complete) == 2
    with pytest.raises(RuntimeError, match="power"):
        engine(callbacks=[Interrupt()]).predict(model=ExDD(visualizer=False), data_path=photos, ckpt_path=checkpoint)
    (results / "predictions.partial-0.jsonl").unlink()
    assert list(contents()) == complete


def test_nothing_to_predict_is_an_error(command: Command, checkpoint: Path, engine: Make, tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"Found 0 images in {folder}"):
        command(folder)
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="Error: No file can be read as an image; 1 were tried"):
        command(folder)
    with pytest.raises(ValueError, match="No file can be read as an image"):
        engine().predict(model=ExDD(visualizer=False), data_path=folder, ckpt_path=checkpoint)


def test_data_modules_are_listed_too(checkpoint: Path, sample_root: Path, engine: Make, tmp_path: Path) -> None:
    returned = engine().predict(
        model=ExDD(visualizer=False), datamodule=KSDD2(sample_root, num_workers=0), ckpt_path=checkpoint
    )
    rows = table(tmp_path / "results" / "ExDD" / "KSDD2" / "latest")
    paths = [path for batch in returned for path in batch.image_path]
    assert [row["path"] for row in rows] == paths
    assert [row["score"] for row in rows] == [score for batch in returned for score in batch.pred_score.tolist()]


def test_files_beside_a_single_photo_are_left_out_of_its_folder_only(command: Command, photos: Path) -> None:
    assert summary(command(photos / "20000.png", "--model.visualizer", "false"))["files_left_out"] == {}
    only = photos / "more"
    (only / "d.png").write_bytes((photos / "20000.png").read_bytes())
    assert summary(command(only, "--model.visualizer", "false"))["files_left_out"] == {
        ".gif": {"number": 1, "example": "c.gif"}
    }


def test_our_command_takes_letters_beyond_ascii(
    command: Command, checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Fotos").mkdir()
    folder = photos.rename(tmp_path / "Fotos" / "Käse と 한글")
    (folder / "20000.png").rename(folder / "Prüfling.png")
    with pytest.raises(ValueError, match="non-printable"):
        command(folder)
    refuse = anomalib_path.contains_non_printable_characters
    monkeypatch.setattr(anomalib_path, "contains_non_printable_characters", refuse)  # to put it back
    words = ["predict", "--model", "ExDD", "--data", "Fotos/Käse と 한글", "--ckpt_path", str(checkpoint)]
    words += ["--trainer.accelerator", "cpu", "--default_root_dir", "Ergebnisse ü"]
    monkeypatch.setattr(sys, "argv", ["anomalib-exdd", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == UNREADABLE  # the folder has two broken files
    results = tmp_path / "Ergebnisse ü" / "ExDD" / "latest"
    assert str(folder / "Prüfling.png") in [row["path"] for row in table(results) if row["error"] is None]
    assert (results / "images" / folder.name / "Prüfling.png").is_file()


def test_only_control_characters_are_refused() -> None:
    assert not any(
        map(has_control_characters, ("Käse/ü.png", "a b", "写真", "a\u0308", "C:\\x", Path("é"), "caf\udce9"))
    )
    assert all(map(has_control_characters, ("a\x00", "a\n", "a\x7f", "a\x85")))


def test_two_processes_list_every_image_once(checkpoint: Path, command: Command, photos: Path, tmp_path: Path) -> None:
    """The installed command with two processes, and its exit code."""
    with pytest.raises(SystemExit):
        command(photos)
    one = table(tmp_path / "results" / "ExDD" / "latest")
    words = ["predict", "--model", "ExDD", "--data", photos, "--ckpt_path", checkpoint, "--default_root_dir", "two"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    ran = subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "anomalib", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == UNREADABLE, ran.stdout + ran.stderr
    assert [line.split("`")[1] for line in ran.stderr.splitlines() if line.startswith("Not predicted: The")] == [
        str(photos / "10000.jpg"),
        str(photos / "20001b.png"),
    ]
    results = tmp_path / "two" / "ExDD" / "latest"
    assert sorted(path.name for path in results.glob("predictions*")) == ["predictions.csv", "predictions.json"]
    assert [without_time(row) for row in table(results)] == [without_time(row) for row in one]
    assert len(list((results / "images" / "photos").iterdir())) == 6
