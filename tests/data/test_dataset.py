import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib import TaskType
from anomalib.data import ImageBatch, ImageItem
from anomalib.data.utils import read_image as read_with_anomalib
from lightning.fabric.utilities import move_data_to_device
from pandas import DataFrame
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from anomalib_exdd.data import DefectDataset
from anomalib_exdd.data.dataset import DefectBatch
from anomalib_exdd.images.masks import read_mask
from anomalib_exdd.images.reading import read_image
from made_up_images import SIZE, save_image, save_mask
from reading_back import ready_folder


def table(*rows: tuple[Path, Path | str, int]) -> DataFrame:
    return DataFrame(
        [
            {"image_path": str(image), "mask_path": str(mask), "label_index": label, "split": "train"}
            for image, mask, label in rows
        ],
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save_image(tmp_path / "b.png"), save_mask(tmp_path / "b_mask.png", defect=True)


def test_item_of_a_defective_image(pair: tuple[Path, Path]) -> None:
    item = DefectDataset(table((*pair, 1)))[0]

    assert item.image.shape == (3, *SIZE)
    assert item.image.dtype == torch.float32
    assert torch.allclose(item.image.as_subclass(torch.Tensor), torch.tensor(90 / 255))
    assert type(item.gt_mask) is Mask
    assert item.gt_mask.dtype == torch.bool
    assert item.gt_mask.nonzero().tolist() == [[6, 1], [6, 2]]
    assert bool(item.gt_label)
    assert (item.image_path, item.mask_path) == tuple(map(str, pair))


def test_kinds_are_read_from_the_table(pair: tuple[Path, Path], tmp_path: Path) -> None:
    samples = table((*pair, 1), (save_image(tmp_path / "c.png"), "", 0))
    assert [item.kind for item in DefectDataset(samples)] == ["", ""]
    dataset = DefectDataset(samples.assign(kind=["dent", ""]))
    assert [item.kind for item in dataset] == ["dent", ""]
    assert DefectBatch.collate(list(dataset)).kinds == ["dent", ""]
    assert sorted((dataset + DefectDataset(samples.iloc[:1])).samples.kind) == ["", "", "dent"]


def test_normal_images_have_masks_of_zeros_in_segmentation(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dataset = DefectDataset(table((*pair, 1), (save_image(tmp_path / "a.png"), "", 0)))
    batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn)))

    assert dataset.task == TaskType.SEGMENTATION
    assert batch.gt_label.tolist() == [False, True]  # sorted by path
    assert batch.gt_mask.shape == (2, *SIZE)
    assert batch.gt_mask.flatten(1).sum(1).tolist() == [0, 2]


