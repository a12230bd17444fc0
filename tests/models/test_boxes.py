"""Boxes around defects instead of masks: what is taken from within a box, and that training takes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pandas import DataFrame
from PIL import Image

from anomalib_exdd import KSDD2, DefectFolder, ExDD
from anomalib_exdd.models.exdd.patches import BoxedImage, outstanding_patches

Make = Callable[..., Any]


def test_patches_of_each_box() -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[0:16, 0:16] = True  # four cells
    mask[20:23, 20] = True  # less than a cell
    boxes = BoxedImage.of(mask, (4, 4), 0.25, None).patches
    assert [box.nonzero().flatten().tolist() for box in boxes] == [[0, 1, 4, 5], [10]]


def test_a_patch_is_taken_if_it_stands_out_in_its_box() -> None:
    distances = torch.tensor([0.1, 5.0, 0.2, 4.0, 3.0, 0.3, 9.0, 0.2])
    boxes = torch.zeros(3, 8, dtype=torch.bool)
    boxes[0, [0, 1, 2, 3, 4]] = True
    boxes[1, [5, 7]] = True  # nothing stands out: the farthest
    boxes[2, [4, 5]] = True  # overlaps both
    assert outstanding_patches(distances, boxes, usual=3.5).nonzero().flatten().tolist() == [1, 3, 4, 5]
    assert outstanding_patches(distances, boxes, usual=9.5).nonzero().flatten().tolist() == [1, 4, 5]
    assert outstanding_patches(distances, boxes, usual=0.0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_the_outline_is_that_of_the_patches_taken() -> None:
    """Cells know where they are: what is taken, what lies beside the box, and nothing else of the box."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:48, 16:48] = True  # four of 4 x 4 patches, 16 cells of 4 x 4 pixels each
    place = torch.arange(256, dtype=torch.float32).reshape(1, 16, 16)
    boxed = BoxedImage.of(mask, (4, 4), 0.25, place)
    assert boxed.patches.nonzero()[:, 1].tolist() == [5, 6, 9, 10]
    taken = torch.zeros(16, dtype=torch.bool)
    taken[6] = True
    outline = boxed.outline(taken)
    assert outline is not None
    found = outline.features.flatten().int()
    assert found[outline.defective].tolist() == [16 * y + x for y in range(4, 8) for x in range(8, 12)]
    outside = [16 * y + x for y in range(16) for x in range(16) if not (4 <= y < 12 and 4 <= x < 12)]
    assert sorted(found[~outline.defective].tolist()) == outside
    assert boxed.outline(taken & False) is None
    assert BoxedImage.of(mask, (4, 4), 0.25, None).outline(taken) is None


class BoxesAsMasks(DefectFolder):
    """Does not tell that boxes are boxes."""

    def read_samples(self) -> DataFrame:
        return super().read_samples().assign(has_boxes=False)


class FirstDefectBoxed(KSDD2):
    """Tells that the mask of one defective image has boxes."""

    def read_samples(self) -> DataFrame:
        samples = super().read_samples()
        first = samples.image_path[(samples.label_index == 1) & (samples.split == "train")].min()
        return samples.assign(has_boxes=samples.image_path == first)


def boxed_data(root: Path, kind: type[DefectFolder] = DefectFolder) -> DefectFolder:
    data = kind(root=root, normal="good", masks="labels", train_batch_size=4, num_workers=0)
    data.setup()
    return data


