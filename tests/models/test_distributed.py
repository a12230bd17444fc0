"""Two processes give what one gives: the same banks, calibration, metrics and pictures, through the real command."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from anomalib_exdd import ExDD
from anomalib_exdd.data.sample import generate_sample

COMMAND = Path(sysconfig.get_path("scripts")) / "anomalib"
PROCESSES = {1: [], 2: ["--trainer.strategy", "ddp"]}


def run(*arguments: str | Path) -> str:
    """Run a command as a user would, and return what it prints."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(output: str) -> dict[str, float]:
    found = re.findall(r"((?:image|pixel)_\w+)\W+([\d.]+)", output)
    return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def trained_by(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str]]:
    """Train and test with one and with two processes; odd numbers of images do not split evenly."""
    root = tmp_path_factory.mktemp("data") / "surfaces"
    generate_sample(root, train=(9, 6), test=(3, 4))
    found = {}
    for number, strategy in PROCESSES.items():
        results = tmp_path_factory.mktemp(f"processes{number}")
        arguments = ["train", "--model", "ExDD", "--model.backbone", "filter_bank", "--model.image_size", "[96, 64]"]
        arguments += ["--model.negative_minimum", "50", "--data", "KSDD2", "--data.root", str(root)]
        arguments += ["--data.num_workers", "0", "--data.train_batch_size", "2", "--default_root_dir", str(results)]
        arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", str(number), *strategy]
        output = run(*arguments)
        found[number] = (results / "ExDD" / "KSDD2" / "latest", output)
    return found


def state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "weights" / "lightning" / "model.ckpt", weights_only=True)
    return content["state_dict"]  # type: ignore[no-any-return]


def test_banks_and_calibration_are_those_of_one_process(trained_by: dict[int, tuple[Path, str]]) -> None:
    one, two = (state(trained_by[number][0]) for number in PROCESSES)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert two[name] == value, name


def test_metrics_count_every_image_once(trained_by: dict[int, tuple[Path, str]]) -> None:
    one, two = (metrics(trained_by[number][1]) for number in PROCESSES)
    assert len(one) == 6
    assert two == pytest.approx(one, abs=1e-5)


def test_results_are_in_one_folder(trained_by: dict[int, tuple[Path, str]]) -> None:
    names = [sorted(path.name for path in (trained_by[n][0] / "images" / "test").iterdir()) for n in PROCESSES]
    assert len(names[0]) == 7
    assert names[0] == names[1]
    assert [path.name for path in trained_by[2][0].parent.iterdir() if not path.is_symlink()] == ["v0"]


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_splits_the_model_is_refused(kind: type[Strategy], monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        strategy = kind.__new__(kind)  # without what it takes to run one

    model = ExDD(backbone="filter_bank")
    monkeypatch.setattr(type(model), "trainer", property(lambda self: Trainer()))
    with pytest.raises(ValueError, match=rf"strategy {kind.__name__}.*--trainer\.strategy ddp"):
        model.setup("fit")
