"""Pre-processors that crop: what is cut off, in training, tests, pictures and when a defect is taught."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, RandomHorizontalFlip, Resize, Transform

from anomalib_exdd import DefectClassifier, DefectFolder, ExDD
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.exdd.explanation import Explanation, PatchExplanation, TrainingPatch
from anomalib_exdd.models.exdd.explanation_pictures import draw_explanation
from small import SMALL

Make = Callable[..., Any]
SIZE = (192, 128)  # of the images; resized to half of it, of which the middle is left
RESIZE, CROP = Resize((96, 64)), CenterCrop((48, 32))
SEEN = slice(48, 144), slice(32, 96)


def cropping(*before: Transform) -> PreProcessor:
    normalize = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return PreProcessor(Compose([*before, RESIZE, CROP, normalize]))


def save_part(folder: Path, number: int, *corner: int) -> Path:
    """Write a noisy image and, with a corner, a bright defect of 12 x 12 pixels there with its mask."""
    pixels = np.random.default_rng(number).normal(100, 10, SIZE)
    mask = np.zeros(SIZE, dtype=np.uint8)
    if corner:
        mask[corner[0] : corner[0] + 12, corner[1] : corner[1] + 12] = 255
        (folder / "masks").mkdir(exist_ok=True, parents=True)
        Image.fromarray(mask).save(folder / "masks" / f"{number:02d}.png")
    path = folder / ("bad" if corner else "good") / f"{number:02d}.png"
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.clip(pixels + mask, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good parts, and four bad ones: two in the middle, one at its edge, and none cut off yet."""
    for number in range(10):
        save_part(tmp_path / "parts", number)
    for number, corner in enumerate([(90, 60), (60, 70), (37, 21), (80, 50)], start=20):
        save_part(tmp_path / "parts", number, *corner)
    return tmp_path / "parts"


def data_of(folder: Path, **arguments: Any) -> DefectFolder:
    masks = {"masks": "masks", "normal_test": "good", "defective_test": "test", "masks_test": "test_masks"}
    return DefectFolder("parts", folder, normal="good", defective="bad", num_workers=0, **(masks | arguments))


@pytest.fixture
def held_out(folder: Path, tmp_path: Path) -> Path:
    """Test images beside them."""
    for number, corner in ((50, (90, 60)), (51, (0, 0))):
        path = save_part(tmp_path / "other", number, *corner)
        for kind, source in (("test", path), ("test_masks", path.parents[1] / "masks" / path.name)):
            (folder / kind).mkdir(exist_ok=True)
            source.rename(folder / kind / path.name)
    for number in range(60, 64):
        (folder / "good_test").mkdir(exist_ok=True)
        save_part(tmp_path / "other", number).rename(folder / "good_test" / f"{number}.png")
    return folder


def model_of(**arguments: Any) -> ExDD:
    return ExDD(**{**SMALL, "pre_processor": cropping(), "visualizer": False, **arguments})


