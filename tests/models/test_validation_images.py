"""Training without validation images: ExDD and Anomalib's own models, through Anomalib's engine.

DefectClassifier's part is in `test_defect_classifier.py`, the comparison's in `comparison/test_compare.py`.
"""

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.models import Padim, Patchcore
from lightning.pytorch import Trainer
from torch import Tensor

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.models.exdd.decisions import Thresholds

Make = Callable[..., Any]
FIX = "--data.val_split_ratio 0.2"


def thresholds(model: ExDD) -> dict[str, float]:
    state = {} if model.post_processor is None else model.post_processor.state_dict()
    found = {name.removeprefix("_"): float(value) for name, value in state.items()}
    return {name: value for name, value in found.items() if name in Thresholds._fields}


def assert_same_state(found: dict[str, Any], expected: dict[str, Any], *prefixes: str) -> None:
    names = [name for name in expected if name.startswith(prefixes)]
    assert names
    assert {name for name in found if name.startswith(prefixes)} == set(names)
    for name in names:
        if isinstance(expected[name], Tensor):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert found[name] == expected[name], name


def saved_state(path: Any) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def test_training_gives_what_it_gives_before_a_validation(small_model: Make, small_data: Make, engine: Make) -> None:
    """The same training images: only what is found on validation images differs."""
    validated, alone = small_model(), small_model()
    engine().fit(model=validated, datamodule=small_data(val_split_ratio=0.2))
    data = small_data(val_split_ratio=0.2)

    def nothing() -> list[Any]:
        return []

    data.val_dataloader = nothing
    engine().fit(model=alone, datamodule=data)
    assert_same_state(alone.state_dict(), validated.state_dict(), "model.", "_is_fitted")
    assert bool(alone.state_dict()["_is_fitted"])
    settings = alone.hparams
    training = copy.deepcopy(alone.model)
    labels = training.calibration.training_defective
    rate = (float(labels.sum()) + 1) / (len(labels) + 2)
    expected = training.calibrate(rate, settings.unknown_rate, settings.synthetic_weight)
    assert thresholds(alone) == pytest.approx(expected._asdict())
    assert thresholds(validated) != pytest.approx(expected._asdict())


def test_the_checkpoint_has_banks_and_thresholds_and_is_what_is_tested(
    small_model: Make, small_data: Make, engine: Make, recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    model, first = small_model(), engine()
    (metrics,) = first.train(model=model, datamodule=small_data())
    state = saved_state(first.best_model_path)
    assert_same_state(state, model.state_dict(), "model.", "post_processor.", "_is_fitted")
    assert bool(state["_is_fitted"])
    assert min(len(state[f"model.{name}_bank.features"]) for name in ("negative", "positive")) >= 20
    assert all(math.isfinite(value) for value in thresholds(model).values())
    data = KSDD2(small_data().root)
    data.setup()
    assert set(model.model.negative_bank.sources + model.model.positive_bank.sources) == set(
        data.train_data.samples.image_path
    )
    (again,) = engine().test(model=ExDD(), datamodule=small_data(), ckpt_path=first.best_model_path, verbose=False)
    assert again == metrics
    assert not [each for each in recwarn if "zero" in str(each.message) or "validation" in str(each.message)]

    second = engine()
    second.predict(model=ExDD(visualizer=False), datamodule=small_data(), ckpt_path=first.best_model_path)
    folder = Path(second.trainer.default_root_dir)
    rows = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))["predictions"]
    limit = thresholds(model)["image_threshold"]
    assert [row["label"] == "defective" for row in rows] == [row["raw_score"] > limit for row in rows]
    assert all(row["num_regions"] is not None for row in rows)


