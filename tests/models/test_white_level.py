"""Cameras of 12 bits whose images are files of 16: one setting of the data, from training to prediction."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from jsonargparse import Namespace
from PIL import Image

from anomalib_exdd import KSDD2, ExDD, SyntheticDefects
from anomalib_exdd.commands.banks import Teach
from anomalib_exdd.synthesis.command import source_images
from small import SMALL

Make = Callable[..., Any]
WHITE = 4095


def save_12_bits(source: Path, target: Path) -> Path:
    """Write an image as a camera of 12 bits would: 16 steps for each of the 255."""
    with Image.open(source) as image:
        grey = np.asarray(image.convert("L")).astype(np.uint32)
    Image.fromarray((grey * WHITE // 255).astype(np.uint16)).save(target)
    return target


@pytest.fixture(scope="module")
def plain(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample in grey, 8 bits."""
    return converted(sample_root, tmp_path_factory.mktemp("plain"), lambda source, target: grey(source).save(target))


@pytest.fixture(scope="module")
def deep(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, 12 bits in files of 16."""
    return converted(sample_root, tmp_path_factory.mktemp("deep"), save_12_bits)


def grey(source: Path) -> Image.Image:
    with Image.open(source) as image:
        return image.convert("L")


def converted(root: Path, target: Path, save: Callable[[Path, Path], Any]) -> Path:
    for split in ("train", "test"):
        (target / split).mkdir()
        for path in (root / split).iterdir():
            if path.stem.endswith("_GT"):
                (target / split / path.name).write_bytes(path.read_bytes())
            else:
                save(path, target / split / path.name)
    return target


def trained_on(root: Path, folder: Path, **arguments: Any) -> Path:
    engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    engine.fit(model=ExDD(**SMALL), datamodule=KSDD2(root, num_workers=0, **arguments))
    return Path(str(engine.best_model_path))


@pytest.fixture(scope="module")
def checkpoints(plain: Path, deep: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models of the plain and of the deep images."""
    folder = tmp_path_factory.mktemp("trained")
    return trained_on(plain, folder / "plain"), trained_on(deep, folder / "deep", white_level=WHITE)


def test_items_are_those_of_images_that_use_all_bits(plain: Path, deep: Path) -> None:
    data = [KSDD2(plain, num_workers=0), KSDD2(deep, num_workers=0, white_level=WHITE)]
    data.append(SyntheticDefects(data[1], deep, count=0))  # type: ignore[arg-type]
    for each in data:
        each.setup()
    for name in ("train_data", "val_data", "test_data"):
        for items in zip(*(getattr(each, name) for each in data), strict=True):
            for item in items[1:]:
                torch.testing.assert_close(item.image, items[0].image, rtol=0, atol=1 / 1000)
    materials = [source_images(each) for each in data]
    for path, deep_path in zip(materials[0].normals, materials[1].normals, strict=True):
        found, expected = materials[1].read_image(deep_path), materials[0].read_image(path)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_checkpoint_knows_how_to_read_photos(
    checkpoints: tuple[Path, Path], plain: Path, deep: Path, engine: Make, tmp_path: Path
) -> None:
    probabilities = []
    for checkpoint, root in zip(checkpoints, (plain, deep), strict=True):
        engine().predict(model=ExDD(visualizer=False), data_path=root / "test", ckpt_path=checkpoint)
        table = json.loads((tmp_path / "results" / "ExDD" / "latest" / "predictions.json").read_text())
        probabilities.append([row["probability"] for row in table["predictions"]])
    assert len(probabilities[0]) == 6
    assert probabilities[1] == pytest.approx(probabilities[0], abs=0.02)


def test_teaching_reads_as_training_did(
    checkpoints: tuple[Path, Path], plain: Path, deep: Path, tmp_path: Path
) -> None:
    taught = []
    for checkpoint, root in zip(checkpoints, (plain, deep), strict=True):
        (image,) = root.glob("test/20003.png")
        arguments = {"image": image, "mask": image.with_name("20003_GT.png"), "box": None, "good": False, "kind": ""}
        Teach().call(Namespace(ckpt_path=checkpoint, output=tmp_path / f"{root.name}.ckpt", **arguments))
        model = ExDD.load_from_checkpoint(tmp_path / f"{root.name}.ckpt", map_location="cpu")
        bank = model.model.positive_bank
        taught.append(bank.features[bank.source == bank.sources.index(str(image))])
    torch.testing.assert_close(taught[1], taught[0], rtol=0.05, atol=0.05)
    again = ExDD.load_from_checkpoint(tmp_path / f"{deep.name}.ckpt", map_location="cpu")
    assert again.white_level == WHITE, "a changed checkpoint keeps it"


def test_other_data_are_refused(checkpoints: tuple[Path, Path], deep: Path, engine: Make) -> None:
    for checkpoint, data in zip(checkpoints, (WHITE, 65535), strict=True):
        with pytest.raises(ValueError, match=rf"white_level {65535 + WHITE - data}`, but .* has {data}"):
            engine().test(model=ExDD(), datamodule=KSDD2(deep, num_workers=0, white_level=data), ckpt_path=checkpoint)
    engine().test(
        model=ExDD(), datamodule=KSDD2(deep, num_workers=0, white_level=WHITE), ckpt_path=checkpoints[1], verbose=False
    )


def test_nearly_black_images_are_told(deep: Path, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    KSDD2(plain, num_workers=0).setup()
    KSDD2(deep, num_workers=0, white_level=WHITE).setup()
    assert "nearly black" not in caplog.text
    KSDD2(deep, num_workers=0).setup()
    assert "`white_level` 4095" in caplog.text


def test_nearly_black_photos_are_told(
    checkpoints: tuple[Path, Path], deep: Path, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    for checkpoint, told in zip(reversed(checkpoints), (False, True), strict=True):
        engine().predict(model=ExDD(visualizer=False), data_path=deep / "test" / "20000.png", ckpt_path=checkpoint)
        assert ("nearly black" in caplog.text) is told
