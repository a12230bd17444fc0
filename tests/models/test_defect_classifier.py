"""Training, selection, resuming and predictions of the classifier, through Anomalib's engine and command line."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from anomalib.cli import AnomalibCLI
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image

from anomalib_exdd import KSDD2, DefectClassifier, SyntheticDefects
from anomalib_exdd.data.dataset import DefectDataset
from anomalib_exdd.models.defect_classifier.selection import SELECTION
from toy_surfaces import HEIGHT, TOY, WIDTH, write_toy

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture
def toy_data(toy_root: Path) -> Make:
    def make(**arguments: Any) -> KSDD2:
        return KSDD2(toy_root, **{"num_workers": 0, "train_batch_size": 8, "val_split_ratio": 0.2, **arguments})

    return make


def classifier(**arguments: Any) -> DefectClassifier:
    return DefectClassifier(**{**TOY, "learning_rate": 1e-3, "visualizer": False, **arguments})


@pytest.fixture(scope="module")
def learned(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DefectClassifier, Engine, Any]:
    """A trained classifier, its engine, and the metrics of its test. Tests must not change the model."""
    seed_everything(0, verbose=False)
    model = classifier(patience=3)
    root = tmp_path_factory.mktemp("learned")
    arguments: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    engine = Engine(default_root_dir=root, max_epochs=8, **arguments)
    data = KSDD2(toy_root, num_workers=0, train_batch_size=8, val_split_ratio=0.2)
    (metrics,) = engine.train(model=model, datamodule=data)
    return model.eval(), engine, metrics


def assert_same_weights(model: DefectClassifier, checkpoint: dict[str, Any]) -> None:
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):  # NaN where a threshold is not in use
            expected = checkpoint["state_dict"][name]
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True, msg=name)


def test_it_learns_a_separable_problem_and_finds_where(
    learned: tuple[DefectClassifier, Engine, Any], toy_data: Make, engine: Make
) -> None:
    model, _, metrics = learned
    assert metrics["image_AUROC"] == metrics["image_AUPR"] == 1.0
    assert metrics["image_F1Score"] > 0.9
    assert metrics["pixel_AUROC"] > 0.8
    batches = engine().predict(model=copy.deepcopy(model), datamodule=toy_data())
    scores = torch.cat([batch.pred_score for batch in batches])
    labels = torch.cat([batch.gt_label for batch in batches]).bool()
    with torch.no_grad():  # a probability, of the model alone, is what Anomalib reports
        again = torch.cat([model.model(batch.image).pred_score for batch in batches])
    torch.testing.assert_close(scores, again)
    assert scores[labels].min() > scores[~labels].max()


def test_the_best_epoch_is_kept_tested_and_saved_with_the_settings_in_force(
    learned: tuple[DefectClassifier, Engine, Any],
) -> None:
    model, engine, _ = learned
    best = Path(str(engine.best_model_path))
    assert best.name == "model.ckpt"
    assert (best.parent / "last.ckpt").is_file()
    checkpoint = torch.load(best, weights_only=True)
    assert_same_weights(model, checkpoint)
    assert checkpoint["hyper_parameters"]["optimizer"] == "adam"
    assert checkpoint["hyper_parameters"]["learning_rate"] == 1e-3
    assert checkpoint["hyper_parameters"]["weight_decay"] == 0.0
    expected = {"batch_size": 8, "max_epochs": 8, "image_size": (HEIGHT, WIDTH), "preset": "diag", "optimizer": "adam"}
    assert expected.items() <= DefectClassifier.load_from_checkpoint(best).trained_with.items()


def test_training_stops_and_selects_by_the_validation_record_alone(
    toy_data: Make, toy_root: Path, engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    get = DefectDataset.__getitem__

    def spy(self: DefectDataset, index: int) -> Any:
        item = get(self, index)
        read.append(str(item.image_path))
        return item

    monkeypatch.setattr(DefectDataset, "__getitem__", spy)
    model = classifier(patience=2)
    script = iter([0.1, 0.5, 0.3, 0.2, 0.9])  # the fifth epoch is never reached
    weights: list[torch.Tensor] = []

    def compute(epoch: int) -> dict[str, torch.Tensor]:
        del epoch
        weights.append(model.model.head.weight.detach().clone())
        return {SELECTION: torch.tensor(next(script)), "val_AP": torch.tensor(0.0)}

    monkeypatch.setattr(model.validation, "compute", compute)
    trainer = engine(max_epochs=9)
    trainer.fit(model=model, datamodule=toy_data())
    assert trainer.trainer.current_epoch == 4
    assert torch.load(trainer.best_model_path, weights_only=True)["epoch"] == 1
    assert torch.equal(model.model.head.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])
    assert read
    assert not any(path.startswith(str(toy_root / "test")) for path in read)


def test_epochs_are_the_presets_unless_given(toy_data: Make, engine: Make) -> None:
    model = classifier(patience=1)
    values = iter([0.5, 0.4])
    model.validation.compute = lambda epoch: {SELECTION: torch.tensor(next(values))}  # type: ignore[method-assign]
    trainer = engine()
    trainer.fit(model=model, datamodule=toy_data())
    assert trainer.trainer.max_epochs == 50
    assert trainer.trainer.current_epoch == 2


def test_the_result_depends_on_the_seed_alone(toy_data: Make, engine: Make) -> None:
    """Neither on the number of workers nor on what else has drawn random numbers in this process."""
    states = []
    for workers in (0, 2):
        seed_everything(7 + workers, verbose=False)
        model = classifier()
        engine(max_epochs=2).fit(model=model, datamodule=toy_data(num_workers=workers))
        states.append({"state_dict": model.state_dict()})
    assert_same_weights(model, states[0])
    other = classifier(seed=1)
    engine(max_epochs=1).fit(model=other, datamodule=toy_data())
    assert not torch.equal(other.model.head.weight, model.model.head.weight)


@pytest.mark.parametrize("ratio", [0, 0.2])
def test_an_interrupted_training_goes_on_with_the_next_epoch(
    ratio: float, toy_data: Make, engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"preset": "in_and_out", "momentum": 0.9, "learning_rate": 0.01, "patience": None}
    # The order of images within a batch changes rounding only.
    whole_batch = {"train_batch_size": 64, "val_split_ratio": ratio}
    uninterrupted = classifier(**arguments)
    engine(max_epochs=4).fit(model=uninterrupted, datamodule=toy_data(**whole_batch))
    first = engine(max_epochs=2)
    first.fit(model=classifier(**arguments), datamodule=toy_data(**whole_batch))
    last = Path(first.best_model_path).with_name("last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 1

    # As the command line does: default arguments, the checkpoint brings its own.
    monkeypatch.setattr(timm, "create_model", only_random(timm.create_model))
    second = engine(max_epochs=4)
    resumed = DefectClassifier(visualizer=False)
    second.train(model=resumed, datamodule=toy_data(**whole_batch), ckpt_path=last)
    assert resumed.hparams.backbone == "test_resnet"
    content = torch.load(Path(second.best_model_path).with_name("last.ckpt"), weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 4)
    reference = torch.load(
        Path(first.best_model_path).parents[3] / "v0" / "weights" / "lightning" / "last.ckpt", weights_only=True
    )
    for name, value in reference["state_dict"].items():
        if isinstance(value, torch.Tensor) and name.startswith("model."):
            torch.testing.assert_close(content["state_dict"][name], value, rtol=1e-3, atol=1e-4)


def test_a_best_epoch_before_the_interruption_stays_the_best(toy_data: Make, engine: Make, tmp_path: Path) -> None:
    first = engine(max_epochs=2)
    first.fit(model=classifier(), datamodule=toy_data())
    best = torch.load(first.best_model_path, weights_only=True)
    last = torch.load(Path(first.best_model_path).with_name("last.ckpt"), weights_only=True)
    for state in last["callbacks"].values():
        if isinstance(state, dict) and state.get("monitor") == SELECTION:
            path = next(iter(state["best_k_models"]))
            state["best_k_models"][path] = state["kth_value"] = state["best_model_score"] = torch.tensor(2.0)
    torch.save(last, tmp_path / "interrupted.ckpt")

    second, model = engine(max_epochs=3), classifier()
    second.train(model=model, datamodule=toy_data(), ckpt_path=tmp_path / "interrupted.ckpt")
    assert_same_weights(model, best)
    assert Path(second.best_model_path).parent != Path(first.best_model_path).parent
    assert_same_weights(model, torch.load(second.best_model_path, weights_only=True))


def only_random(create_model: Make) -> Make:
    """Let timm build networks, but not load weights."""

    def create(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        assert not pretrained, "the checkpoint brings the weights"
        return create_model(*args, pretrained=pretrained, **kwargs)

    return create


def test_a_checkpoint_needs_no_network_no_file_and_no_settings(
    learned: tuple[DefectClassifier, Engine, Any],
    toy_data: Make,
    engine: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    content = torch.load(learned[1].best_model_path, weights_only=True)
    content["hyper_parameters"] |= {"pre_trained": True, "weights": None}
    torch.save(content, tmp_path / "model.ckpt")
    monkeypatch.setattr(timm, "create_model", only_random(timm.create_model))
    loaded = DefectClassifier.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    batch = torch.rand(2, 3, 90, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).pred_score, learned[0](batch).pred_score, rtol=0, atol=0)
        torch.testing.assert_close(loaded(batch).anomaly_map, learned[0](batch).anomaly_map, rtol=0, atol=0)
    plain = DefectClassifier(visualizer=False)
    (metrics,) = engine().test(
        model=plain, datamodule=toy_data(), ckpt_path=str(tmp_path / "model.ckpt"), verbose=False
    )
    assert metrics == learned[2]
    with pytest.raises(ValueError, match="`backbone` is 'resnet18', but the checkpoint was trained with 'test_resnet'"):
        engine().test(
            model=DefectClassifier("resnet18", pre_trained=False),
            datamodule=toy_data(),
            ckpt_path=learned[1].best_model_path,
        )


def test_a_checkpoint_of_another_machine_needs_no_file_of_weights(
    learned: tuple[DefectClassifier, Engine, Any], tmp_path: Path
) -> None:
    content = torch.load(learned[1].best_model_path, weights_only=True)
    content["hyper_parameters"] |= {"weights": str(tmp_path / "gone.safetensors")}
    torch.save(content, tmp_path / "model.ckpt")
    loaded = DefectClassifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(loaded.model.head.weight, learned[0].model.head.weight)
    with pytest.raises(ValueError, match=r"`weights` has to be a file, but there is none at .*gone\.safetensors"):
        classifier(weights=tmp_path / "gone.safetensors").model.load_weights()


def test_patience_is_that_of_the_resumed_training(toy_data: Make, engine: Make) -> None:
    first = engine(max_epochs=1)
    first.fit(model=classifier(patience=2), datamodule=toy_data())
    last = Path(str(first.best_model_path)).with_name("last.ckpt")
    for given, expected in ((7, 7), (10, 2)):  # 10, the default, counts as not given
        again = engine(max_epochs=2)
        again.fit(model=classifier(patience=given), datamodule=toy_data(), ckpt_path=str(last))
        (stopping,) = again.trainer.early_stopping_callbacks
        assert stopping.patience == expected


def test_lightnings_trainer_selects_as_well_and_needs_no_checkpoints(toy_data: Make, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1}
    model = classifier(evaluator=False)
    Trainer(**arguments, default_root_dir=tmp_path).fit(model, datamodule=toy_data())
    assert model.trainer.checkpoint_callback.monitor == SELECTION
    assert list(tmp_path.rglob("last.ckpt"))
    Trainer(**arguments, enable_checkpointing=False).fit(classifier(evaluator=False), datamodule=toy_data())


def test_the_checkpoint_that_is_tested_is_the_one_that_is_named(
    learned: tuple[DefectClassifier, Engine, Any], toy_data: Make, engine: Make
) -> None:
    last = Path(str(learned[1].best_model_path)).with_name("last.ckpt")
    model = classifier()
    again = engine(max_epochs=torch.load(last, weights_only=True)["epoch"] + 2)
    again.fit(model=model, datamodule=toy_data(), ckpt_path=str(last))
    fitted = copy.deepcopy(model.state_dict())
    again.test(model=model, datamodule=toy_data(), ckpt_path=str(last), verbose=False)  # as `anomalib train` does
    assert torch.equal(model.state_dict()["model.head.weight"], fitted["model.head.weight"])
    again.test(model=model, datamodule=toy_data(), ckpt_path=learned[1].best_model_path, verbose=False)
    again.test(model=model, datamodule=toy_data(), ckpt_path=str(last), verbose=False)
    assert_same_weights(model, torch.load(last, weights_only=True))


def test_synthetic_defects_are_defective_images_and_no_defect_validates_without_selecting(
    toy_root: Path, toy_data: Make, engine: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Zero-shot: normal and synthetic images only."""
    (tmp_path / "synthetic" / "train").mkdir(parents=True)
    for number in range(6):
        for suffix in ("", "_GT"):
            with Image.open(toy_root / "test" / f"{20008 + number}{suffix}.png") as image:
                image.save(tmp_path / "synthetic" / "train" / f"{number:05d}{suffix}.png")
    data = SyntheticDefects(toy_data(num_defects=0), tmp_path / "synthetic", count=5)
    model = classifier(patience=1, pos_weight=4.0)
    trainer = engine(max_epochs=3)
    with caplog.at_level(logging.INFO):
        trainer.fit(model=model, datamodule=data)
    assert trainer.trainer.current_epoch == 3
    assert torch.load(trainer.best_model_path, weights_only=True)["epoch"] == 2
    assert "does not stop early, and the last epoch is kept" in caplog.text
    assert "16 normal images count 0.583 each, 5 defective ones 2.33" in caplog.text  # 21 / (16 + 4 * 5), 4 times
    assert "published with batches of 32 images, but a step takes 8" in caplog.text
    network = torch.nn.Sequential(model.pre_processor, model.model).eval()
    with torch.no_grad():
        scores = [network(batch.image).pred_score for batch in data.val_dataloader()]
    assert model.post_processor.image_threshold.item() == pytest.approx(torch.cat(scores).max().item(), rel=1e-5)


