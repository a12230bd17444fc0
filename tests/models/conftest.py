"""A tiny model and its data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anomalib.engine import Engine

from anomalib_exdd import KSDD2, ExDD
from small import SMALL


@pytest.fixture
def small_data(sample_root: Path) -> Callable[..., KSDD2]:
    def make(**arguments: Any) -> KSDD2:
        return KSDD2(sample_root, **{"num_workers": 0, "train_batch_size": 8, "eval_batch_size": 4, **arguments})

    return make


@pytest.fixture
def small_model() -> Callable[..., ExDD]:
    def make(**arguments: Any) -> ExDD:
        return ExDD(**{**SMALL, **arguments})

    return make


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    def make(**arguments: Any) -> Engine:
        return Engine(
            default_root_dir=tmp_path / "results",
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )

    return make


@pytest.fixture(scope="session")
def trained(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExDD, Path]:
    """A trained model and its checkpoint. Tests must not change the model."""
    model = ExDD(**SMALL)
    root = tmp_path_factory.mktemp("trained")
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    engine.train(model=model, datamodule=KSDD2(sample_root, num_workers=0))
    return model.eval(), Path(str(engine.best_model_path))