@pytest.fixture
def boxed_parts(sample_root: Path, tmp_path: Path) -> Path:
    """The sample's training images, with a generous box around each defect in files of YOLO."""
    root = tmp_path / "parts"
    (root / "labels").mkdir(parents=True)
    (root / "good").mkdir()
    for path in sorted((sample_root / "train").glob("?????.png")):
        mask = np.asarray(Image.open(path.with_name(f"{path.stem}_GT.png"))) > 0
        if not mask.any():
            (root / "good" / path.name).write_bytes(path.read_bytes())
            continue
        (root / path.name).write_bytes(path.read_bytes())
        rows, columns = mask.nonzero()
        height, width = mask.shape
        top, bottom = max(0, rows.min() - 20) / height, min(height, rows.max() + 21) / height
        left, right = max(0, columns.min() - 20) / width, min(width, columns.max() + 21) / width
        label = f"0 {(left + right) / 2} {(top + bottom) / 2} {right - left} {bottom - top}"
        (root / "labels" / f"{path.stem}.txt").write_text(label)
    return root


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_boxes_train_as_boxes(
    store: str, boxed_parts: Path, sample_root: Path, small_model: Make, engine: Make, tmp_path: Path
) -> None:
    """Compared with brute force: farther from the bank than usual, and within the box; at least the farthest."""
    data = boxed_data(boxed_parts)
    settings = {"backbone": "filter_bank", "image_size": (316, 112), "positive_minimum": 10_000, "min_coverage": 0.25}
    model: ExDD = small_model(**settings, feature_store=store, feature_store_dir=tmp_path / "stores")
    engine().fit(model=model, datamodule=data)
    negative, positive = model.model.negative_bank, model.model.positive_bank
    train = data.train_data.samples
    assert set(positive.sources) == set(train[train.label_index == 1].image_path)

    def distances(dataset: Any, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Distance of every patch to the entries of other images, its features, and whether it is in the box."""
        item = dataset[row]
        image, mask = model.pre_processor.transform(item.image, item.gt_mask)
        with torch.no_grad():
            features, _ = model.model.extract(image[None])
        patches = features[0].flatten(1).T
        grid = features.shape[-2:]
        others = torch.tensor([source != item.image_path for source in negative.sources])[negative.source]
        covered = torch.nn.functional.adaptive_avg_pool2d(mask[None].float(), grid).flatten() >= 0.25
        return torch.cdist(patches, negative.vectors[others]).amin(dim=1), patches, covered

    dataset = data.train_data
    farthest = sorted(
        float(distances(dataset, row)[0].max()) for row in range(len(dataset)) if not dataset.samples.label_index[row]
    )
    usual = farthest[(len(farthest) - 1) // 2]
    stood_out = 0
    for row in range(len(dataset)):
        if not dataset.samples.label_index[row]:
            continue
        distance, patches, covered = distances(dataset, row)
        expected = covered & (distance > usual)
        stood_out += int(expected.sum())
        expected[torch.where(covered, distance, -1).argmax()] = True
        taken = positive.features[positive.source == positive.sources.index(dataset.samples.image_path[row])].float()
        assert len(taken) == int(expected.sum()) < int(covered.sum())
        assert float(torch.cdist(patches[expected], taken).amin(dim=0).max()) < 0.05  # half precision on disk
    assert stood_out > 10


def test_most_of_what_is_taken_is_defect(boxed_parts: Path, sample_root: Path, small_model: Make, engine: Make) -> None:
    """By the true masks, nearly all of the patches taken, and far fewer of all in the boxes."""
    share = {}
    for kind in (DefectFolder, BoxesAsMasks):
        data = boxed_data(boxed_parts, kind)
        model = small_model(backbone="filter_bank", image_size=(316, 112), positive_minimum=10_000)
        engine().fit(model=model, datamodule=data)
        bank = model.model.positive_bank
        on_defect = []
        for source, (y, x) in zip(bank.source.tolist(), bank.position.tolist(), strict=True):
            path = sample_root / "train" / f"{Path(bank.sources[source]).stem}_GT.png"
            mask = np.asarray(Image.open(path).resize((112, 316), Image.Resampling.NEAREST)) > 0
            on_defect.append(bool(mask[max(0, y - 8) : y + 9, max(0, x - 8) : x + 9].any()))
        share[kind] = np.mean(on_defect)
    assert share[DefectFolder] > 0.9
    assert share[BoxesAsMasks] < 0.6


def test_masks_in_the_same_data_stay_masks(sample_root: Path, small_model: Make, engine: Make) -> None:
    """A mask gives the patches that it covers, whether or not other images have boxes."""
    patches = {}
    for kind in (KSDD2, FirstDefectBoxed):
        model = small_model(positive_minimum=10_000)
        engine().fit(model=model, datamodule=kind(sample_root, num_workers=0))
        bank, kept = model.model.positive_bank, model.model.calibration_set
        patches[kind] = {path: int((bank.source == row).sum()) for row, path in enumerate(bank.sources)}
        first = min(bank.sources)
        assert {kept.sources[row] for row in kept.outline_image} == set(bank.sources)
    assert patches[KSDD2].pop(first) >= patches[FirstDefectBoxed].pop(first) >= 1
    assert patches[KSDD2] == patches[FirstDefectBoxed]
