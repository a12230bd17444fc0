"""A model that knows the generated surfaces, and images of them."""

from pathlib import Path

import pytest
from anomalib.engine import Engine

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.data.surfaces import generate_sample


@pytest.fixture(scope="session")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("station") / "surfaces"
    generate_sample(root, train=(24, 12), test=(6, 6))
    return root


@pytest.fixture(scope="session")
def trained(surfaces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint; tests that change it copy it first."""
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("trained"), accelerator="cpu", devices=1, logger=False)
    engine.fit(model=ExDD(backbone="filter_bank", image_size=(316, 112)), datamodule=KSDD2(surfaces, num_workers=0))
    return Path(str(engine.best_model_path))
