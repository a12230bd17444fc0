"""Changing the banks of a trained model, and explaining what they say."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.callbacks.checkpoint import save_changed
from anomalib_exdd.models.exdd.bank_editing import SourceInfo, kinds_summary
from anomalib_exdd.models.exdd.explanation_pictures import draw_explanation, save_explanation
from anomalib_exdd.models.exdd.memory_bank import BankContent, MemoryBank
from anomalib_exdd.models.exdd.patches import patch_centres
from small import SMALL

Make = Callable[..., Any]


@pytest.fixture
def model(trained: tuple[ExDD, Path]) -> ExDD:
    """A copy of the trained model that a test may change."""
    changed: ExDD = ExDD.load_from_checkpoint(trained[1], map_location="cpu").eval()
    return changed


@pytest.fixture(scope="module")
def defect(sample_root: Path) -> tuple[Tensor, Tensor, str]:
    """A defective test image, its mask and its path."""
    data = KSDD2(sample_root, num_workers=0)
    data.setup()
    samples = data.test_data.samples
    index = int(np.flatnonzero(samples.label_index == 1)[0])
    item = data.test_data[index]
    return torch.Tensor(item.image), torch.as_tensor(item.gt_mask), str(samples.image_path.iloc[index])


def state(model: ExDD) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-7, msg=name)


def test_info_lists_every_image_of_both_banks(model: ExDD) -> None:
    info = model.info()
    for name, bank in (("negative", model.model.negative_bank), ("positive", model.model.positive_bank)):
        ours = [each for each in info if each.bank == name]
        assert {each.source for each in ours} == set(bank.sources)
        assert sum(each.entries for each in ours) == len(bank)
        assert [each.entries for each in ours] == sorted((each.entries for each in ours), reverse=True)


def test_what_is_taught_is_known_afterwards(model: ExDD, defect: tuple[Tensor, Tensor, str]) -> None:
    image, mask, path = defect
    before, weights = len(model.model.positive_bank), model.model.calibration.training_probability.clone()
    added = model.teach(image, mask, path)
    bank = model.model.positive_bank
    assert added >= 1
    assert len(bank) == before + added
    assert bank.sources[-1] == path
    assert (bank.source == len(bank.sources) - 1).sum() == added
    # What is in the bank are the patches that training would have seen there, at their positions.
    pre_processed = model.pre_processor.transform(image[None])  # type: ignore[union-attr]
    features = model.model.embed(pre_processed)[0].flatten(1).T
    mine = bank.source == len(bank.sources) - 1
    distance, row = torch.cdist(bank.features[mine], features).min(dim=1)
    assert distance.max() < 1e-3
    assert torch.equal(patch_centres((12, 8), (96, 64))[row], bank.position[mine])
    assert {patch.defect.source for patch in model.explain(image, path, 48).patches if patch.defect} >= {path}
    y, x = bank.position[-1].tolist()
    resized = torch.nn.functional.adaptive_max_pool2d(mask.float()[None], (96, 64))[0]
    assert resized[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5].any()
    # The calibration has followed.
    assert path in model.model.calibration_set.sources
    assert len(model.model.calibration.training_probability) == len(weights) + 1


def test_forgetting_undoes_teaching(model: ExDD, defect: tuple[Tensor, Tensor, str]) -> None:
    before = state(model)
    added = model.teach(*defect)
    assert model.forget(Path(defect[2]).name) == added
    assert_same_state(before, state(model))
    assert [change["action"] for change in model.history] == ["teach", "forget"]


def test_teaching_twice_is_teaching_once(model: ExDD, defect: tuple[Tensor, Tensor, str]) -> None:
    model.teach(*defect)
    once = state(model)
    model.teach(*defect)
    assert_same_state(once, state(model))


def test_a_full_bank_takes_a_share_of_a_large_defect(model: ExDD, defect: tuple[Tensor, Tensor, str]) -> None:
    image, mask, path = defect
    added = model.teach(image, torch.ones_like(mask), path)
    assert len(model.model.positive_bank) - added >= SMALL["positive_minimum"]
    assert added == round(0.1 * 12 * 8)


def test_a_kind_is_taught_and_forgotten(model: ExDD, defect: tuple[Tensor, Tensor, str]) -> None:
    bank, path = model.model.positive_bank, defect[2]
    before = dict(bank.kinds)
    added = model.teach(*defect, kind="dent")
    assert bank.kinds == {**before, path: "dent"}
    assert [(each.kind, each.entries) for each in model.info() if each.source == path] == [("dent", added)]
    model.teach(*defect, "crack")
    assert bank.kinds == {**before, path: "crack"}
    model.teach(*defect)
    assert bank.kinds == before
    model.teach(*defect, "dent")
    model.forget(path)
    assert bank.kinds == before
    assert [change.get("kind") for change in model.history] == ["dent", "crack", None, "dent", None]


def test_kinds_are_summed_up() -> None:
    rows = [
        ("positive", "a", 3, "dent"),
        ("positive", "b", 0, "crack"),
        ("positive", "c", 4, ""),
        ("negative", "n", 9, ""),
    ]
    info = [SourceInfo(*row) for row in rows]
    assert kinds_summary(info) == "crack: 0 entries from 1 images; dent: 3 entries from 1 images"
    info.append(SourceInfo("positive", "d", 2, "dent"))
    assert kinds_summary(info) == "dent: 5 entries from 2 images; crack: 0 entries from 1 images"
    assert kinds_summary(info[2:4]) == ""


@pytest.fixture(scope="module")
def good(sample_root: Path) -> tuple[Tensor, str]:
    """A good test image with a bright stripe that no training image has, and its path."""
    path = sample_root / "test" / "20000.png"
    image = torch.Tensor(read_image(path))
    image[:, : image.shape[1] // 4, : image.shape[2] // 4] = 1.0
    return image, str(path)


def test_a_good_part_is_normal_afterwards(model: ExDD, good: tuple[Tensor, str]) -> None:
    bank, before = model.model.negative_bank, state(model)
    batch = model.pre_processor(good[0][None])  # type: ignore[misc]
    features = model.model.embed(batch)[0].flatten(1).T
    entries, first = len(bank), bank.nearest(features).distances[:, 0]
    score = float(model.model(batch).pred_score)
    added = model.teach_good(*good)
    # By hand: patch after patch, that which is farthest from all entries.
    expected, chosen = first.clone(), []
    for _ in range(added):
        chosen.append(int(expected.argmax()))
        expected = torch.minimum(expected, (features - features[chosen[-1]]).norm(dim=1))
    assert added == max(round(SMALL["negative_ratio"] * len(features)), 1)
    assert len(bank) == entries + added
    torch.testing.assert_close(bank.features[entries:], features[chosen])
    assert torch.equal(bank.position[entries:], patch_centres((12, 8), (96, 64))[chosen])
    assert bank.sources[-1] == good[1]
    torch.testing.assert_close(bank.nearest(features).distances[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert float(model.model(batch).pred_score) < score
    # It can be undone.
    model.forget(good[1])
    assert_same_state(before, state(model))
    assert [each["action"] for each in model.history] == ["teach good", "forget"]


def test_a_good_part_is_calibrated_without_its_own_entries(model: ExDD, good: tuple[Tensor, str]) -> None:
    """Its out-of-fold distances are those to the entries of all other images."""
    parts = model.model
    others, count = parts.negative_bank.vectors.clone(), len(parts.calibration.training_probability)
    model.teach_good(*good)
    kept = parts.calibration_set
    row = kept.sources.index(good[1])
    assert not bool(kept.defective[row])
    measured = kept.measure(parts.negative_bank, parts.positive_bank, parts.boundary, parts.folds(0.0))
    assert measured is not None
    mine = kept.image == row
    nearest = torch.cdist(kept.features[mine].float(), others).min(dim=1).values
    torch.testing.assert_close(measured.log_negative[mine, 0].exp().float(), nearest, rtol=1e-3, atol=1e-3)
    assert len(parts.calibration.training_probability) == count + 1


def test_an_image_is_in_one_bank(model: ExDD, defect: tuple[Tensor, Tensor, str]) -> None:
    """Who changes his mind about an image replaces what either bank has of it."""
    image, mask, path = defect
    model.teach(image, mask, path, "dent")
    once = state(model)
    model.teach_good(image, path)
    assert path not in model.model.positive_bank.sources
    assert path in model.model.negative_bank.sources
    assert model.model.calibration_set.sources.count(path) == 1
    model.teach(image, mask, path, "dent")
    assert path not in model.model.negative_bank.sources
    assert_same_state(once, state(model))


@pytest.mark.parametrize("kind", ["negative_bank", "positive_bank"])
def test_forgetting_an_image_leaves_nothing_of_it(model: ExDD, kind: str) -> None:
    bank: MemoryBank = getattr(model.model, kind)
    source = bank.sources[int(bank.source[0])]
    kept = bank.features[bank.source != bank.source[0]].clone()
    dropped = model.forget(source)
    assert dropped == len(bank.features) + dropped - len(kept)
    assert torch.equal(bank.features, kept)
    assert source not in bank.sources
    assert source not in model.model.calibration_set.sources
    assert bank.source.max() < len(bank.sources)


def test_without_the_last_defect_it_works_with_normal_images(model: ExDD) -> None:
    for source in list(model.model.positive_bank.sources):
        model.forget(source)
    assert len(model.model.positive_bank) == 0
    scores = model.model(torch.randn(2, 3, 96, 64))
    assert torch.isfinite(scores.pred_score).all()
    assert not model.model.calibration.known_weights.any()
    assert not model.model.boundary.is_fitted


def test_mistakes_are_named(model: ExDD, defect: tuple[Tensor, Tensor, str]) -> None:
    image, mask, path = defect
    with pytest.raises(ValueError, match="is empty"):
        model.teach(image, torch.zeros_like(mask), path)
    with pytest.raises(ValueError, match=r"Give a mask of the image's size"):
        model.teach(image, mask[1:], path)
    with pytest.raises(ValueError, match=r"No image in the banks is called nobody\.png.*anomalib info"):
        model.forget("nobody.png")
    bank = model.model.negative_bank
    bank.sources = ["/a/1.png", "/b/1.png", *bank.sources[2:]]
    with pytest.raises(ValueError, match=r"2 images in the banks are called 1\.png"):
        model.forget("1.png")
    bank.fill(BankContent(bank.features, torch.zeros_like(bank.source), bank.position, ["/only.png"]))
    with pytest.raises(ValueError, match="only image in the negative bank"):
        model.forget("only.png")


def test_a_changed_checkpoint_loads_and_remembers(
    model: ExDD, trained: tuple[ExDD, Path], defect: tuple[Tensor, Tensor, str], tmp_path: Path
) -> None:
    model.teach(*defect, kind="dent")
    written = save_changed(model, trained[1], tmp_path / "new" / "model.ckpt")
    assert [path.name for path in written.parent.iterdir()] == ["model.ckpt"]
    loaded = ExDD.load_from_checkpoint(written, map_location="cpu").eval()
    assert_same_state(state(model), state(loaded))
    assert loaded.history == model.history
    assert loaded.model.positive_bank.kinds == model.model.positive_bank.kinds
    assert loaded.model.positive_bank.kinds[defect[2]] == "dent"
    images = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(loaded.model(images).pred_score, model.model(images).pred_score, rtol=1e-5, atol=0)


def test_a_checkpoint_that_cannot_be_written_stays_as_it_was(
    model: ExDD, trained: tuple[ExDD, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.ckpt"
    target.write_bytes(trained[1].read_bytes())
    before = target.read_bytes()

    def break_down(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr(torch, "save", break_down)
    with pytest.raises(OSError, match="disk full"):
        save_changed(model, target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


class TestExplanation:
    def test_neighbours_are_the_nearest_of_their_banks(
        self, trained: tuple[ExDD, Path], defect: tuple[Tensor, Tensor, str]
    ) -> None:
        model = trained[0]
        explanation = model.explain(defect[0], defect[2], 4)
        batch = model.pre_processor(defect[0][None])  # type: ignore[misc]
        features = model.model.embed(batch)[0]
        scores = model.model.score(features.flatten(1).T[None])[0][0].reshape(12, 8)
        assert explanation.patches[0].score == pytest.approx(float(scores.max()), rel=1e-5)
        cells = [(patch.row // 8, patch.column // 8) for patch in explanation.patches]
        for patch, (row, column) in zip(explanation.patches, cells, strict=True):
            assert patch.score == pytest.approx(float(scores[row, column]), rel=1e-4)
            for near, bank in ((patch.normal, model.model.negative_bank), (patch.defect, model.model.positive_bank)):
                assert near is not None
                distances = torch.cdist(features[:, row, column][None], bank.features)[0]
                entry = int(distances.argmin())
                assert near.distance == pytest.approx(float(distances.min()), rel=1e-3)
                assert near.source == bank.sources[int(bank.source[entry])]
                assert [near.row, near.column] == bank.position[entry].tolist()
        for index, (row, column) in enumerate(cells):  # never two neighbours
            assert all(max(abs(row - r), abs(column - c)) > 2 for r, c in cells[:index])

    def test_heat_maps_of_all_images_share_one_scale(self, trained: tuple[ExDD, Path]) -> None:
        """The map's level is the calibration's probability: a good image is not stretched to red."""
        model = trained[0]
        image = torch.rand(3, 96, 64, generator=torch.Generator().manual_seed(0))
        batch = model.pre_processor(image[None])  # type: ignore[misc]
        found = model.explain(image, "made up", 1).heat_map
        expected = torch.sigmoid(model.model(batch).anomaly_map[0, 0])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def test_it_is_told_in_words_and_drawn(
        self, trained: tuple[ExDD, Path], defect: tuple[Tensor, Tensor, str], tmp_path: Path
    ) -> None:
        explanation = trained[0].explain(defect[0], defect[2], 2)
        text = str(explanation)
        assert defect[2] in text
        assert explanation.decision is not None
        assert explanation.decision in text
        assert explanation.patches[0].normal.source in text
        picture = save_explanation(explanation, tmp_path)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png"]
        with Image.open(picture) as image:
            assert image.width > 2 * 200 + 3 * 160

    def test_it_is_drawn_without_the_data_folder(
        self, trained: tuple[ExDD, Path], defect: tuple[Tensor, Tensor, str]
    ) -> None:
        model = copy.deepcopy(trained[0])
        for bank in (model.model.negative_bank, model.model.positive_bank):
            bank.sources = [f"/gone{path}" for path in bank.sources]
        there = draw_explanation(trained[0].explain(defect[0], defect[2], 1))
        gone = draw_explanation(model.explain(defect[0], defect[2], 1))
        assert there.size == gone.size
        assert there.tobytes() != gone.tobytes()

    def test_it_is_drawn_of_images_of_every_kind(self, trained: tuple[ExDD, Path], tmp_path: Path) -> None:
        """Of turned and of 16-bit images as of plain ones."""
        pixels = np.random.default_rng(0).integers(0, 256, (192, 128), dtype=np.uint8)
        exif = Image.Exif()
        exif[274] = 3
        Image.fromarray(pixels).save(tmp_path / "plain.png")
        Image.fromarray(pixels[::-1, ::-1].astype(np.uint16) * 257).save(tmp_path / "turned.png", exif=exif)
        drawn = [
            draw_explanation(trained[0].explain(read_image(path), str(path), 1)) for path in sorted(tmp_path.iterdir())
        ]
        assert np.abs(np.subtract(*(np.asarray(picture, dtype=np.int16) for picture in drawn))).mean() < 0.5

    def test_a_model_without_defects_explains_by_normal_patches(self, model: ExDD) -> None:
        for source in list(model.model.positive_bank.sources):
            model.forget(source)
        explanation = model.explain(torch.rand(3, 100, 70), "made up", 1)
        assert explanation.patches[0].defect is None
        assert "nearest defect" not in str(explanation)
        assert draw_explanation(explanation).width > 0
