"""The data module of the made-up sample, and that sample read as KSDD2."""

import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from anomalib_exdd.data import KSDD2, SurfaceSample, surfaces
from anomalib_exdd.data.surfaces import generate_sample, surface_image
from reading_back import kinds_by_name, split_counts


def test_generates_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surfaces, "generate_sample", partial(generate_sample, train=(5, 3), test=(2, 2)))
    data = SurfaceSample(tmp_path / "new", num_defects=3, num_workers=0, eval_batch_size=2, val_split_ratio=0.34)
    data.prepare_data()
    data.setup()
    assert split_counts(data) == {"train": (3, 3), "val": (2, 0), "test": (2, 2)}
    batch = next(iter(data.test_dataloader()))
    assert batch.gt_mask is not None
    assert batch.gt_label.tolist() == batch.gt_mask.flatten(1).any(dim=1).tolist()
    assert data.name == "SurfaceSample"


def test_kinds_are_those_that_were_drawn(sample_root: Path, tmp_path: Path) -> None:
    data = SurfaceSample(sample_root, num_workers=0)
    data.setup()
    samples = pd.concat([data.train_data.samples, data.val_data.samples, data.test_data.samples])
    numbers = [Path(path).stem for path in samples.image_path[samples.label_index == 1]]
    drawn = {number: surface_image(0, int(number), defective=True).kind for number in numbers}
    assert {name: kind for name, kind in kinds_by_name(data).items() if kind} == drawn
    assert len(set(drawn.values())) > 1

    older = shutil.copytree(sample_root, tmp_path / "older", ignore=shutil.ignore_patterns("sources.csv"))
    data = SurfaceSample(older, num_workers=0)
    data.setup()
    assert set(kinds_by_name(data).values()) == {""}


def test_asks_for_the_full_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(surfaces, "generate_sample", lambda *args, **kwargs: asked.append((args, kwargs)))
    SurfaceSample(tmp_path).prepare_data()
    assert asked == [((tmp_path,), {})]


@pytest.mark.parametrize("data_module", [KSDD2, SurfaceSample])
def test_is_not_taken_for_an_incomplete_ksdd2(
    sample_root: Path, data_module: type[KSDD2], caplog: pytest.LogCaptureFixture
) -> None:
    data_module(sample_root, num_workers=0).setup()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