def test_defects_that_are_cut_off_are_named_all_at_once(
    held_out: Path, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    lost = [save_part(held_out, number, *corner) for number, corner in ((30, (0, 0)), (31, (36, 60)), (32, (100, 96)))]
    data = data_of(held_out, normal_test="good_test", train_augmentations=RandomHorizontalFlip(0.5))
    with pytest.raises(ValueError, match=r"the defects of 3 training images .*CenterCrop\(size=\(48, 32\)\)") as error:
        engine().fit(model=model_of(), datamodule=data)
    assert [name for name in str(error.value).split("`") if ".png" in name] == [str(path) for path in lost]
    assert "The pre-processor crops images (CenterCrop(size=(48, 32)))" in caplog.text
    with pytest.raises(ValueError, match="the defects of 3 training images"):
        engine(max_epochs=1).fit(
            model=DefectClassifier("test_resnet", pre_trained=False, pre_processor=cropping()), datamodule=data
        )
    for path in lost:
        path.unlink()
        (held_out / "masks" / path.name).unlink()
    caplog.clear()
    model = model_of()
    trainer = engine()
    trainer.fit(model=model, datamodule=data_of(held_out, normal_test="good_test"))
    assert {Path(path).stem for path in model.model.positive_bank.sources} == {"20", "21", "22", "23"}
    trainer.test(model=model, datamodule=data_of(held_out, normal_test="good_test"), verbose=False)
    told = [record.getMessage() for record in caplog.records if "test images after cropping" in record.getMessage()]
    assert len(told) == 1
    assert f"the defects of 1 test images after cropping; they count as defective: `{held_out / 'test'}" in told[0]


def test_nothing_is_said_where_nothing_is_cropped(
    held_out: Path, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    save_part(held_out, 30, 0, 0)
    engine().fit(model=model_of(pre_processor=True), datamodule=data_of(held_out, normal_test="good_test"))
    assert "crop" not in caplog.text


def test_a_resize_behind_a_crop_is_refused(held_out: Path, engine: Make) -> None:
    """Anomalib's data modules resize first, whatever the order."""
    model = model_of(pre_processor=PreProcessor(Compose([CenterCrop((96, 64)), RESIZE])))
    with pytest.raises(ValueError, match=r"Put `Resize` first in the pre-processor \(CenterCrop"):
        engine().fit(model=model, datamodule=data_of(held_out, normal_test="good_test"))


def test_pictures_show_the_part_that_is_seen(held_out: Path, engine: Make, tmp_path: Path) -> None:
    model = model_of(visualizer=True)
    trainer = engine()
    trainer.fit(model=model, datamodule=data_of(held_out, normal_test="good_test"))
    trainer.predict(model=model, data_path=held_out / "bad" / "20.png")
    (picture,) = tmp_path.rglob("images/bad/20.png")
    seen = Image.fromarray((read_image(held_out / "bad" / "20.png")[0][SEEN] * 255).byte().numpy())
    with Image.open(picture) as image:
        width, height = image.width // 3, image.height - 24
        assert (width, height) == (200, 300)
        shown = np.asarray(image.crop((0, 0, width, height)).convert("L"), dtype=float)
    expected = np.asarray(seen.resize((32, 48)).resize((width, height)), dtype=float)
    assert np.corrcoef(shown[40:].ravel(), expected[40:].ravel())[0, 1] > 0.97
    row, column = np.argwhere(shown[40:] > 180).mean(axis=0)
    # The defect has its middle in row 96 of those from 48 to 144, and in column 66 of 32 to 96.
    assert row + 40 == pytest.approx((96 - 48) * 300 / 96, abs=5)
    assert column == pytest.approx((66 - 32) * 200 / 64, abs=5)


def test_explanations_cut_out_what_was_seen(tmp_path: Path) -> None:
    whole = save_part(tmp_path, 1, 90, 60)
    part = tmp_path / "part.png"
    with Image.open(whole) as image:
        image.crop((SEEN[1].start, SEEN[0].start, SEEN[1].stop, SEEN[0].stop)).save(part)

    def explanation(path: Path) -> Explanation:
        near = TrainingPatch(str(path), 24, 17, 1.0)
        patch = PatchExplanation(10, 20, 0.5, near, None)
        return Explanation("x", (48, 32), 0.5, None, [patch], torch.linspace(0, 1, 48 * 32).reshape(48, 32))

    drawn = [
        draw_explanation(replace(explanation(path), source=str(path)), model)
        for path, model in ((whole, model_of()), (part, None))
    ]
    difference = np.abs(np.subtract(*(np.asarray(picture, dtype=np.int16) for picture in drawn)))
    names = slice(180, 200)  # under the tiles
    assert np.delete(difference, names, axis=0).max() <= 2


def test_taught_masks_are_cropped_with_their_image(held_out: Path, engine: Make) -> None:
    model = model_of()
    engine().fit(model=model, datamodule=data_of(held_out, normal_test="good_test"))
    taught = save_part(held_out.parent / "new", 70, 66, 48)
    mask = torch.zeros(SIZE)
    mask[66:78, 48:60] = 1
    assert model.teach(read_image(taught), mask, "new") > 0
    bank = model.model.positive_bank
    positions = bank.position[bank.source == bank.sources.index("new")]
    low, high = torch.tensor([(66 - 48) // 2, (48 - 32) // 2]), torch.tensor([(78 - 48) // 2, (60 - 32) // 2])
    cell = 8  # pixels of a patch
    assert ((positions >= low - cell) & (positions < high + cell)).all()
    with pytest.raises(ValueError, match=r"mask of gone is empty, or nothing is left of it after .* cropped it"):
        model.teach(read_image(taught), (torch.arange(SIZE[0]) < 40)[:, None].expand(SIZE), "gone")
