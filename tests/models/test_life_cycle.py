"""Hooks called again, in another order and after an exception: one engine and one model for many things in a row."""

import copy
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from anomalib_exdd import KSDD2, DefectClassifier, ExDD
from anomalib_exdd.models.exdd.training import BankBuilder
from anomalib_exdd.models.weights import initial_network
from small import batch
from toy_surfaces import TOY, write_toy

Make = Callable[..., Any]
IMAGES = torch.rand(3, 3, 96, 64, generator=torch.Generator().manual_seed(0))
FILTERS = {"backbone": "filter_bank", "visualizer": False}
OTHER = {**FILTERS, "image_size": (64, 48), "seed": 5, "num_neighbors": 2}
FEW = {"num_defects": 4}  # of the training images


class Interruption(Exception):  # noqa: N818  no error: what a test does to a trainer
    """Stands for whatever may end a fit."""


class Interrupt(Callback):
    """Ends whatever a trainer does at its second batch, once."""

    def __init__(self) -> None:
        self.done = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
        if batch_idx == 1 and not self.done:
            self.done = True
            raise Interruption

    on_test_batch_start = on_validation_batch_start = on_predict_batch_start = on_train_batch_start


class Copies(Callback):
    """Copies the model in both ways in the middle of its training."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.made += copies(pl_module)


def copies(model: Any) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301  our own


@torch.no_grad()
def scores(model: Any, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    """Return scores and maps of made-up images, normalised by the model's thresholds."""
    found = model.eval()(images)
    return found.pred_score, found.anomaly_map


