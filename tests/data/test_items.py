"""Kinds of defects in items and batches, on their way through loaders."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from lightning.fabric.utilities import move_data_to_device
from reading_back import ready_folder

from anomalib_exdd.data.dataset import DefectBatch, DefectItem
from made_up_images import save_image


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    for number in range(5):
        save_image(tmp_path / "good" / f"{number}.png")
        save_image(tmp_path / "bad" / ("scratch" if number % 2 else "dent") / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_say_of_which_kind_defects_are(kinds: Path, num_workers: int) -> None:
    data = ready_folder(kinds, normal="good", defective="bad", test_split_ratio=0.4)
    data.num_workers, data.train_batch_size, data.eval_batch_size = num_workers, 2, 3
    for loader in (data.train_dataloader(), data.test_dataloader()):
        seen = {path: kind for batch in loader for path, kind in zip(batch.image_path, batch.kinds, strict=True)}
        expected = {path: Path(path).parent.name.replace("good", "") for path in loader.dataset.samples.image_path}
        assert seen == expected
        assert {"scratch", "dent", ""} >= set(seen.values()) > {""}


def batch(*kinds: str) -> DefectBatch:
    items = [DefectItem(image=torch.zeros(3, 4, 4), gt_label=torch.tensor(1)) for _ in kinds]
    for item, kind in zip(items, kinds, strict=True):
        item.kind = kind
    return DefectBatch.collate(items)


def test_kinds_survive_what_happens_to_a_batch() -> None:
    kinds = ["dent", "", "scratch"]
    given = batch(*kinds)
    for other in (
        given,
        pickle.loads(pickle.dumps(given)),  # noqa: S301 (from a worker process)
        copy.deepcopy(given),
        move_data_to_device(given, torch.device("meta")),
        given.update(in_place=False, pred_score=torch.zeros(3)),
        DefectBatch.collate(given.items),
        given.update(pred_score=torch.zeros(3)),
    ):
        assert other.kinds == kinds
        assert [item.kind for item in other] == kinds


def test_nothing_is_known_of_other_items() -> None:
    item = ImageItem(image=torch.zeros(3, 4, 4), gt_label=torch.tensor(1))
    assert DefectBatch.collate([item, item]).kinds == ["", ""]
    assert [item.kind for item in DefectBatch(image=torch.zeros(2, 3, 4, 4))] == ["", ""]


def test_anomalib_sees_ordinary_batches() -> None:
    given = batch("dent", "")
    assert ImageBatch.collate(given.items).image.shape == given.image.shape
    assert given.to_numpy().gt_label.tolist() == [1, 1]
