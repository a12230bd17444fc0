"""Training by way of the disk: the same banks as in memory, and nothing lost when it is interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.models.exdd import training_stores

Make = Callable[..., Any]


class Interruption(Callback):
    """Stops a training after its second batch, as a crash would."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            msg = "the lights went out"
            raise RuntimeError(msg)


def assert_same_banks(first: ExDD, second: ExDD) -> None:
    for ours, theirs in (
        (first.model.negative_bank, second.model.negative_bank),
        (first.model.positive_bank, second.model.positive_bank),
    ):
        assert ours.sources == theirs.sources
        assert ours.kinds == theirs.kinds
        assert torch.equal(ours.source, theirs.source)
        assert torch.equal(ours.position, theirs.position)
        torch.testing.assert_close(ours.features, theirs.features, rtol=1e-3, atol=1e-3)
    ours, theirs = (model.model.calibration.training_probability for model in (first, second))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("positive_patches", ["mask", "farthest"])
def test_the_disk_gives_the_same_banks(
    positive_patches: str, small_model: Make, small_data: Make, engine: Make, tmp_path: Path
) -> None:
    models = {}
    for store in ("memory", "disk"):
        models[store] = small_model(
            feature_store=store, feature_store_dir=tmp_path / "stores", positive_patches=positive_patches
        )
        engine().fit(model=models[store], datamodule=small_data())
    assert_same_banks(models["disk"], models["memory"])
    bank = models["disk"].model.negative_bank.features
    assert torch.equal(bank, bank.half().float())  # it really came from there
    assert list((tmp_path / "stores").iterdir()) == []


def test_an_interrupted_training_goes_on(
    small_model: Make,
    small_data: Make,
    engine: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(folder: str, *callbacks: Callback, **arguments: Any) -> tuple[ExDD, int]:
        model: ExDD = small_model(feature_store="disk", feature_store_dir=tmp_path / folder, **arguments)
        data: KSDD2 = small_data(train_batch_size=2)
        trainer: Engine = engine(callbacks=list(callbacks))
        embedded = 0
        extract = model.model.extract

        def counting(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            nonlocal embedded
            embedded += len(images) if model.training else 0
            return extract(images)

        monkeypatch.setattr(model.model, "extract", counting)
        torch.manual_seed(1)  # one order: the second batch has a normal image, known again once the store is open
        with caplog.at_level("INFO"):
            trainer.fit(model=model, datamodule=data)
        return model, embedded

    whole, images = train("whole")
    with pytest.raises(RuntimeError, match="lights went out"):
        train("stores", Interruption())
    (left,) = (path for path in (tmp_path / "stores").iterdir() if path.is_dir())
    caplog.clear()
    with pytest.raises(RuntimeError, match="lights went out"):
        train("stores", Interruption(), seed=1)  # other settings: another folder
    assert "Going on" not in caplog.text
    resumed, embedded = train("stores")
    assert "Going on with the" in caplog.text
    assert str(left) in caplog.text
    assert embedded < images
    assert_same_banks(resumed, whole)
    assert not left.exists()


def test_little_data_stays_in_memory(
    small_model: Make, small_data: Make, engine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(feature_store_dir=tmp_path / "stores")
    engine().fit(model=model, datamodule=small_data())
    assert not (tmp_path / "stores").exists()
    monkeypatch.setattr(training_stores, "MEMORY_LIMIT", 1000)
    engine().fit(model=model, datamodule=small_data())
    assert (tmp_path / "stores").exists()


def test_a_full_disk_stops_the_training_before_it_starts(
    small_model: Make, small_data: Make, engine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    model = small_model(feature_store="disk", feature_store_dir=tmp_path / "stores")
    with pytest.raises(OSError, match=r"GB free\. Name a folder on a larger disk: `--model\.feature_store_dir`"):
        engine().fit(model=model, datamodule=small_data())