def assert_same(first: Any, second: Any) -> None:
    """Assert that two models hold and predict the same, bit by bit."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert value == theirs[name], name
    torch.testing.assert_close(scores(first), scores(second), rtol=0, atol=0, equal_nan=True)


def fit(engine: Any, model: Any, data: Any, **arguments: Any) -> Any:
    torch.manual_seed(0)  # the order of the training images
    engine.fit(model=model, datamodule=data, **arguments)
    return model


def predicted(engine: Any, model: Any, data: Any) -> dict[str, tuple[float, bool]]:
    return {
        path: (float(score), bool(label))
        for batch in engine.predict(model=model, datamodule=data)
        for path, score, label in zip(batch.image_path, batch.pred_score, batch.pred_label, strict=True)
    }


def assert_is_empty(model: ExDD) -> None:
    for each in [model, *copies(model)]:
        with pytest.raises(ValueError, match="memory bank is empty"):
            scores(each)
        assert each.decisions is None


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_one_engine_does_everything_twice(
    share: float, small_model: Make, small_data: Make, engine: Make, tmp_path: Path
) -> None:
    model, same, data = small_model(**FILTERS), engine(), small_data(val_split_ratio=share)
    fresh = fit(engine(), small_model(**FILTERS), small_data(val_split_ratio=share))
    fit(same, model, data)
    assert_same(model, fresh)
    (metrics,) = same.test(model=model, datamodule=data, verbose=False)
    found = predicted(same, model, data)
    first, checkpoint = same.export(model, "torch", export_root=tmp_path), same.best_model_path
    same.test(model=model, datamodule=data, ckpt_path=checkpoint, verbose=False)
    fit(same, model, small_data(val_split_ratio=share, **FEW))
    assert len(model.model.positive_bank.sources) == 4
    fit(same, model, data)
    assert_same(model, fresh)
    assert same.test(model=model, datamodule=data, verbose=False) == [metrics]
    assert predicted(same, model, data) == found
    assert_same(ExDD.load_from_checkpoint(same.best_model_path), fresh)
    assert_same(torch.load(first, weights_only=False)["model"], fresh)
    assert_same(torch.load(same.export(model, "torch", tmp_path / "second"), weights_only=False)["model"], fresh)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_exdd_can_be_copied_at_any_time(
    store: str, small_model: Make, small_data: Make, engine: Make, tmp_path: Path
) -> None:
    arguments = {**FILTERS, "feature_store": store, "feature_store_dir": tmp_path}
    model, interrupt, during = small_model(**arguments), Interrupt(), Copies()
    assert_is_empty(model)
    same = engine(callbacks=[interrupt, during])
    with pytest.raises(Interruption):
        fit(same, model, small_data(**FEW))
    assert_is_empty(model)
    fit(same, model, small_data(**FEW))
    assert len(during.made) == 2
    for each in during.made:
        assert_is_empty(each)
        assert_same(fit(engine(), each, small_data(**FEW)), model)
    for each in copies(model):
        assert_same(each, model)
    assert_same(fit(engine(), small_model(**arguments), small_data(**FEW)), model)


def test_a_fit_that_fails_leaves_no_half_built_banks(
    small_model: Make, small_data: Make, engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, same = small_model(**FILTERS), engine(callbacks=[Interrupt()])
    with pytest.raises(Interruption):
        fit(same, model, small_data())
    with pytest.raises(RuntimeError, match="no patches to build banks from"):
        same.validate(model=model, datamodule=small_data(val_split_ratio=0.2))
    fresh = copy.deepcopy(fit(same, model, small_data()))

    def fail(builder: BankBuilder) -> None:
        assert len(builder.model.positive_bank)
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(BankBuilder, "fill_calibration_set", fail)
        with pytest.raises(Interruption):
            fit(same, model, small_data())
    assert_is_empty(model)
    assert_same(fit(same, model, small_data()), fresh)


def test_models_take_turns_with_one_engine_and_one_data_module(
    small_model: Make, small_data: Make, engine: Make
) -> None:
    arguments = [FILTERS, OTHER]
    fresh = [fit(engine(), small_model(**each), small_data(**FEW)) for each in arguments]
    same, data, models = engine(), small_data(**FEW), [small_model(**each) for each in arguments]
    for model, expected in zip([*models, *models], [*fresh, *fresh], strict=True):
        assert_same(fit(same, model, data), expected)
    for model, expected in zip(models, fresh, strict=True):
        assert predicted(same, model, data) == predicted(engine(), expected, small_data(**FEW))


def test_threads_predict_while_another_model_trains(
    trained: tuple[ExDD, Path], small_model: Make, small_data: Make, engine: Make
) -> None:
    expected, model, done = scores(trained[0], IMAGES[:1]), small_model(**OTHER), []

    def predict() -> list[tuple[Tensor, Tensor]]:
        served = copy.deepcopy(trained[0])
        found = [scores(served, IMAGES[:1])]
        while not done:
            found.append(scores(served, IMAGES[:1]))
        return found

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(predict) for _ in range(4)]
        try:
            fit(engine(), model, small_data(**FEW))
        finally:
            done.append(True)
        for found in (each for one in running for each in one.result()):
            assert all(map(torch.equal, found, expected))
    assert_same(model, fit(engine(), small_model(**OTHER), small_data(**FEW)))


def test_networks_that_are_built_at_once_are_those_of_their_seeds() -> None:
    expected = [initial_network("test_resnet", seed).state_dict() for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            built = pool.map(lambda seed: initial_network("test_resnet", seed).state_dict(), range(4))
            for found, wanted in zip(built, expected, strict=True):
                assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_one_normal_image_after_many_is_like_one_alone(small_model: Make) -> None:
    def built(model: ExDD, normal: int) -> ExDD:
        masks = torch.zeros(normal + 2, 96, 64, dtype=torch.bool)
        masks[normal:, :32, :32] = True
        model.on_fit_start()
        model.training_step(batch([0] * normal + [1] * 2, masks))
        model.on_train_epoch_end()
        return model

    model = built(small_model(**FILTERS), 6)
    assert model.decisions is not None
    assert model.post_processor.image_threshold.isfinite()
    built(model, 1)
    assert model.decisions is None
    assert_same(model, built(small_model(**FILTERS), 1))


def test_checkpoints_are_loaded_one_after_another(
    trained: tuple[ExDD, Path], small_model: Make, small_data: Make, engine: Make
) -> None:
    maker = engine()
    other = fit(maker, small_model(**OTHER), small_data())
    paths = {trained[1]: trained[0], Path(maker.best_model_path): other}
    model, same = ExDD(visualizer=False), engine()
    for path in [*paths, *paths]:
        (metrics,) = same.test(model=model, datamodule=small_data(), ckpt_path=path, verbose=False)
        assert_same(model, paths[path])
        assert dict(model.hparams) == {**paths[path].hparams}
    assert metrics
    model.hparams.num_neighbors = 7  # what its user sets stays
    same.test(model=model, datamodule=small_data(), ckpt_path=trained[1], verbose=False)
    assert model.hparams.num_neighbors == 7
    assert model.settings.seed == trained[0].settings.seed


def test_a_checkpoint_from_which_a_fit_failed_is_tested_as_it_is(
    trained: tuple[ExDD, Path], small_data: Make, small_model: Make, engine: Make
) -> None:
    model, same = small_model(), engine(callbacks=[Interrupt()])
    with pytest.raises(Interruption):
        fit(same, model, small_data(num_defects=4), ckpt_path=trained[1])
    same.test(model=model, datamodule=small_data(), ckpt_path=trained[1], verbose=False)
    assert_same(model, trained[0])


def test_metrics_and_thresholds_start_anew_after_an_exception(
    trained: tuple[ExDD, Path], small_data: Make, engine: Make
) -> None:
    for name, share in (("test", 0.0), ("validate", 0.4)):
        models, found = [copy.deepcopy(trained[0]) for _ in range(2)], []
        for model, callbacks in zip(models, ([], [Interrupt()]), strict=True):
            run = getattr(engine(callbacks=callbacks), name)
            data = small_data(val_split_ratio=share, eval_batch_size=2)
            if callbacks:
                with pytest.raises(Interruption):
                    run(model=model, datamodule=data, verbose=False)
            found.append(run(model=model, datamodule=data, verbose=False))
        assert found[0] == found[1]
        assert_same(*models)


def test_pictures_go_where_the_present_engine_writes_or_its_user_says(
    trained: tuple[ExDD, Path], small_data: Make, engine: Make, tmp_path: Path
) -> None:
    model, data = copy.deepcopy(trained[0]), small_data()
    for given in (None, tmp_path / "mine"):
        if given is not None:
            model.visualizer.output_dir = given
        for _ in range(2):
            present = engine()
            present.test(model=model, datamodule=data, verbose=False)
            folder = Path(present.trainer.default_root_dir) / "images" if given is None else given
            assert Path(model.visualizer.output_dir) == folder
            assert len(list(folder.rglob("*.png"))) == 6


def test_the_table_of_predictions_is_written_again(
    trained: tuple[ExDD, Path], sample_root: Path, engine: Make, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, path in enumerate(sorted((sample_root / "test").glob("?????.png"))[:3]):
        (photos / f"{number}.png").write_bytes(path.read_bytes())
    (photos / "broken.png").write_bytes(b"no image")
    model, same = copy.deepcopy(trained[0]), engine(callbacks=[Interrupt()])
    tables = []
    for number in range(3):
        if number == 0:
            with pytest.raises(Interruption):
                same.predict(model=model, data_path=photos)
            continue
        assert len(same.predict(model=model, data_path=photos)) == 3
        rows = json.loads((Path(same.trainer.default_root_dir) / "predictions.json").read_text())["predictions"]
        tables.append([{name: value for name, value in row.items() if name != "seconds"} for row in rows])
    assert tables[0] == tables[1]
    assert [Path(row["path"]).name for row in tables[0]] == ["0.png", "1.png", "2.png", "broken.png"]


def test_numbers_survive_other_precisions(trained: tuple[ExDD, Path]) -> None:
    model = copy.deepcopy(trained[0]).double().double().float()
    assert_same(model, trained[0])
    halved = copy.deepcopy(trained[0]).half()
    assert_same(copy.deepcopy(halved).half(), halved)
    for name, value in trained[0].model.negative_bank.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, halved.model.negative_bank.state_dict()[name]), name


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Make, Make]:
    """What makes a small classifier, and what makes its data."""
    root = write_toy(tmp_path / "toy", train=(8, 8), test=(2, 2))

    def data() -> KSDD2:
        return KSDD2(root, num_workers=0, train_batch_size=4, val_split_ratio=0.4)

    return lambda: DefectClassifier(**TOY, visualizer=False), data


def test_a_classifier_can_be_copied_at_any_time_and_is_not_trained_twice_by_one_engine(
    classifier: tuple[Make, Make], engine: Make
) -> None:
    model, data, during = classifier[0](), classifier[1](), Copies()
    for each in copies(model):
        assert_same(each, model)
    same = engine(callbacks=[interrupt := Interrupt(), during], max_epochs=2)
    with pytest.raises(Interruption):
        fit(same, model, data)
    for each in copies(model):
        assert_same(each, model)
    fit(same, model, data)  # it had not finished an epoch
    assert interrupt.done
    assert len(during.made) == 4
    trained, found = copies(model), predicted(same, model, data)
    with pytest.raises(ValueError, match="trained before"):
        fit(same, model, data)
    for each in trained:
        assert_same(each, model)
        assert predicted(engine(), each, data) == found
    fit(engine(max_epochs=1), model, data)
    with pytest.raises(AssertionError):
        assert_same(model, trained[0])


def test_an_engine_of_another_kind_of_model_is_refused(
    trained: tuple[ExDD, Path], classifier: tuple[Make, Make], engine: Make
) -> None:
    model, other, same = classifier[0](), copy.deepcopy(trained[0]), engine(max_epochs=1)
    fit(same, model, classifier[1]())
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="ProbabilityPostProcessor of another model"):
        fit(same, other, classifier[1]())
    assert_same(other, trained[0])
    with pytest.raises(ValueError, match="PostProcessor of another model"):
        same.predict(model=other, datamodule=classifier[1]())
    assert_same(model, before)
