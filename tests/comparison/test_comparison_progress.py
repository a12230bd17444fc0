"""How far a run is: what its process writes down, for trainings that end by epochs, by steps, and after one pass."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from anomalib_exdd.comparison import progress
from anomalib_exdd.comparison.progress import ProgressWriter, read_progress

BATCHES = 4


class Line(LightningModule):
    """The smallest model that is trained; one without gradients fills a memory bank instead."""

    def __init__(self, folder: Path, *, gradients: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.folder = folder
        self.gradients = gradients
        self.seen: list[str] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor | None:
        self.seen.append(read_progress(self.folder))  # as the process that waits does
        return self.layer(batch).square().mean() if self.gradients else None

    def test_step(self, batch: torch.Tensor) -> None:
        assert batch.shape == (1, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1) if self.gradients else None


def trainer(folder: Path, stage: str = "test", **arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(callbacks=[ProgressWriter(folder, stage)], **quiet, **arguments)


def loader() -> "DataLoader[Any]":
    return DataLoader(torch.ones(BATCHES, 2))  # type: ignore[arg-type]  a tensor is a data set as well


@pytest.mark.parametrize(
    ("arguments", "gradients", "told", "shares"),
    [
        ({"max_epochs": 2}, True, [f"epoch {e}/2, batch {b}/4" for e in (1, 2) for b in (1, 2, 3, 4)], 8),
        ({"max_steps": 8}, True, [f"epoch {1 + n // 4}, batch {1 + n % 4}/4, step {n + 1}/8" for n in range(8)], 8),
        ({"max_epochs": 1}, False, [f"epoch 1/1, batch {b}/4" for b in (1, 2, 3, 4)], 4),
    ],
    ids=["epochs", "steps", "one pass"],
)
def test_every_batch_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    gradients: bool,
    told: list[str],
    shares: int,
) -> None:
    """The clock goes such that the whole training takes ``shares`` minutes, a batch each."""
    monkeypatch.setattr(progress, "WRITE_INTERVAL", 0.0)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    model = Line(tmp_path, gradients=gradients)
    step = model.training_step

    def training_step(batch: torch.Tensor) -> torch.Tensor | None:
        now[0] += 60
        return step(batch)

    monkeypatch.setattr(model, "training_step", training_step)
    trainer(tmp_path, **arguments).fit(model, loader())
    left = [f", {minutes:02d}:00 left" if minutes else "" for minutes in reversed(range(shares))]
    assert [*model.seen, read_progress(tmp_path)] == ["", *(one + two for one, two in zip(told, left, strict=True))]
    assert len(list(tmp_path.iterdir())) == 1


def test_tests_are_told_by_what_their_images_are_for(tmp_path: Path) -> None:
    trainer(tmp_path, "validation").test(Line(tmp_path), loader(), verbose=False)
    assert read_progress(tmp_path) == "validation batch 4/4"


def test_files_and_log_are_written_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch takes a quarter of a second here."""
    written: list[str] = []
    monkeypatch.setattr(progress, "write_file", lambda path, content: written.append(content))
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    writer = ProgressWriter(tmp_path)
    writer.on_test_start(None, None)  # type: ignore[arg-type]
    tested: Any = SimpleNamespace(num_test_batches=[1000])
    with caplog.at_level(logging.INFO, logger=progress.__name__):
        for batch in range(1000):
            now[0] = 0.25 * batch
            writer.on_test_batch_end(tested, None, None, None, batch)
    assert len(written) == 501  # every other batch, and the last
    assert written[-1] == "test batch 1000/1000"
    assert len(caplog.messages) == 10  # at 0, 30, ..., 240 s, and the last
    assert caplog.messages[3] == "test batch 361/1000, 02:40 left"
    assert caplog.messages[-1] == "test batch 1000/1000"


@pytest.mark.parametrize(
    ("seconds", "batch", "left"),
    [(30, 1, ", 01:30 left"), (60, 2, ", 01:00 left"), (99, 3, ", 00:33 left"), (10, 4, "")],
)
def test_time_left_goes_on_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, batch: int, left: str
) -> None:
    writer = ProgressWriter(tmp_path)
    monkeypatch.setattr(progress.time, "monotonic", iter([0.0, seconds]).__next__)
    tested: Any = SimpleNamespace(num_test_batches=[4])
    writer.on_test_start(tested, None)
    writer.on_test_batch_end(tested, None, None, None, batch - 1)
    assert read_progress(tmp_path) == f"test batch {batch}/4{left}"


def test_the_limit_that_is_reached_first_ends_the_training(tmp_path: Path) -> None:
    """Half of the first of ten epochs, and 60 of 100 steps, in 9 seconds."""
    writer = ProgressWriter(tmp_path)
    limits = {"max_epochs": 10, "num_training_batches": 120, "max_steps": 100}
    running: Any = SimpleNamespace(current_epoch=0, global_step=60, **limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.time, "monotonic", iter([0.0, 9.0]).__next__)
        writer.on_train_start(running, None)
        writer.on_train_batch_end(running, None, None, None, 59)
    assert read_progress(tmp_path) == "epoch 1/10, batch 60/120, step 60/100, 00:06 left"


def test_there_is_no_progress_before_the_first_batch(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == ""
