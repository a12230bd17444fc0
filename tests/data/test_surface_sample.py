"""The data module of the made-up sample, and that sample read as KSDD2."""

from functools import partial
from pathlib import Path

import pytest
from reading_back import split_counts

from anomalib_exdd.data import KSDD2, SurfaceSample, surface_sample
from anomalib_exdd.data.sample import generate_sample


def test_generates_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface_sample, "generate_sample", partial(generate_sample, train=(5, 3), test=(2, 2)))
    data = SurfaceSample(tmp_path / "new", num_defects=3, num_workers=0, eval_batch_size=2, val_split_ratio=0.34)
    data.prepare_data()
    data.setup()
    assert split_counts(data) == {"train": (3, 3), "val": (2, 0), "test": (2, 2)}
    batch = next(iter(data.test_dataloader()))
    assert batch.gt_mask is not None
    assert batch.gt_label.tolist() == batch.gt_mask.flatten(1).any(dim=1).tolist()
    assert data.name == "SurfaceSample"


def test_asks_for_the_full_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(surface_sample, "generate_sample", lambda *args, **kwargs: asked.append((args, kwargs)))
    SurfaceSample(tmp_path).prepare_data()
    assert asked == [((tmp_path,), {})]


@pytest.mark.parametrize("data_module", [KSDD2, SurfaceSample])
def test_is_not_taken_for_an_incomplete_ksdd2(
    sample_root: Path, data_module: type[KSDD2], caplog: pytest.LogCaptureFixture
) -> None:
    data_module(sample_root, num_workers=0).setup()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