def test_lightnings_trainer_takes_one_pass_and_saves_after_it(
    small_model: Make, small_data: Make, tmp_path: Path
) -> None:
    """Also where it is told to train on, and to validate less often than it trains."""
    model = small_model(evaluator=False)
    trainer = Trainer(
        max_epochs=3,
        check_val_every_n_epoch=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=small_data())
    assert trainer.current_epoch == 1
    (path,) = tmp_path.rglob("*.ckpt")
    assert_same_state(saved_state(path), model.state_dict(), "model.", "post_processor.", "_is_fitted")
    assert len(model.model.negative_bank) > 0


def test_validating_says_that_there_is_nothing_and_changes_nothing(
    trained: tuple[ExDD, Path], small_data: Make, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(trained[0])
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        assert engine().validate(model=model, datamodule=small_data()) == []
    assert caplog.text.count("nothing is validated, because `val_split_ratio` is 0") == 1
    assert FIX in caplog.text
    assert_same_state(model.state_dict(), before, "model.", "post_processor.")


@pytest.mark.parametrize(
    ("arguments", "ratio", "known"),
    [
        ({"scoring": "paper"}, 0, {}),
        ({"scoring": "published"}, 0, {}),
        ({"scoring": "normal"}, 0, {}),
        ({"scoring": "ratio"}, 0, {}),
        ({"scoring": "paper", "image_scoring": "calibrated"}, 0, {"image"}),
        ({"scoring": "calibrated"}, 0, {"image", "pixel"}),
        ({"scoring": "calibrated", "post_processor": False}, 0, {}),
        ({"scoring": "paper"}, 0.2, {"image", "pixel"}),
    ],
)
def test_scorings_without_a_threshold_of_their_own_say_so_once(
    arguments: dict[str, Any],
    ratio: float,
    known: set[str],
    small_model: Make,
    small_data: Make,
    engine: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = small_model(**arguments)
    with caplog.at_level(logging.WARNING):
        engine().fit(model=model, datamodule=small_data(val_split_ratio=ratio))
    found = {name.partition("_")[0] for name, value in thresholds(model).items() if math.isfinite(value)}
    assert found == set(known)
    warned = [message for message in caplog.messages if "no validation images" in message]
    assert len(warned) == (len(known) < 2 and model.post_processor is not None)
    assert all(FIX in message for message in warned)


def test_thresholds_of_an_earlier_training_do_not_stay(
    trained: tuple[ExDD, Path], small_model: Make, small_data: Make, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(scoring="paper")
    with caplog.at_level(logging.WARNING):
        engine().fit(model=model, datamodule=small_data(), ckpt_path=trained[1])
    assert all(map(math.isnan, thresholds(model).values()))
    assert caplog.text.count(FIX) == 1


def test_a_table_without_thresholds_has_no_labels(small_model: Make, small_data: Make, engine: Make) -> None:
    """Anomalib would compare raw scores with 0.5."""
    model, first = small_model(scoring="paper", visualizer=False), engine()
    first.fit(model=model, datamodule=small_data())
    first.predict(model=model, datamodule=small_data())
    folder = Path(first.trainer.default_root_dir)
    rows = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))["predictions"]
    assert len(rows) == 6
    for row in rows:
        assert row["raw_score"] == pytest.approx(row["score"])
        assert row["label"] is row["threshold"] is row["regions"] is None


# A small coreset: each of Patchcore's steps leaves megabytes behind under glibc (`comparison/allocation.py`).
@pytest.mark.parametrize(("kind", "settings"), [(Padim, {}), (Patchcore, {"coreset_sampling_ratio": 0.002})])
def test_other_models_train_and_test_with_a_line_that_tells_of_the_threshold(
    kind: Any, settings: dict[str, Any], small_data: Make, engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = kind(backbone="resnet18", pre_trained=False, visualizer=False, **settings)
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(validation|across ranks)")
        (metrics,) = engine().train(model=model, datamodule=small_data(num_defects=0))
    assert metrics["image_AUROC"] >= 0
    (line,) = [message for message in caplog.messages if "no validation images" in message]
    assert "other models then have none" in line
    assert FIX in line
    assert math.isnan(float(model.post_processor.image_threshold))
