"""Photos to predict: broken files, masks beside images, deep images, and how much is read ahead."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms.v2 import Resize

from anomalib_exdd.images import predict_loader
from anomalib_exdd.images.predict_loader import PredictLoader, leave_out_masks, replace_loader
from made_up_images import save_image, save_mask, save_pairs


def broken(path: Path) -> Path:
    path.write_bytes(b"no image")
    return path


def names_of(batches: Sequence[ImageBatch]) -> list[list[str]]:
    return [[Path(path).name for path in batch.image_path] for batch in batches]


def loader_of(dataset: PredictDataset, **arguments: object) -> DataLoader:
    return DataLoader(dataset, collate_fn=dataset.collate_fn, **arguments)  # type: ignore[arg-type]


def test_reads_what_anomalib_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, mode in enumerate(("RGB", "L", "RGBA", "P")):
        pixels = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{number}.png")
    dataset = PredictDataset(tmp_path)
    ours = replace_loader(loader_of(dataset, batch_size=3))
    assert isinstance(ours, PredictLoader)
    assert len(ours) == 2
    for found, expected in zip(ours, loader_of(dataset, batch_size=3), strict=True):
        assert found.image_path == expected.image_path
        assert torch.equal(found.image, expected.image)


def test_broken_files_are_left_out_and_told(tmp_path: Path) -> None:
    files = [save_image(tmp_path / f"{number}.png") for number in range(5)]
    for number in (0, 3, 4):
        broken(files[number])
    loader = PredictLoader(files, batch_size=2)
    for _ in range(2):  # every time anew
        assert names_of(list(loader)) == [["1.png", "2.png"]]
        told = loader.take_unreadable()
        assert [Path(file.path).name for file in told] == ["0.png", "3.png", "4.png"]
        assert all(file.path in file.reason and "\n" not in file.reason for file in told)
        assert loader.take_unreadable() == []


def test_deep_images_keep_their_values(tmp_path: Path) -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (batch,) = PredictLoader([tmp_path / "deep.png"])
    assert torch.allclose(batch.image[0, 1], torch.arange(256).reshape(16, 16) / 255)


def test_reads_only_a_few_photos_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [save_image(tmp_path / f"{number:02d}.png") for number in range(40)]
    read: list[Path] = []
    original = predict_loader.read_image

    def counting(path: Path, *arguments: int) -> torch.Tensor:
        read.append(path)
        return original(path, *arguments)

    monkeypatch.setattr(predict_loader, "read_image", counting)
    monkeypatch.setattr(predict_loader.os, "cpu_count", lambda: 64)
    for number, _ in enumerate(PredictLoader(files), start=1):
        assert len(read) <= number + predict_loader.READING_THREADS
    assert sorted(read) == files


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_photos(tmp_path: Path, processes: int) -> None:
    files = [save_image(tmp_path / f"{number}.png") for number in range(5)]
    shares = [PredictLoader(files, 2, (rank, processes)) for rank in range(processes)]
    assert [path for share in shares for path in share.files] == files
    for share in shares:
        batches = list(share)
        assert len(share) == max(1, len(batches))
        assert [name for names in names_of(batches) for name in names] == [path.name for path in share.files]


def test_masks_beside_their_images_are_left_out(tmp_path: Path) -> None:
    ids = save_pairs(tmp_path, 10000, [True, False, True])
    images, masks = leave_out_masks(sorted(tmp_path.iterdir()))
    assert [path.stem for path in images] == ids
    assert [path.stem for path in masks] == [f"{name}_GT" for name in ids]
    assert leave_out_masks(masks) == (masks, [])  # without images beside them they are images


def test_what_only_bears_the_name_of_a_mask_is_predicted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    save_image(tmp_path / "part.png")
    Image.fromarray(rng.integers(0, 256, (12, 8), dtype=np.uint8)).save(tmp_path / "part_label.png")  # a grey photo
    red = np.zeros((12, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "part_seg.png")
    save_mask(tmp_path / "part_mask.png", defect=True, size=(6, 8))  # of another size
    broken(tmp_path / "part_gt.png")
    save_mask(tmp_path / "other_mask.png", defect=True)  # of no image
    files = sorted(tmp_path.iterdir())
    assert leave_out_masks(files) == (files, [])


def test_masks_of_any_kind_are_recognised(tmp_path: Path) -> None:
    save_image(tmp_path / "part.jpg")
    mask = np.zeros((12, 8), dtype=np.uint8)
    mask[4:8, 2:5] = 255
    Image.fromarray(mask).convert("1").save(tmp_path / "part_mask.png")
    Image.fromarray(mask).convert("RGBA").save(tmp_path / "part-gt.png")
    grey = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)  # under what is transparent
    layer = np.where(mask[..., None] > 0, np.uint8(255), grey)
    Image.fromarray(np.dstack([layer, mask])).save(tmp_path / "part-seg.png")
    Image.fromarray(mask // 255).save(tmp_path / "part_label.bmp")
    Image.fromarray(mask.astype(np.uint16) * 257).save(tmp_path / "part_seg.png")
    images, masks = leave_out_masks(sorted(tmp_path.iterdir()))
    assert [path.name for path in images] == ["part.jpg"]
    assert len(masks) == 5


def test_transforms_are_applied_in_turn(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", size=(12, 8))
    save_image(tmp_path / "b.png", size=(30, 9))
    dataset = PredictDataset(tmp_path, transform=Resize((6, 6)))
    loader = replace_loader(loader_of(dataset, batch_size=2))
    loader.resize = Resize((5, 4))
    (batch,) = loader
    assert batch.image.shape == (2, 3, 5, 4)


def test_only_anomalibs_own_photos_are_replaced(tmp_path: Path) -> None:
    class Own(PredictDataset):  # type: ignore[misc]
        pass

    save_image(tmp_path / "a.png")
    broken(tmp_path / "._a.png")
    replaced = replace_loader(loader_of(PredictDataset(tmp_path)))
    assert [path.name for path in replaced.files] == ["a.png"]
    dataset = PredictDataset(tmp_path)
    for loader in (loader_of(Own(tmp_path)), loader_of(dataset, sampler=RandomSampler(dataset)), [1, 2]):
        assert replace_loader(loader) is loader
