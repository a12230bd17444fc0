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

from anomalib_exdd import DefectClassifier, ExDD
from anomalib_exdd.data.surfaces import generate_sample
from anomalib_exdd.models.callbacks.distributed import GradientAnchor
from toy_surfaces import HEIGHT, WIDTH, write_toy

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
    assert one["model.positive_bank._extra_state"]["kinds"]
    assert all(value.isfinite() for name, value in one.items() if name.startswith("post_processor."))
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


@pytest.fixture(scope="module", params=[("0.2", 32), ("0", 40)], ids=["validated", "unvalidated"])
def classifiers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str]]:
    """Train the classifier in steps of all training images, which one process takes alone and two share.

    A backbone without batch norms: their statistics would be those of each process.
    """
    ratio, images = request.param
    root = write_toy(tmp_path_factory.mktemp("data") / "toy", train=(25, 15), test=(3, 4))
    found = {}
    for number, strategy in PROCESSES.items():
        results = tmp_path_factory.mktemp(f"classifier{number}")
        arguments = ["train", "--model", "DefectClassifier", "--model.backbone", "test_convnext"]
        arguments += ["--model.pre_trained", "false", "--model.image_size", f"[{HEIGHT}, {WIDTH}]"]
        arguments += ["--model.learning_rate", "0.05", "--data", "KSDD2", "--data.root", str(root)]
        arguments += ["--data.num_workers", "0", "--data.train_batch_size", str(images // number)]
        arguments += ["--data.val_split_ratio", ratio]
        arguments += ["--default_root_dir", str(results), "--trainer.max_epochs", "3"]
        arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", str(number), *strategy]
        found[number] = (results / "DefectClassifier" / "KSDD2" / "latest", run(*arguments))
    return found


def test_a_classifier_learns_what_it_learns_in_one_process(classifiers: dict[int, tuple[Path, str]]) -> None:
    first, last = "model.backbone.stem.0.weight", "model.head.weight"
    one, two = (state(classifiers[number][0]) for number in PROCESSES)
    untrained = DefectClassifier("test_convnext", pre_trained=False).state_dict()
    for name in (first, last):
        assert not torch.equal(one[name], untrained[name])
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
    for name, value in one.items():  # thresholds too
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
        else:
            assert two[name] == value, name
    contents = [
        torch.load(classifiers[number][0] / "weights" / "lightning" / "model.ckpt", weights_only=True)
        for number in PROCESSES
    ]
    assert contents[0]["epoch"] == contents[1]["epoch"]
    trained_with = [content["defect_classifier_training"] for content in contents]
    assert trained_with[0] == trained_with[1]
    assert trained_with[1]["batch_size"] in {32, 40}


def test_a_classifiers_metrics_and_pictures_are_those_of_one_process(classifiers: dict[int, tuple[Path, str]]) -> None:
    one, two = (metrics(classifiers[number][1]) for number in PROCESSES)
    assert len(one) == 6
    assert two == pytest.approx(one, abs=1e-3)
    names = [sorted(path.name for path in (classifiers[n][0] / "images" / "test").iterdir()) for n in PROCESSES]
    assert len(names[0]) == 7
    assert names[0] == names[1]
    assert [path.name for path in classifiers[2][0].parent.iterdir() if not path.is_symlink()] == ["v0"]
    weights = sorted(path.name for path in (classifiers[2][0] / "weights" / "lightning").iterdir())
    assert weights == ["last.ckpt", "model.ckpt"]


def test_the_gradient_anchor_changes_nothing_and_is_in_no_checkpoint() -> None:
    anchor = GradientAnchor()
    loss = anchor()
    loss.backward()
    assert loss == 0
    assert anchor.value.grad == 0
    assert not anchor.state_dict()
    anchor.load_state_dict({}, strict=True)
    assert not [name for name in ExDD("filter_bank").state_dict() if "anchor" in name]


@pytest.mark.parametrize("model", [ExDD, DefectClassifier])
@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_splits_the_model_is_refused(
    kind: type[Strategy], model: type[ExDD | DefectClassifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        strategy = kind.__new__(kind)  # without what it takes to run one

    backbone = "filter_bank" if model is ExDD else "test_resnet"
    monkeypatch.setattr(model, "trainer", property(lambda self: Trainer()))
    with pytest.raises(ValueError, match=rf"strategy {kind.__name__}.*--trainer\.strategy ddp"):
        model(backbone).setup("fit")
