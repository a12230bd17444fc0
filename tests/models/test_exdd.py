"""Training, checkpoints and predictions of the whole model, through Anomalib's engine."""

import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_exdd import KSDD2, DefectClassifier, ExDD
from anomalib_exdd.models.exdd.memory_bank import BankContent, MemoryBank
from anomalib_exdd.models.exdd.patches import patch_centres
from anomalib_exdd.models.visualization import panel_size
from small import SMALL, batch

Make = Callable[..., Any]


def banks(model: ExDD) -> dict[str, Any]:
    """Return everything that the two banks hold, entries in a canonical order, sources by file name."""
    content = {}
    for name in ("negative_bank", "positive_bank"):
        bank: MemoryBank = getattr(model.model, name)
        order = np.lexsort((bank.position[:, 1], bank.position[:, 0], bank.source))
        sources = [Path(bank.sources[index]).name for index in bank.source[order].tolist()]
        content[name] = (sources, bank.position[order].tolist(), bank.features[order])
    return content


def assert_same_banks(first: ExDD, second: ExDD) -> None:
    for name, (sources, position, features) in banks(first).items():
        others = banks(second)[name]
        assert sources == others[0]
        assert position == others[1]
        assert torch.equal(features, others[2])


def test_training_fills_both_banks_with_their_provenance(trained: tuple[ExDD, Path], sample_root: Path) -> None:
    model = trained[0]
    negative, positive = model.model.negative_bank, model.model.positive_bank
    data = KSDD2(sample_root)
    data.setup()
    train = data.train_data.samples
    normal = set(train[train.label_index == 0].image_path)
    defective = set(train[train.label_index == 1].image_path)
    assert {negative.sources[index] for index in negative.source.tolist()} <= normal
    assert {positive.sources[index] for index in positive.source.tolist()} <= defective
    patches = 12 * 8 * len(normal)
    assert len(negative) == max(20, round(0.1 * patches))
    assert len(positive) >= 20

    # An entry's source and position lead back to its features.
    paths = dict(zip(train.image_path, range(len(train)), strict=True))
    data.train_data.augmentations = Resize((96, 64), antialias=True)
    for bank in (negative, positive):
        for entry in (0, len(bank) // 2, len(bank) - 1):
            item = data.train_data[paths[bank.sources[int(bank.source[entry])]]]
            image = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(item.image)
            features = model.model.embed(image[None])[0].flatten(1).T
            row = patch_centres((12, 8), (96, 64)).tolist().index(bank.position[entry].tolist())
            torch.testing.assert_close(features[row], bank.features[entry], rtol=1e-4, atol=1e-5)
    kinds = dict(zip(train.image_path, train.kind, strict=True))
    assert positive.kinds == {path: kinds[path] for path in positive.sources}
    assert len(set(positive.kinds.values())) > 1
    assert negative.kinds == {}
    for entry in range(len(positive)):  # defect patches lie on or beside a defect
        item = data.train_data[paths[positive.sources[int(positive.source[entry])]]]
        y, x = positive.position[entry].tolist()
        assert item.gt_mask[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5].any()


@pytest.mark.parametrize("changed", [{"train_batch_size": 1}, {"train_batch_size": 5, "num_workers": 2}])
def test_banks_do_not_depend_on_batches_order_or_workers(
    changed: dict[str, Any], small_model: Make, small_data: Make, engine: Make
) -> None:
    models = []
    for arguments in ({}, changed):
        torch.manual_seed(len(models))  # the training images' order
        model = small_model()
        engine().fit(model=model, datamodule=small_data(**arguments))
        models.append(model)
    assert_same_banks(*models)
    first, second = (model.model.calibration for model in models)
    torch.testing.assert_close(first.known_weights, second.known_weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.training_probability, second.training_probability, rtol=1e-3, atol=1e-4)


def test_another_seed_gives_other_banks(small_model: Make, small_data: Make, engine: Make) -> None:
    models = [small_model(seed=seed) for seed in (0, 1)]
    for model in models:
        engine().fit(model=model, datamodule=small_data())
    with pytest.raises(AssertionError):
        assert_same_banks(*models)


def test_scores_do_not_depend_on_the_batch_or_the_backend(trained: tuple[ExDD, Path], sample_root: Path) -> None:
    model = trained[0].model
    data = KSDD2(sample_root, num_workers=0)
    data.setup()
    data.test_data.augmentations = Resize((96, 64), antialias=True)
    images = torch.stack([data.test_data[index].image for index in range(6)])
    expected = model(images)
    for size in (1, 4):
        parts = [model(part) for part in images.split(size)]
        torch.testing.assert_close(torch.cat([p.pred_score for p in parts]), expected.pred_score, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.cat([p.anomaly_map for p in parts]), expected.anomaly_map, rtol=1e-5, atol=0)
    other = copy.deepcopy(model)
    for bank in (other.negative_bank, other.positive_bank):
        bank.search = "torch"
    found = other(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-5, atol=0)


def only_random(create_model: Make) -> Make:
    """Let timm build networks, but not load weights."""

    def create(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        assert not pretrained, "the checkpoint brings the weights"
        return create_model(*args, pretrained=pretrained, **kwargs)

    return create


def test_a_checkpoint_needs_no_network_and_no_file(
    trained: tuple[ExDD, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_model: Make
) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    checkpoint["hyper_parameters"] |= {"pre_trained": True, "weights": None}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    monkeypatch.setattr(timm, "create_model", only_random(timm.create_model))
    loaded = ExDD.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert_same_banks(loaded, trained[0])
    assert loaded.model.negative_bank.sources == trained[0].model.negative_bank.sources
    image = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(image).pred_score, trained[0](image).pred_score, rtol=0, atol=0)


def assert_positive_bank_is_of(model: ExDD, data: KSDD2, count: int) -> None:
    """Assert that the positive bank was built from exactly the defective training images of the data."""
    train = data.train_data.samples
    defective = sorted(train[train.label_index == 1].image_path)
    assert len(defective) == count
    assert model.model.positive_bank.sources == defective


def test_refitting_builds_new_banks(small_model: Make, small_data: Make, engine: Make) -> None:
    model = small_model()
    engine().fit(model=model, datamodule=small_data())
    first = banks(model)
    data = small_data(num_defects=3)
    engine().fit(model=model, datamodule=data)
    sources = set(banks(model)["positive_bank"][0])
    assert 1 <= len(sources) <= 3
    assert_positive_bank_is_of(model, data, 3)
    assert set(first["positive_bank"][0]) - sources


def test_training_from_a_checkpoint_rebuilds_and_tests_the_new_banks(
    trained: tuple[ExDD, Path],
    small_data: Make,
    engine: Make,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timm, "create_model", only_random(timm.create_model))
    model = ExDD()  # as the command line builds it; the backbone's weights come from the checkpoint
    with caplog.at_level(logging.WARNING):
        data = small_data(num_defects=2)
        engine().train(model=model, datamodule=data, ckpt_path=trained[1])
    assert "dropped and built anew" in caplog.text
    assert bool(model.state_dict()["_is_fitted"])
    assert 1 <= len(set(banks(model)["positive_bank"][0])) <= 2
    assert_positive_bank_is_of(model, data, 2)
    # Another checkpoint than the one that training started from is loaded as it is.
    engine().test(model=model, datamodule=small_data(), ckpt_path=trained[1], verbose=False)
    assert 1 <= len(set(banks(model)["positive_bank"][0])) <= 2
    assert_positive_bank_is_of(model, data, 2)
    engine().fit(model=(other := ExDD(**SMALL, seed=5)), datamodule=small_data())
    engine().test(model=other, datamodule=small_data(), ckpt_path=trained[1], verbose=False)
    assert_same_banks(other, trained[0])


def test_without_defects_it_scores_as_normal_and_says_so_once(
    small_model: Make, small_data: Make, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    models = {scoring: small_model(scoring=scoring) for scoring in ("ratio", "normal")}
    with caplog.at_level(logging.WARNING):
        for model in models.values():
            engine().fit(model=model, datamodule=small_data(num_defects=0))
    assert caplog.text.count("no defective training images") == 2  # once for each of the two trainings
    image = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ratio, normal = (model.eval().model(image) for model in models.values())
    assert len(models["ratio"].model.positive_bank) == 0
    assert torch.equal(ratio.pred_score, normal.pred_score)
    assert torch.equal(ratio.anomaly_map, normal.anomaly_map)


def test_defects_without_masks_are_an_error_that_names_the_options(small_model: Make) -> None:
    model = small_model()
    model.on_fit_start()
    with pytest.raises(ValueError, match=r"image1\.png has no mask.*--data\.masks.*--data\.num_defects 0"):
        model.training_step(batch([0, 1], None))
    with pytest.raises(ValueError, match=r"image1\.png is empty"):
        model.training_step(batch([0, 1], torch.zeros(2, 96, 64, dtype=torch.uint8)))


def test_no_normal_images_are_an_error(small_model: Make) -> None:
    model = small_model()
    model.on_fit_start()
    model.training_step(batch([1, 1], torch.ones(2, 96, 64, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="needs normal training images"):
        model.fit()


def test_an_untrained_model_says_so(small_model: Make, small_data: Make, engine: Make) -> None:
    with pytest.raises(ValueError, match=r"memory bank is empty\. Train the model, or load"):
        small_model().model(torch.rand(1, 3, 96, 64))
    with pytest.raises(ValueError, match="memory bank is empty"):
        engine().test(model=small_model(), datamodule=small_data())
    with pytest.raises(RuntimeError, match="no patches to build banks from"):
        small_model().fit()


@pytest.mark.parametrize(
    "arguments",
    [
        {"scoring": "paper"},
        {"scoring": "published"},
        {"scoring": "normal", "image_scoring": "ratio"},
        {"num_neighbors": 1},
        {"num_neighbors": 500},
        {"sigma": 1.5, "scoring": "published"},
        {"min_coverage": 1.0, "projected_dimension": 16},
    ],
)
def test_settings_train_and_find_defects(
    arguments: dict[str, Any], small_model: Make, small_data: Make, engine: Make
) -> None:
    model = small_model(backbone="filter_bank", image_size=(316, 112), **arguments)
    data = small_data()
    engine().fit(model=model, datamodule=data)
    predictions = engine().predict(model=model, datamodule=data)
    maps = torch.cat([prediction.anomaly_map for prediction in predictions])
    masks = torch.cat([prediction.gt_mask for prediction in predictions]).bool()
    scores = torch.cat([prediction.pred_score for prediction in predictions])
    assert maps.shape == masks.shape == (6, 316, 112)
    assert torch.isfinite(scores).all()
    assert maps[masks].mean() > maps[~masks].mean()


def test_layers_and_crops(small_model: Make, small_data: Make, engine: Make) -> None:
    model = small_model(layers=["layer1", "layer2", "layer3"], positive_patches="crop")
    engine().fit(model=model, datamodule=small_data())
    assert model.model.positive_bank.features.shape[1] == 64 + 128 + 256
    predictions = engine().predict(model=model, datamodule=small_data())
    assert all(torch.isfinite(prediction.anomaly_map).all() for prediction in predictions)


def test_pictures_have_the_images_shape(trained: tuple[ExDD, Path], small_data: Make, engine: Make) -> None:
    assert panel_size((632, 224)) == (224, 632)
    model = ExDD(pre_trained=False)
    engine().predict(model=model, datamodule=small_data(), ckpt_path=trained[1])
    assert model.visualizer.field_size == (200, 300)


def test_crops_give_positions_inside_their_boxes(small_model: Make) -> None:
    model = small_model(positive_patches="crop")
    model.on_fit_start()
    masks = torch.zeros(2, 96, 64, dtype=torch.uint8)
    masks[1, 10:30, 20:40] = 1
    masks[1, 70, 50:55] = 1
    model.training_step(batch([0, 1], masks))
    assert model.builder is not None
    assert sum(model.builder.positive.store.lengths.values()) == 2 * 16 * 16
    model.fit()
    positions = model.model.positive_bank.position
    in_first = ((positions >= torch.tensor([9, 19])) & (positions < torch.tensor([31, 41]))).all(1)
    in_second = ((positions >= torch.tensor([69, 49])) & (positions < torch.tensor([72, 56]))).all(1)
    assert (in_first | in_second).all()
    assert in_first.any()
    assert in_second.any()


@pytest.mark.parametrize("scoring", ["calibrated", "paper"])
def test_banks_of_half_precision_score_alike(
    scoring: str, trained: tuple[ExDD, Path], small_model: Make, small_data: Make, engine: Make
) -> None:
    model, data = small_model(bank_precision="float16", scoring=scoring), small_data()
    whole = ExDD.load_from_checkpoint(trained[1], scoring=scoring)
    trainer = engine()
    trainer.fit(model=model, datamodule=data)
    assert model.model.negative_bank.features.dtype == torch.float16
    restored = ExDD.load_from_checkpoint(trainer.best_model_path)
    assert restored.model.positive_bank.features.dtype == torch.float16
    assert restored.model.negative_bank.vectors.dtype == torch.float32
    images = torch.rand(4, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        half, again, full = (each.eval().model(images) for each in (model, restored, whole))
    assert half.pred_score.dtype == half.anomaly_map.dtype == torch.float32
    assert torch.equal(half.pred_score, again.pred_score)
    torch.testing.assert_close(half.pred_score, full.pred_score, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(half.anomaly_map, full.anomaly_map, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("scoring", ["paper", "ratio"])
def test_another_scoring_finds_its_neighbourhoods_in_a_calibrated_checkpoint(
    scoring: str, trained: tuple[ExDD, Path], small_model: Make, small_data: Make, engine: Make
) -> None:
    """A calibrated model keeps none, because they take long to find in large banks."""
    assert trained[0].model.negative_bank.neighborhood.shape[1] == 1
    loaded = ExDD.load_from_checkpoint(trained[1], scoring=scoring)
    fitted = small_model(scoring=scoring)
    engine().fit(model=fitted, datamodule=small_data())
    images = torch.rand(4, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (each.eval().model(images) for each in (loaded, fitted))
    assert loaded.model.negative_bank.neighborhood.shape[1] == 3
    torch.testing.assert_close(first.pred_score, second.pred_score, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.anomaly_map, second.anomaly_map, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_half_precision_keeps_the_banks_and_the_scores(
    precision: str, trained: tuple[ExDD, Path], small_model: Make, small_data: Make, engine: Make
) -> None:
    model, data = small_model(), small_data()
    trainer = engine(precision=precision)
    trainer.fit(model=model, datamodule=data)
    assert model.model.negative_bank.features.dtype == torch.float32
    predictions = engine(precision=precision).predict(model=model, datamodule=data)
    expected = engine().predict(model=copy.deepcopy(trained[0]), datamodule=data)
    found, wanted = (torch.cat([p.anomaly_map.float() for p in each]) for each in (predictions, expected))
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.8
    # A full-precision checkpoint restored into a half-precision trainer keeps its bank to the last bit.
    restored = small_model()
    engine(precision=precision).test(model=restored, datamodule=data, ckpt_path=trained[1], verbose=False)
    assert torch.equal(restored.model.negative_bank.features, trained[0].model.negative_bank.features)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_narrow_features_train_in_true_precision(
    precision: str, small_model: Make, small_data: Make, engine: Make
) -> None:
    """Features of at most `projected_dimension` are not projected."""
    model, expected = (small_model(backbone="filter_bank") for _ in range(2))
    engine(precision=precision).fit(model=model, datamodule=small_data())
    engine().fit(model=expected, datamodule=small_data())
    banks = [(each.model.negative_bank, each.model.positive_bank) for each in (model, expected)]
    for found, wanted in zip(*banks, strict=True):
        assert found.features.dtype == torch.float32
        assert found.features.shape == wanted.features.shape
        if precision == "64-true":  # the filters compute in float32 in any case: nothing is rounded
            assert torch.equal(found.features, wanted.features)


def test_prediction_takes_settings_from_the_checkpoint(
    trained: tuple[ExDD, Path], small_data: Make, engine: Make, tmp_path: Path
) -> None:
    """As on the command line: the model is built with default arguments, then the checkpoint is loaded into it."""
    expected = engine().predict(model=copy.deepcopy(trained[0]), datamodule=small_data())
    model = ExDD(num_neighbors=4, scoring="paper")
    found = engine().predict(model=model, datamodule=small_data(), ckpt_path=trained[1])
    assert model.hparams.backbone == "resnet18"
    assert model.hparams.scoring == "paper"
    assert model.model.negative_bank.neighborhood.shape[1] == 4
    assert [batch.image_path for batch in found] == [batch.image_path for batch in expected]
    assert found[0].image.shape[-2:] == (96, 64)
    plain = ExDD()
    found = engine().predict(model=plain, datamodule=small_data(), ckpt_path=trained[1])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.pred_score, theirs.pred_score)
        torch.testing.assert_close(mine.anomaly_map, theirs.anomaly_map)


def test_checkpoints_of_approximate_search_are_searched_exactly(
    trained: tuple[ExDD, Path], small_data: Make, engine: Make, tmp_path: Path
) -> None:
    """It was an option of development versions."""
    checkpoint, old = torch.load(trained[1], weights_only=True), tmp_path / "old.ckpt"
    checkpoint["hyper_parameters"]["search"] = "approximate"
    torch.save(checkpoint, old)
    model = ExDD()
    engine().predict(model=model, datamodule=small_data(), ckpt_path=old)
    for restored in (model, ExDD.load_from_checkpoint(old)):
        assert restored.hparams.search == restored.model.negative_bank.search == "auto"
        assert_same_banks(restored, trained[0])


def test_settings_that_contradict_the_checkpoint_are_errors(
    trained: tuple[ExDD, Path], small_data: Make, engine: Make
) -> None:
    for arguments, message in (
        ({"backbone": "resnet34"}, "`backbone` is 'resnet34', but the checkpoint was trained with"),
        ({"image_size": (64, 64)}, "`image_size` is"),
        ({"scoring": "published"}, "pools features in another way"),
    ):
        model = ExDD(pre_trained=False, **arguments)
        with pytest.raises(ValueError, match=message):
            engine().test(model=model, datamodule=small_data(), ckpt_path=trained[1], verbose=False)


def test_own_pre_processor_is_used(small_model: Make, small_data: Make, engine: Make) -> None:
    transform = Compose([Resize((64, 96), antialias=True), Normalize([0.5] * 3, [0.5] * 3)])
    model = small_model(pre_processor=PreProcessor(transform))
    engine().fit(model=model, datamodule=small_data())
    assert model.input_size == (64, 96)
    assert int(model.model.negative_bank.position[:, 0].max()) < 64
    assert int(model.model.negative_bank.position[:, 1].max()) > 64


def test_images_of_a_folder_can_be_predicted(
    trained: tuple[ExDD, Path], sample_root: Path, engine: Make, tmp_path: Path
) -> None:
    model = ExDD.load_from_checkpoint(trained[1])
    predictions = engine().predict(model=model, data_path=sample_root / "test" / "20000.png")
    assert predictions[0].anomaly_map.shape[-2:] == (96, 64)
    pictures = list((tmp_path / "results").rglob("*.png"))
    assert [picture.name for picture in pictures] == ["20000.png"]
    assert len(PredictDataset(sample_root / "test" / "20000.png")) == 1


def test_anomalibs_own_data_modules_work(sample_root: Path, small_model: Make, engine: Make, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for path in sorted((sample_root / "train").glob("100??.png"))[:12]:
        (good / path.name).write_bytes(path.read_bytes())
    data = Folder("own", normal_dir=good, num_workers=0, test_split_mode="synthetic", val_split_mode="same_as_test")
    model = small_model()
    engine().fit(model=model, datamodule=data)
    assert len(model.model.negative_bank) >= 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_ratio": 0}, r"`negative_ratio` has to be in \(0, 1\]"),
        ({"positive_ratio": 1.5}, r"`positive_ratio` has to be in \(0, 1\]"),
        ({"min_coverage": -1}, "`min_coverage`"),
        ({"num_neighbors": 0}, "`num_neighbors` has to be at least 1, but got 0"),
        ({"scoring": "best"}, "`scoring` has to be one of"),
        ({"image_scoring": "best"}, "`image_scoring` has to be one of"),
        ({"positive_patches": "box"}, "`positive_patches` has to be one of"),
        ({"image_size": (8, 8)}, "`image_size` has to be"),
        ({"sigma": -1}, "`sigma` has to be positive"),
        ({"search": "annoy"}, "`search` has to be one of"),
        ({"backbone": "resnet_18"}, "`backbone` has to be a timm model, but got 'resnet_18'"),
        ({"layers": ["layer9"]}, "has the layers"),
        ({"layers": []}, "at least one layer"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str, small_model: Make) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


def test_lightnings_trainer_fits_without_a_check_of_empty_banks(
    small_model: Make, small_data: Make, tmp_path: Path
) -> None:
    model = small_model(evaluator=False)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, datamodule=small_data())
    assert len(model.model.negative_bank.features) > 0
    assert model.decisions is not None


def test_a_checkpoint_of_another_machine_needs_no_file_of_weights(small_model: Make, tmp_path: Path) -> None:
    model = small_model(backbone="resnet18", weights=tmp_path / "gone.pth")
    with pytest.raises(ValueError, match=r"`weights` has to be a file, but there is none at .*gone\.pth"):
        model.model.feature_extractor.load_weights()
    trained = small_model(backbone="resnet18", pre_trained=False).state_dict()
    model.load_state_dict(trained)
    model.model.feature_extractor.load_weights()  # there are weights
    torch.testing.assert_close(
        model.state_dict()["model.negative_bank.features"], trained["model.negative_bank.features"]
    )


@pytest.mark.parametrize("model", [ExDD, DefectClassifier])
def test_it_is_a_direct_subclass(model: type) -> None:
    """Anomalib lists direct subclasses only."""
    assert AnomalibModule in model.__bases__


class TestMemoryBank:
    def content(self, entries: int = 30) -> BankContent:
        rng = torch.Generator().manual_seed(0)
        return BankContent(
            torch.randn(entries, 5, generator=rng),
            torch.randint(0, 3, (entries,), generator=rng),
            torch.randint(0, 99, (entries, 2), generator=rng),
            ["a.png", "b.png", "c.png"],
        )

    def test_neighbourhoods_are_the_nearest_entries_with_the_entry_first(self) -> None:
        bank = MemoryBank(num_neighbors=4)
        bank.fill(self.content())
        distances = torch.cdist(bank.features.double(), bank.features.double())
        expected = distances.argsort(dim=1)[:, :4]
        assert torch.equal(bank.neighborhood, expected)

    def test_duplicates_keep_every_entry_first_in_its_own_neighbourhood(self) -> None:
        bank = MemoryBank(num_neighbors=3)
        bank.fill(BankContent(torch.ones(9, 2), torch.zeros(9).long(), torch.zeros(9, 2).long(), ["a"]))
        assert bank.neighborhood[:, 0].tolist() == list(range(9))
        assert all(len(set(row)) == 3 for row in bank.neighborhood.tolist())

    def test_state_round_trip(self) -> None:
        bank, other = MemoryBank(), MemoryBank()
        bank.fill(self.content())
        other.load_state_dict(bank.state_dict())
        assert other.sources == bank.sources
        for name in ("features", "neighborhood", "source", "position"):
            assert torch.equal(getattr(other, name), getattr(bank, name))

    def known(self) -> MemoryBank:
        bank = MemoryBank()
        bank.fill(replace(self.content(), kinds={"a.png": "dent", "c.png": "scratch", "elsewhere.png": "dent"}))
        return bank

    def test_kinds_are_those_of_the_sources(self) -> None:
        bank = self.known()
        assert bank.kinds == {"a.png": "dent", "c.png": "scratch"}
        more = BankContent(torch.zeros(2, 5), torch.tensor([0, 1]), torch.zeros(2, 2).long(), ["d.png", "e.png"])
        bank.add(replace(more, kinds={"d.png": "", "e.png": "dent"}))
        assert bank.kinds == {"a.png": "dent", "c.png": "scratch", "e.png": "dent"}
        bank.remove("a.png")
        assert bank.kinds == {"c.png": "scratch", "e.png": "dent"}
        bank.fill(self.content())
        assert bank.kinds == {}

    def test_kinds_of_images_without_entries_stay(self) -> None:
        bank = self.known()
        entries = bank.source == 0
        bank.fill(
            BankContent(bank.features[entries], bank.source[entries], bank.position[entries], bank.sources, bank.kinds)
        )
        bank.remove("a.png")
        assert (len(bank), bank.sources, bank.kinds) == (0, ["b.png", "c.png"], {"c.png": "scratch"})
        bank.clear()
        assert bank.kinds == {}

    def test_kinds_are_in_the_state_and_older_states_have_none(self) -> None:
        other = MemoryBank()
        state = self.known().state_dict()
        other.load_state_dict(state)
        assert other.kinds == {"a.png": "dent", "c.png": "scratch"}
        del state["_extra_state"]["kinds"]
        other.load_state_dict(state)
        assert other.kinds == {}
        assert other.sources == ["a.png", "b.png", "c.png"]

    def test_search_index_is_not_copied_or_pickled(self) -> None:
        bank = MemoryBank()
        bank.fill(self.content())
        query = torch.randn(3, 5)
        before = pickle.dumps(bank)
        expected = bank.nearest(query)
        after, copied = pickle.dumps(bank), copy.deepcopy(bank)
        assert len(after) == len(pickle.dumps(copied)) == len(before)
        for clone in (copied, pickle.loads(after)):  # noqa: S301
            assert torch.equal(clone.nearest(query).distances, expected.distances)

    def test_new_content_is_searched_at_once(self) -> None:
        bank = MemoryBank()
        bank.fill(self.content())
        bank.nearest(torch.randn(2, 5))
        bank.fill(BankContent(torch.zeros(2, 5), torch.zeros(2).long(), torch.zeros(2, 2).long(), ["a"]))
        assert torch.equal(bank.nearest(torch.zeros(1, 5)).distances, torch.zeros(1, 1))
        bank.clear()
        with pytest.raises(ValueError, match="memory bank is empty"):
            bank.nearest(torch.zeros(1, 5))
