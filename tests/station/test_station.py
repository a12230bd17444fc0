"""The station without its page: predictions, answers, teaching and undo, and the record of all of it."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_exdd.commands.banks import load_checkpoint
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.callbacks.prediction_row import predict_file
from anomalib_exdd.models.record import model_version
from anomalib_exdd.station.command import ReviewCommand
from anomalib_exdd.station.station import Station


@pytest.fixture
def station(trained: Path, tmp_path: Path) -> Station:
    shutil.copy(trained, tmp_path / "model.ckpt")
    return Station(tmp_path / "model.ckpt", tmp_path / "record.db")


@pytest.fixture
def accepting(station: Station) -> Station:
    """One that accepts some of the images, as a model of more images would."""
    station.model.hparams.update(false_accept_rate=0.6, false_reject_rate=0.3)
    return station


def defective(surfaces: Path) -> tuple[Path, np.ndarray]:
    """Return a defective image and its mask."""
    for mask in sorted((surfaces / "test").glob("*_GT.png")):
        with Image.open(mask) as image:
            mask_HW = np.asarray(image.convert("L")) > 0
        if mask_HW.any():
            return mask.with_name(mask.name.replace("_GT", "")), mask_HW
    pytest.fail("no image is defective")


def test_what_is_for_review_comes_first(station: Station, surfaces: Path) -> None:
    for number in range(12):
        station.predict(surfaces / "test" / f"{20000 + number}.png")
    order = [("review", "reject", "accept").index(str(row.decision)) for row in station.queue()]
    assert order == sorted(order)
    assert len(set(order)) > 1
    for one, other in zip(station.queue(), station.queue()[1:], strict=False):
        assert one.decision != other.decision or (one.probability or 0) >= (other.probability or 0)


def test_a_missed_defect_is_taught_and_forgotten(station: Station, surfaces: Path) -> None:
    path, mask_HW = defective(surfaces)
    row = station.predict(path)
    before = station.training_decisions()
    drawn = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize((115, 316), Image.Resampling.BOX)
    small = np.asarray(drawn) > 0  # of the size on a screen
    said = station.answer(str(path), "defect", small, "gouge")
    after = station.training_decisions()

    # The checkpoint on disk is the changed one, and equal to what `teach` makes.
    taught = load_checkpoint(station.checkpoint)
    assert "gouge" in station.kinds
    assert taught.model.positive_bank.kinds[str(path)] == "gouge"
    assert model_version(taught) == station.version
    now = predict_file(taught, path)[0]
    assert now.probability is not None
    assert row.probability is not None
    assert now.probability > row.probability
    assert f"{row.probability:.3f} → {now.probability:.3f} ({row.decision} → {now.decision})" in said
    moved = [name for name in before if before[name] != after[name]]
    assert f"decision changes: {len(moved)} of {len(before)}" in said
    assert str(path) not in {row.path for row in station.queue()}

    said = station.undo()
    assert f"{now.probability:.3f} → {row.probability:.3f}" in said
    assert station.training_decisions() == before
    assert str(path) in {row.path for row in station.queue()}
    assert station.undo().startswith("Nothing was taught")
    events = [(event.action, event.path == str(path)) for event in station.record.events()]
    start = [("model", False), ("prediction", True)]
    assert events == [*start, ("answer", True), ("model", False), ("teach", True), ("model", False), ("forget", True)]
    versions = [event.model for event in station.record.events("model")]
    assert versions[0] == versions[2] != versions[1]
    station.record.write_csv(station.record.path.with_suffix(".csv"))
    with station.record.path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[2]["answer"], rows[2]["kind"]) == ("defect", "gouge")
    assert (float(rows[4]["before"]), float(rows[4]["after"])) == (row.probability, now.probability)


def test_a_mask_that_nobody_has_drawn_is_the_predicted_one(station: Station, surfaces: Path) -> None:
    seen = {bool(station.view(str(surfaces / "test" / f"{20000 + number}.png")).mask.any()) for number in range(12)}
    assert seen == {False, True}
    done = set()
    for number in range(12):
        path = str(surfaces / "test" / f"{20000 + number}.png")
        mask = station.view(path).mask
        if mask.any() in done:
            continue
        done.add(mask.any())
        if not mask.any():
            with pytest.raises(ValueError, match="Paint where it is"):
                station.answer(path, "defect", np.zeros((8, 8), dtype=bool))
            continue
        entries = int(station.answer(path, "defect").split()[1])
        by_hand = load_checkpoint(station.checkpoint)
        by_hand.forget(path)
        assert by_hand.teach(torch.Tensor(read_image(path)), torch.tensor(mask), path) == entries


def test_false_alarms_are_taught_and_accepted_images_are_not(accepting: Station, surfaces: Path) -> None:
    station = accepting
    rows = [station.predict(surfaces / "test" / f"{20000 + number}.png") for number in range(12)]
    accepted = next(row for row in rows if row.decision == "accept")
    bank, version = len(station.model.model.negative_bank), station.version
    for answer in ("good", "not sure"):
        assert "The model stays as it is" in station.answer(accepted.path, answer)  # type: ignore[arg-type]
    assert (len(station.model.model.negative_bank), station.version) == (bank, version)
    alarm = next(row for row in rows if row.decision == "reject")
    said = station.answer(alarm.path, "good", kind="ignored")
    assert "**Teach good**" in said
    assert alarm.path in station.model.model.negative_bank.sources
    now = predict_file(station.model, Path(alarm.path))[0]
    assert (now.probability or 0) < (alarm.probability or 0)
    answers = [(event.content["answer"], event.content["kind"]) for event in station.record.events("answer")]
    assert answers == [("good", ""), ("not sure", ""), ("good", "")]


def test_what_is_shown_is_what_the_model_says(station: Station, surfaces: Path) -> None:
    path, _ = defective(surfaces)
    image = torch.Tensor(read_image(path))
    view, explanation = station.view(str(path)), station.model.explain(image, str(path), 2)
    row, batch = predict_file(station.model, path)
    assert view.row.probability == row.probability
    assert view.image.size == (image.shape[-1], image.shape[-2])
    wanted = np.asarray(Image.fromarray(batch.pred_mask[0].numpy()).resize(view.image.size, Image.Resampling.NEAREST))
    assert np.array_equal(view.mask, wanted)
    assert len(view.tiles) == 3 * len(explanation.patches)
    for number, patch in enumerate(explanation.patches):
        assert patch.defect is not None
        names = [name for _, name in view.tiles[3 * number : 3 * number + 3]]
        kind = station.model.model.positive_bank.kinds[patch.defect.source]
        assert names == [
            "this image",
            f"good: {Path(patch.normal.source).name}",
            f"{kind}: {Path(patch.defect.source).name}",
        ]


def test_sent_files_are_kept_if_somebody_may_teach_them(accepting: Station, surfaces: Path) -> None:
    station, kept, gone = accepting, [], []
    for number in range(12):
        path = surfaces / "test" / f"{20000 + number}.png"
        row = station.predict_sent(io.BytesIO(path.read_bytes()), "../Bild 1.png")
        alone = predict_file(station.model, path)[0]
        assert (row.probability, row.regions) == (alone.probability, alone.regions)
        (gone if row.decision == "accept" else kept).append(row.path)
    assert set(gone) == {"../Bild 1.png"}
    assert sorted(map(str, station.folder.iterdir())) == sorted(kept)
    assert all(Path(path).name.endswith("_.._Bild_1.png") for path in kept)
    row = station.predict_sent(io.BytesIO(b"no image"), "x.png")
    assert row.error is not None
    assert len(list(station.folder.iterdir())) == len(kept)


def test_who_opens_the_page_to_others_gives_a_password(trained: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        ReviewCommand().run(ReviewCommand.get_parser().parse_args(list(arguments)))

    with pytest.raises(SystemExit, match="give it a --password"):
        run("--ckpt_path", str(trained), "--host", "0.0.0.0")  # noqa: S104  refused
    pytest.importorskip("gradio", reason="the extra `station` is not installed")
    with pytest.raises(SystemExit, match=r"none\.ckpt does not exist"):
        run("--ckpt_path", "none.ckpt", "--record", str(tmp_path / "record.db"))