@pytest.mark.parametrize("post_processor", [True, PostProcessor()])
def test_without_validation_images_the_last_epoch_is_kept_and_decides_at_even_odds(
    post_processor: PostProcessor | bool, toy_data: Make, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with a trainer that is told to validate less often than it trains, and else would save nothing."""
    model, data = classifier(patience=1, post_processor=post_processor), toy_data(val_split_ratio=0)
    weights: list[torch.Tensor] = []

    class Spy(Callback):
        def on_train_epoch_end(self, *_args: Any) -> None:
            weights.append(model.model.head.weight.detach().clone())

    trainer = engine(max_epochs=9, check_val_every_n_epoch=2, callbacks=[Spy()])
    with caplog.at_level(logging.WARNING):
        (metrics,) = trainer.train(model=model, datamodule=data)
    assert len(weights) == 9
    content = torch.load(trainer.best_model_path, weights_only=True)
    assert content["epoch"] == 8
    assert torch.equal(content["state_dict"]["model.head.weight"], weights[8])
    assert_same_weights(model, content)
    assert Path(trainer.best_model_path).with_name("last.ckpt").is_file()
    (warning,) = [message for message in caplog.messages if "no validation images" in message]
    assert "the last epoch is kept, and the threshold is a probability of 0.5" in warning
    assert "--data.val_split_ratio 0.2" in warning

    fresh = classifier(post_processor=copy.deepcopy(post_processor))
    (again,) = engine().test(model=fresh, datamodule=data, ckpt_path=trainer.best_model_path, verbose=False)
    assert again == metrics
    second = engine()
    batches = second.predict(model=model, datamodule=data)
    scores, labels, masks, maps = (
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("pred_score", "pred_label", "pred_mask", "anomaly_map")
    )
    with torch.no_grad():
        raw = [model.eval().model(batch.image) for batch in batches]
    probability = torch.cat([each.pred_score for each in raw])
    torch.testing.assert_close(scores, probability)
    assert torch.equal(labels, probability > 0.5)
    log_odds = torch.cat([each.anomaly_map for each in raw]).squeeze(1)
    assert torch.equal(masks, log_odds > 0)
    assert 0 < masks.float().mean() < 1
    reach = float(model.post_processor.pixel_max)
    torch.testing.assert_close(maps, (log_odds / (2 * reach) + 0.5).clamp(0, 1))
    assert maps.max() > 0.5
    assert float((log_odds.abs() > reach).float().mean()) < 0.05, "hardly anything is clipped"
    table = json.loads((Path(second.trainer.default_root_dir) / "predictions.json").read_text(encoding="utf-8"))
    for row in table["predictions"]:
        assert row["label"] == ("defective" if row["raw_score"] > 0.5 else "normal")
        assert row["threshold"] == 0.5
        assert row["num_regions"] is not None


def test_a_later_validation_counts_as_one(toy_data: Make, engine: Make, caplog: pytest.LogCaptureFixture) -> None:
    model, trainer = classifier(), engine(max_epochs=2, check_val_every_n_epoch=2)
    with caplog.at_level(logging.WARNING):
        trainer.fit(model=model, datamodule=toy_data())
    assert "no validation images" not in caplog.text
    assert {"val_AP", SELECTION} <= set(trainer.trainer.callback_metrics)
    assert torch.load(trainer.best_model_path, weights_only=True)["epoch"] == 1


def test_training_without_any_defective_image_is_an_error(toy_data: Make, engine: Make) -> None:
    with pytest.raises(ValueError, match="no defective one"):
        engine(max_epochs=1).fit(model=classifier(), datamodule=toy_data(num_defects=0))


def test_the_literal_commands(toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--model", "DefectClassifier", "--data", "KSDD2", "--data.root", str(toy_root)]
    arguments += ["--model.preset", "diag", "--model.backbone", "test_resnet", "--model.pre_trained", "false"]
    arguments += ["--model.image_size", f"[{HEIGHT}, {WIDTH}]", "--data.num_workers", "0"]
    AnomalibCLI([*arguments, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"])
    folder = tmp_path / "results" / "DefectClassifier" / "KSDD2" / "latest"
    checkpoint = folder / "weights" / "lightning" / "model.ckpt"
    assert checkpoint.is_file()
    assert len(list((folder / "images" / "test").glob("*.png"))) == 16
    image = toy_root / "test" / "20009.png"
    predicted = AnomalibCLI(
        ["predict", "--model", "DefectClassifier", "--data", str(image), "--ckpt_path", str(checkpoint)]
    )
    results = Path(predicted.engine.trainer.default_root_dir)
    assert list(results.rglob("20009.png"))
    (row,) = json.loads((results / "predictions.json").read_text(encoding="utf-8"))["predictions"]
    assert Path(row["path"]).name == "20009.png"
    assert row["score"] == row["raw_score"] == row["probability"]
    assert row["label"] == ("defective" if row["score"] > row["threshold"] else "normal")
    assert row["threshold"] == 0.5
    assert row["num_regions"] == len(row["regions"])
    assert row["decision"] is row["accept_threshold"] is None
    with Image.open(image) as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    model = DefectClassifier.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        assert model(pixels).pred_score.item() == pytest.approx(row["probability"], abs=1e-5)