def test_one_defect_without_mask_makes_it_classification(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dataset = DefectDataset(table((*pair, 1), (save_image(tmp_path / "c.png"), "", 1)), augmentations=v2.Resize((4, 4)))
    batch = DefectBatch.collate([dataset[0], dataset[1]])

    assert dataset.task == TaskType.CLASSIFICATION
    assert batch.gt_mask is None
    assert batch.gt_label.tolist() == [True, True]
    assert batch.image.shape == (2, 3, 4, 4)


def test_task_after_concatenation_with_a_data_set_without_masks(pair: tuple[Path, Path], tmp_path: Path) -> None:
    both = DefectDataset(table((*pair, 1))) + DefectDataset(table((save_image(tmp_path / "c.png"), "", 1)))
    assert both.task == TaskType.CLASSIFICATION
    assert both.subsample([0]).task == TaskType.SEGMENTATION


def test_thin_defect_survives_resize_and_collation(tmp_path: Path) -> None:
    def long_thin(name: str, size: tuple[int, int]) -> tuple[Path, Path, int]:
        mask = np.zeros(size, dtype=np.uint8)
        mask[:, 5] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
        return save_image(tmp_path / f"{name}.png", size), tmp_path / f"{name}_mask.png", 1

    dataset = DefectDataset(table(long_thin("a", (60, 90)), long_thin("b", (100, 40))))
    resized = DefectDataset(dataset.samples, augmentations=v2.Compose([v2.Resize((8, 8))]))

    # Anomalib resizes to (100, 40): column 5 of 90 falls between two
    unequal = DefectBatch.collate([dataset[0], dataset[1]])
    assert unequal.image.shape == (2, 3, 100, 40)
    assert unequal.gt_mask.flatten(1).any(1).all()
    assert all(resized[index].gt_mask.any() for index in range(2))


def pixels_16_bit() -> np.ndarray:
    return np.array([[0, 255, 256], [30000, 65534, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_instead_of_clipped(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(pixels_16_bit()).save(tmp_path / f"deep{suffix}")
    image = read_image(tmp_path / f"deep{suffix}")

    expected = torch.from_numpy(pixels_16_bit().astype(np.float32) / 65535)
    for channel in image.as_subclass(torch.Tensor):
        assert torch.allclose(channel, expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(tmp_path / "image.tif")
    image = read_image(tmp_path / "image.tif")

    assert image.shape == (3, 4, 5)
    assert torch.allclose(image.as_subclass(torch.Tensor), torch.tensor(1.0))


def test_8_bit_image_reads_as_in_anomalib(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert torch.equal(read_image(tmp_path / "image.png"), read_with_anomalib(tmp_path / "image.png", as_tensor=True))


@pytest.mark.parametrize(("pixels", "words"), [(70000, "16 bits"), (-1, "16 bits"), (1.5, "between 0 and 1")])
def test_numbers_of_unknown_scale_are_refused(tmp_path: Path, pixels: float, words: str) -> None:
    dtype = np.float32 if isinstance(pixels, float) else np.int32
    Image.fromarray(np.full((2, 2), pixels, dtype=dtype)).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=rf"odd\.tif.*{words}"):
        read_image(tmp_path / "odd.tif")


@pytest.mark.parametrize("value", [1, 38, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_any_pixel_that_is_not_black_is_defect(tmp_path: Path, mode: str, value: int) -> None:
    pixels = np.zeros((4, 5), dtype=np.uint16 if mode == "I;16" else np.uint8)
    pixels[2, 3] = value
    if mode in {"RGB", "RGBA"}:
        blue = np.zeros((4, 5, 3), dtype=np.uint8)
        blue[..., 2] = pixels  # blue of 1 has no brightness at all
        image = Image.fromarray(blue).convert(mode)
    elif mode == "P":
        image = Image.fromarray(pixels, mode="P")
        image.putpalette([0, 0, 0] + [0, 0, 1] * 255)
    else:
        image = Image.fromarray(pixels)
    image.save(tmp_path / "mask.png")

    mask = read_mask(tmp_path / "mask.png")

    assert mask.dtype == torch.uint8
    assert mask.nonzero().tolist() == [[2, 3]]
    assert int(mask.max()) == 1


def test_binary_mask(tmp_path: Path) -> None:
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "mask.png")
    assert torch.equal(read_mask(tmp_path / "mask.png").as_subclass(torch.Tensor), torch.eye(4, dtype=torch.uint8))


def test_noise_of_a_jpeg_mask_is_no_defect(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[9:17, 9:17] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.jpg", quality=60)
    assert (np.asarray(Image.open(tmp_path / "mask.jpg")) > 0).sum() > 64, "the test needs compression noise"
    assert np.array_equal(read_mask(tmp_path / "mask.jpg").numpy() > 0, pixels > 0)


def truncated(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue()[:2000])


@pytest.mark.parametrize("broken", ["image", "mask"])
@pytest.mark.parametrize("how", [truncated, lambda path: path.write_text("not an image"), lambda path: path.unlink()])
def test_unreadable_file_is_named(pair: tuple[Path, Path], broken: str, how: Any) -> None:
    dataset = DefectDataset(table((*pair, 1)))
    path = pair[0] if broken == "image" else pair[1]
    how(path)
    with pytest.raises(ValueError, match=rf"The {broken} `.*{path.name}`"):
        dataset[0]


def test_mask_of_another_size_is_named(pair: tuple[Path, Path]) -> None:
    save_mask(pair[1], defect=True, size=(12, 9))
    with pytest.raises(ValueError, match=r"b_mask\.png` is 9 x 12 pixels.*b\.png` is 8 x 12"):
        DefectDataset(table((*pair, 1)))[0]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_masks_are_drawn_on_the_turned_photo(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.zeros((24, 40), dtype=np.uint8)
    stored[:8, 8:24] = 255
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as image:
        ImageOps.exif_transpose(image).save(tmp_path / "photo_mask.png", exif=b"")  # as a labelling tool shows it
    item = DefectDataset(table((tmp_path / "photo.png", tmp_path / "photo_mask.png", 1)))[0]
    assert torch.equal(item.gt_mask, item.image[0] > 0)
    assert item.gt_mask.sum() == 8 * 16
    save_mask(tmp_path / "photo_mask.png", defect=True, size=item.image.shape[:0:-1])
    with pytest.raises(ValueError, match="EXIF"):
        DefectDataset(table((tmp_path / "photo.png", tmp_path / "photo_mask.png", 1)))[0]


@pytest.fixture
def kind_folders(tmp_path: Path) -> Path:
    for number in range(5):
        save_image(tmp_path / "good" / f"{number}.png")
        save_image(tmp_path / "bad" / ("scratch" if number % 2 else "dent") / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_say_of_which_kind_defects_are(kind_folders: Path, num_workers: int) -> None:
    data = ready_folder(kind_folders, normal="good", defective="bad", test_split_ratio=0.4)
    data.num_workers, data.train_batch_size, data.eval_batch_size = num_workers, 2, 3
    for loader in (data.train_dataloader(), data.test_dataloader()):
        seen = {path: kind for batch in loader for path, kind in zip(batch.image_path, batch.kinds, strict=True)}
        expected = {path: Path(path).parent.name.replace("good", "") for path in loader.dataset.samples.image_path}
        assert seen == expected
        assert {"scratch", "dent", ""} >= set(seen.values()) > {""}


def batch_of(*kinds: str) -> DefectBatch:
    items = [ImageItem(image=torch.zeros(3, 4, 4), gt_label=torch.tensor(1)) for _ in kinds]
    for item, kind in zip(items, kinds, strict=True):
        item.kind = kind
    return DefectBatch.collate(items)


def test_kinds_survive_what_happens_to_a_batch() -> None:
    kinds = ["dent", "", "scratch"]
    given = batch_of(*kinds)
    for other in (
        given,
        pickle.loads(pickle.dumps(given)),  # noqa: S301 (from a worker process)
        copy.deepcopy(given),
        move_data_to_device(given, torch.device("meta")),
        given.update(pred_score=torch.zeros(3)),
    ):
        assert other.kinds == kinds


def test_nothing_is_known_of_other_items() -> None:
    item = ImageItem(image=torch.zeros(3, 4, 4), gt_label=torch.tensor(1))
    batch = DefectBatch.collate([item, item])
    assert (batch.origins, batch.kinds, batch.has_boxes) == ([[], []], ["", ""], [False, False])


def test_anomalib_sees_ordinary_batches() -> None:
    given = batch_of("dent", "")
    assert ImageBatch.collate(given.items).image.shape == given.image.shape
    assert given.to_numpy().gt_label.tolist() == [1, 1]
