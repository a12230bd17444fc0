"""How far a run is: what its process writes down, for trainings that end by epochs, by steps, and after one pass."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from anomalib_exdd.comparison import progress
from anomalib_exdd.comparison.progress import (
    PROGRESS_NAME,
    Progress,
    ProgressWriter,
    read_progress,
)

BATCHES = 4


class Line(LightningModule):
    """The smallest model that is trained; one without gradients fills a memory bank instead."""

    def __init__(self, folder: Path, *, gradients: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.folder = folder
        self.gradients = gradients
        self.seen: list[Progress | None] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor | None:
        self.seen.append(read_progress(self.folder))  # as the process that waits does
        return self.layer(batch).square().mean() if self.gradients else None

    def test_step(self, batch: torch.Tensor) -> None:
        assert batch.shape == (1, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1) if self.gradients else None


def trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder}
    return Trainer(callbacks=[ProgressWriter(folder)], **quiet, **arguments)


def loader() -> "DataLoader[Any]":
    return DataLoader(torch.ones(BATCHES, 2))  # type: ignore[arg-type]  a tensor is a data set as well


@pytest.mark.parametrize(
    ("arguments", "gradients", "numbers", "shares"),
    [
        # epoch, epochs, batch, batches, step, steps
        ({"max_epochs": 2}, True, [(e, 2, b, 4, 4 * e - 4 + b, None) for e in (1, 2) for b in (1, 2, 3, 4)], 8),
        ({"max_steps": 6}, True, [(1 + n // 4, None, 1 + n % 4, 4, n + 1, 6) for n in range(6)], 6),
        ({"max_epochs": 1}, False, [(1, 1, b, 4, b, None) for b in (1, 2, 3, 4)], 4),
    ],
    ids=["epochs", "steps", "one pass"],
)
def test_every_batch_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    gradients: bool,
    numbers: list[tuple[int, ...]],
    shares: int,
) -> None:
    monkeypatch.setattr(progress, "WRITE_INTERVAL", 0.0)
    model = Line(tmp_path, gradients=gradients)
    trainer(tmp_path, **arguments).fit(model, loader())
    seen = [*model.seen, read_progress(tmp_path)]
    assert seen[0] is None
    told = [each for each in seen if each is not None]
    assert [(p.epoch, p.epochs, p.batch, p.batches, p.step, p.steps) for p in told] == numbers
    assert {p.stage for p in told} == {"training"}
    assert [p.share for p in told] == pytest.approx([(n + 1) / shares for n in range(shares)])
    seconds = [p.seconds for p in told]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert not list(tmp_path.glob("*.partial"))


def test_tests_are_told_by_what_their_images_are_for(tmp_path: Path) -> None:
    engine = trainer(tmp_path)
    engine.callbacks[0] = ProgressWriter(tmp_path, "validation")
    engine.test(Line(tmp_path), loader(), verbose=False)
    last = read_progress(tmp_path)
    assert last is not None
    assert str(last) == "validation batch 4/4"
    assert last.share == 1


def test_files_and_log_are_written_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch takes a quarter of a second here."""
    written: list[str] = []
    monkeypatch.setattr(progress, "write_json", lambda content, path: written.append(json.dumps(content)))
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
    assert json.loads(written[-1])["batch"] == 1000
    assert len(caplog.messages) == 10  # at 0, 30, ..., 240 s, and the last
    assert caplog.messages[3] == "test batch 361/1000, 02:40 left"
    assert caplog.messages[-1] == "test batch 1000/1000"


@pytest.mark.parametrize(
    ("seconds", "batch", "left"), [(30, 25, 90), (60, 50, 60), (10, 0, None), (10, 100, None), (99, 99, 1)]
)
def test_time_left_goes_on_as_before(seconds: float, batch: int, left: float | None) -> None:
    found = Progress("test", 1, 1, batch, 100, 0, None, seconds).seconds_left
    assert found == (left if left is None else pytest.approx(left))


def test_words_name_what_is_known() -> None:
    assert str(Progress("training", 3, 10, 45, 120, 285, None, 224)) == "epoch 3/10, batch 45/120, 12:00 left"
    assert (
        str(Progress("training", 3, None, 45, 120, 285, 70000, 2))
        == "epoch 3, batch 45/120, step 285/70000, 08:10 left"
    )
    assert str(Progress("training", 1, None, 45, None, 45, None, 9)) == "epoch 1, batch 45"
    assert Progress("training", 1, 10, 60, 120, 60, 100, 9).share == 0.6  # steps end it first


def test_nothing_is_read_of_a_torn_file(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS_NAME).write_text('{"stage": ')
    assert read_progress(tmp_path) is None
