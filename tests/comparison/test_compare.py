"""`anomalib compare`: what it leaves behind, resumed, interrupted and with failures.

Runs are done in this process, which spares importing Anomalib for each of them; the last test has real ones.
"""

import csv
import hashlib
import html
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from tqdm import tqdm

import anomalib_exdd
from anomalib_exdd.comparison import scheduler, worker
from anomalib_exdd.comparison.command import MARKER_NAME, Compare, claim_folder, compare, read_config
from anomalib_exdd.comparison.config import ComparisonConfig, MethodConfig
from anomalib_exdd.comparison.data import DataFiles, build_data
from anomalib_exdd.comparison.environment import describe_allocation
from anomalib_exdd.comparison.methods import build_model, input_size, resolve_method
from anomalib_exdd.comparison.progress import PROGRESS_NAME
from anomalib_exdd.comparison.results import (
    METRICS,
    read_comparison,
    read_explanations,
    read_images,
    read_maps,
)
from anomalib_exdd.comparison.scheduler import PlannedRun
from anomalib_exdd.models.defect_classifier.training import PRESETS
from made_up_surfaces import make_surfaces


class Process:
    """A process that goes through some states, then has ended."""

    def __init__(self, returncode: int = 0, states: Sequence[Callable[[], Any]] = ()) -> None:
        self.returncode = returncode
        self.states = list(states)
        self.stopped: list[str] = []

    def poll(self) -> int | None:
        if not self.states:
            return self.returncode
        self.states.pop(0)()
        return None

    def terminate(self) -> None:
        self.stopped.append("terminate")

    def wait(self, timeout: float) -> None:
        raise subprocess.TimeoutExpired([], timeout)

    def kill(self) -> None:
        self.stopped.append("kill")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_surfaces(tmp_path_factory.mktemp("data") / "surfaces")


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do runs in this process; the list names those that were done."""
    return in_process(monkeypatch)


def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    start, done = PlannedRun.start, []

    def execute(run: PlannedRun) -> Process:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", lambda *_args, **_kwargs: Process())
            start(run)
        done.append(str(run).replace(", seed", ""))
        worker.main(run.folder)
        return Process()

    monkeypatch.setattr(PlannedRun, "start", execute)
    return done


EXDD = {"name": "ExDD", "class_path": "ExDD"}
NORMAL = {"name": "Normal only", "class_path": "ExDD", "init_args": {"scoring": "normal"}, "uses_defects": False}
FAILS = {"name": "EfficientAd", "class_path": "EfficientAd"}  # refuses batches of more than one image


def configuration(root: Path, output: Path, *methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arguments = {"root": str(root), "num_workers": 0, "eval_batch_size": 3, "val_split_ratio": 0.5}
    return {
        "data": {"class_path": "KSDD2", "init_args": arguments},
        "methods": list(methods),
        "image_size": [64, 48],
        "backbone": "filter_bank",
        "seeds": [0, 1],
        "resamples": 100,
        "accelerator": "cpu",
        "output": str(output),
        **changes,
    }


@pytest.fixture(scope="module")
def output(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two methods that work and one that fails, with two seeds."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_process(monkeypatch)
        compare(configuration(root, folder, EXDD, NORMAL, FAILS, baseline="Normal only", title="A try"))
    return folder


def test_results_are_complete(output: Path, root: Path) -> None:
    results = read_comparison(output)
    assert results.title == "A try"
    assert [method.name for method in results.methods] == ["ExDD", "Normal only", "EfficientAd"]
    assert [(run.method, run.seed) for run in results.runs if not run.error] == [
        ("ExDD", 0),
        ("ExDD", 1),
        ("Normal only", 0),
        ("Normal only", 1),
    ]
    assert not list(output.rglob(PROGRESS_NAME))
    for run in results.of("ExDD"):
        assert set(run.metrics) == set(METRICS)
        measured = (
            "negative_entries",
            "positive_entries",
            "fit_seconds",
            "images_per_second",
            "latency_ms",
            "model_mb",
        )
        assert min(getattr(run, name) for name in measured) > 0
        assert run.peak_memory_mb > 100
        assert run.epochs == 1
        assert 0 <= run.accept <= run.reject <= 1
        assert json.loads((output / run.folder / "run.json").read_text()) == vars(run)
    assert results.of("Normal only")[0].positive_entries is None
    assert results.data["name"] == "KSDD2"
    assert {name: results.data[f"test_{name}"] for name in ("normal", "defective")} == {"normal": 4, "defective": 4}
    assert results.data["root"] == str(root.resolve())


def test_failed_runs_are_listed_with_the_reason(output: Path) -> None:
    failed = [run for run in read_comparison(output).runs if run.error]
    assert [(run.method, run.seed) for run in failed] == [("EfficientAd", 0), ("EfficientAd", 1)]
    assert failed[0].error == "ValueError: train_batch_size for EfficientAd should be 1."
    assert failed[0].metrics == {}
    page = (output / "results.md").read_text()
    assert "- EfficientAd, seed 0: ValueError: train_batch_size" in page
    assert not list(output.rglob("training-*"))


def test_image_metrics_are_those_of_the_scores_that_are_kept(output: Path, root: Path) -> None:
    for run in read_comparison(output).of("ExDD"):
        images = read_images(output / run.folder)
        labels, scores = [image.label for image in images], [image.score for image in images]
        assert run.metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
        assert run.metrics["image_AP"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
        names = {Path(image.image).name for image in images}
        assert names == {path.name for path in (root / "test").glob("?????.png")}
        for image in images:
            assert bool(image.mask) == bool(image.label)
            assert not image.mask or Path(image.mask).is_file()


def test_maps_show_the_defects(output: Path) -> None:
    run = read_comparison(output).of("ExDD")[0]
    images, maps = read_images(output / run.folder), read_maps(output / run.folder)
    assert maps is not None
    assert maps.shape == (8, 64, 48)
    inside = [maps[n, 27:34, 15:22].mean() for n, image in enumerate(images) if image.label]
    outside = [maps[n, :20].mean() for n, image in enumerate(images) if image.label]
    assert min(inside) > max(outside)


def test_explanations_name_training_patches(output: Path) -> None:
    results = read_comparison(output)
    run = results.of("ExDD")[0]
    with (output / "data.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    found = read_explanations(output / run.folder)
    assert set(found) == {image.image for image in read_images(output / run.folder)}
    for nearest in found.values():
        assert 0 < min(nearest["row"], nearest["column"]) <= max(nearest["row"], nearest["column"]) < 1
        for patch, label in ((nearest["normal"], "0"), (nearest["defect"], "1")):
            assert rows[patch["source"]]["label"] == label
            assert rows[patch["source"]]["seed_0"] == "train"
            assert 0 < min(patch["row"], patch["column"]) <= max(patch["row"], patch["column"]) < 1
            assert patch["distance"] >= 0


def test_data_are_listed_with_hashes_and_splits(output: Path, root: Path) -> None:
    content = (output / "data.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == read_comparison(output).data["sha256"]
    rows = list(csv.DictReader(content.decode().splitlines()))
    assert len(rows) == 26
    for row in rows:
        assert row["sha256"] == hashlib.sha256(Path(row["image"]).read_bytes()).hexdigest()
        assert row["split"] == Path(row["image"]).parent.name
        assert row["seed_0"] in ({"test"} if row["split"] == "test" else {"train", "val"})
    assert any(row["seed_0"] != row["seed_1"] for row in rows)
    assert sum(row["label"] == "1" for row in rows) == 10


def test_tables_say_the_same_as_the_results(output: Path) -> None:
    results = read_comparison(output)
    with (output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["seed"])) for row in rows] == [(run.method, run.seed) for run in results.runs]
    assert float(rows[0]["pixel_AP"]) == results.runs[0].metrics["pixel_AP"]
    assert rows[-1]["error"].startswith("ValueError")
    page = (output / "results.md").read_text()
    values = [100 * run.metrics["image_AUROC"] for run in results.of("ExDD")]
    assert f"| ExDD | {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} |" in page
    difference = next(d for d in results.differences if (d.method, d.metric) == ("ExDD", "AUPRO"))
    assert difference.baseline == "Normal only"
    assert difference.seeds == 2
    assert f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]" in page
    assert "- Normal only: Without the defective training images." in page


def test_finished_runs_are_kept_and_failed_ones_tried_again(
    root: Path, tmp_path: Path, executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(root, tmp_path / "out", EXDD, FAILS, seeds=[0])
    first = compare(config)
    assert executed == ["ExDD 0", "EfficientAd 0"]
    executed.clear()
    again = compare(config)
    assert executed == ["EfficientAd 0"]
    assert "1 of 2 runs are there already" in capsys.readouterr().out
    assert again.of("ExDD") == first.of("ExDD")


def test_only_some_methods_take_part_and_all_runs_are_kept(root: Path, tmp_path: Path, executed: list[str]) -> None:
    absent = {**EXDD, "name": "No data", "data": {"root": str(tmp_path / "absent")}}
    config = configuration(root, tmp_path / "out", EXDD, NORMAL, absent, seeds=[0], baseline="ExDD")
    some = compare(config, only=["Normal only"])
    assert executed == ["Normal only 0"]
    assert [method.name for method in some.methods] == ["Normal only"]
    assert not some.differences
    more = compare(config, only=["Normal only", "ExDD"])
    assert executed == ["Normal only 0", "ExDD 0"]
    assert [method.name for method in more.methods] == ["ExDD", "Normal only"]
    assert {(each.method, each.baseline) for each in more.differences} == {("Normal only", "ExDD")}
    assert more.of("Normal only") == some.of("Normal only")
    with pytest.raises(ValueError, match=r"`only` has to name some of the methods, .*, but got \['Exdd'\]"):
        compare(config, only=["Exdd"])


def test_changed_settings_and_data_run_again_with_a_line_that_says_so(
    root: Path, tmp_path: Path, executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_surfaces(tmp_path / "data")
    compare(configuration(data, tmp_path / "out", EXDD, NORMAL, seeds=[0]))
    executed.clear()
    changed = {**EXDD, "init_args": {"num_neighbors": 2}}
    compare(configuration(data, tmp_path / "out", changed, NORMAL, seeds=[0]))
    assert executed == ["ExDD 0"]
    assert "ExDD, seed 0: run again, because of run.model.init_args.num_neighbors." in capsys.readouterr().out
    executed.clear()
    image = data / "train" / "10000.png"
    image.write_bytes((data / "train" / "10001.png").read_bytes())
    compare(configuration(data, tmp_path / "out", changed, NORMAL, seeds=[0]))
    assert executed == ["ExDD 0", "Normal only 0"]
    assert "ExDD, seed 0: run again, because of data." in capsys.readouterr().out


def test_bar_tells_how_far_the_run_is(
    root: Path,
    tmp_path: Path,
    executed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    works = PlannedRun.start

    def execute(run: PlannedRun) -> Process:
        works(run)
        told = lambda: (run.folder / PROGRESS_NAME).write_text("epoch 3/10, batch 45/120, 12:00 left")  # noqa: E731
        return Process(states=[lambda: None, told])

    monkeypatch.setattr(PlannedRun, "start", execute)
    monkeypatch.setattr(scheduler, "tqdm", lambda **settings: tqdm(**{**settings, "mininterval": 0}))
    compare(configuration(root, tmp_path / "out", EXDD, seeds=[0, 1]))
    drawn = [line for line in re.split("[\r\n]+", capsys.readouterr().err) if line.startswith("ExDD, seed")]
    told = ", epoch 3/10, batch 45/120, 12:00 left]"
    for seed in ("0", "1"):
        states = [told in line for line in drawn if line.startswith(f"ExDD, seed {seed}:")]
        assert states[0] is False  # nothing of the run before
        assert any(states)
    assert told not in drawn[-1]


def test_interrupted_comparison_leaves_results_and_goes_on(
    root: Path,
    tmp_path: Path,
    executed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configuration(root, tmp_path / "out", EXDD, NORMAL, seeds=[0])
    works, started = PlannedRun.start, []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def execute(run: PlannedRun) -> Process:
        works(run)
        started.append(Process(states=[interrupt] if len(executed) == 2 else []))
        return started[-1]

    with monkeypatch.context() as patch:
        patch.setattr(PlannedRun, "start", execute)
        parser = Compare.get_parser()
        with pytest.raises(SystemExit) as caught:
            Compare().run(parser.parse_object(config))
    assert caught.value.code == 130
    assert "goes on from there" in capsys.readouterr().err
    assert [process.stopped for process in started] == [[], ["terminate", "kill"]]
    assert [run.method for run in read_comparison(tmp_path / "out").runs] == ["ExDD"]
    # What the process had written when it was stopped is not trusted.
    (tmp_path / "out" / "runs" / "Normal_only" / "0" / "run.json").unlink()
    executed.clear()
    assert [run.method for run in compare(config).runs] == ["ExDD", "Normal only"]
    assert executed == ["Normal only 0"]


@pytest.mark.parametrize(
    ("returncode", "said", "error"),
    [
        (-9, "", "The process was ended by SIGKILL: most likely out of memory."),
        (-11, "", "The process was ended by SIGSEGV."),
        (3, "one\nthe last words\n\n", "The process ended with code 3: the last words"),
    ],
)
def test_killed_process_fails_alone(
    root: Path,
    tmp_path: Path,
    executed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    returncode: int,
    said: str,
    error: str,
) -> None:
    works = PlannedRun.start

    def execute(run: PlannedRun) -> Any:
        if str(run).startswith("ExDD"):
            return works(run)
        run.folder.mkdir(parents=True)
        (run.folder / "log.txt").write_text(said)
        (run.folder / "training-x").mkdir()
        return Process(returncode)

    monkeypatch.setattr(PlannedRun, "start", execute)
    results = compare(configuration(root, tmp_path / "out", NORMAL, EXDD, seeds=[0]))
    assert [run.error for run in results.runs] == [error, ""]
    assert not list(tmp_path.rglob("training-*"))


def test_folder_of_another_part_of_the_same_data_is_refused(root: Path, tmp_path: Path, executed: list[str]) -> None:
    arguments = {"root": str(root), "normal": "train/1*[0-9].png", "defective": "test", "num_workers": 0}
    markers = []
    for name, seed in (("bolts", 0), ("bolts", 1), ("nuts", 0)):
        data = {"class_path": "DefectFolder", "init_args": {**arguments, "name": name, "seed": seed}}
        settings = ComparisonConfig(data, [MethodConfig("ExDD", "ExDD")], tmp_path / "out")
        if name == "nuts":
            with pytest.raises(ValueError, match=r"other data: arguments.name differ. Give another --output"):
                claim_folder(settings)
        else:
            claim_folder(settings)
        markers.append((tmp_path / "out" / MARKER_NAME).read_text())
    assert len(set(markers)) == 1
    assert not executed


def test_other_weights_under_the_same_name_run_again(root: Path, tmp_path: Path, executed: list[str]) -> None:
    weights = tmp_path / "weights.safetensors"
    methods = {**EXDD, "init_args": {"backbone": "resnet18", "weights": str(weights)}}
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        save_file(timm.create_model("resnet18", pretrained=False).state_dict(), weights)
        results = compare(configuration(root, tmp_path / "out", methods, seeds=[0]))
        assert [run.error for run in results.runs] == [""]
    assert executed == ["ExDD 0", "ExDD 0"]


def test_folder_of_something_else_is_refused(root: Path, tmp_path: Path, executed: list[str]) -> None:
    other = make_surfaces(tmp_path / "other", seed=1)
    compare(configuration(other, tmp_path / "out", EXDD, seeds=[0]))
    with pytest.raises(ValueError, match="Give another --output"):
        compare(configuration(root, tmp_path / "out", EXDD, seeds=[0]))
    with pytest.raises(ValueError, match="new or empty folder"):
        compare(configuration(root, other, EXDD, seeds=[0]))
    assert executed == ["ExDD 0"]


def test_different_test_images_are_refused(root: Path, tmp_path: Path) -> None:
    other = make_surfaces(tmp_path / "other", seed=1)
    elsewhere = {**NORMAL, "data": {"root": str(other)}}
    with pytest.raises(ValueError, match=r"'ExDD' and 'Normal only' have different test images with seed 0"):
        compare(configuration(root, tmp_path / "out", EXDD, elsewhere, seeds=[0]))
    assert not (tmp_path / "out").exists()


def test_data_that_validate_with_test_images_are_refused(root: Path, tmp_path: Path) -> None:
    for label, number in (("good", 20000), ("bad", 20007)):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes((root / "test" / f"{number}.png").read_bytes())
        (tmp_path / label / "b.png").write_bytes(
            (root / "test" / f"{number - 1 + 2 * (label == 'good')}.png").read_bytes()
        )
    arguments = {"name": "x", "root": str(tmp_path), "normal_dir": "good", "abnormal_dir": "bad"}
    arguments |= {"normal_test_dir": "good", "val_split_mode": "same_as_test"}
    data = {"class_path": "Folder", "init_args": arguments}
    with pytest.raises(ValueError, match=r"use .* test images for validation or training"):
        compare(configuration(root, tmp_path / "out", EXDD, data=data))


def test_unknown_data_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="KSDD3"):
        compare(configuration(root, tmp_path / "out", EXDD, data={"class_path": "KSDD3"}))
    with pytest.raises(ValueError, match=r"there is no file nothing.yaml"):
        compare("nothing.yaml")


def test_package_offers_the_function() -> None:
    assert anomalib_exdd.compare is compare


UNTRAINED = {"backbone": "test_resnet", "pre_trained": False}  # quickly built


def parsed(path: Path, **changes: Any) -> Any:
    parser = Compare.get_parser()
    content = yaml.safe_load(path.read_text())
    return read_config(parser, parser.parse_object({**content, **changes}))


GRADIENT_MODELS = {"Draem", "Dsr", "EfficientAd", "Supersimplenet", "Dinomaly", "InpFormer", "Glass"}


@pytest.mark.parametrize("name", ["compare_patchcore", "compare_sample", "paper_table1", "paper_table2"])
def test_shipped_configurations_are_valid(repository: Path, name: str) -> None:
    """Every model, argument, schedule and data module in them exists."""
    settings = parsed(repository / "configs" / f"{name}.yaml")
    for method in settings.methods:
        ready = resolve_method(method, settings)
        run = ready.run_settings(settings, 0)
        assert run["data"]["class_path"].endswith(settings.data["class_path"].rpartition(".")[2])
        # What is trained by gradients has a length; the others ask for their one pass themselves.
        trained = method.class_path in GRADIENT_MODELS
        assert trained == bool({"max_epochs", "max_steps"} & set(method.trainer))
        if name == "compare_patchcore" and method.image_size is None:
            assert not any("Input" in note for note in ready.described.notes)
    if name == "compare_patchcore":
        names = {method.class_path for method in settings.methods}
        assert names == {"ExDD", "Patchcore", "Padim", "AnomalyVFM", "SuperADD"} | GRADIENT_MODELS


def test_configurations_have_validation_images_where_something_needs_them(repository: Path) -> None:
    """Other models and scorings than ExDD's own need them, and synthetic images for such must not be made from them."""
    shares = {}
    for path in (repository / "configs").rglob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        arguments = content["data"]["init_args"]
        share = arguments.get("base", {"init_args": arguments})["init_args"].get("val_split_ratio", 0)
        shares[path.relative_to(repository / "configs").with_suffix("").as_posix()] = share
    needed = {"compare_patchcore", "compare_sample", "paper", "paper_table1", "paper_table2", "defect_classifier"}
    needed |= {f"in_and_out/{shot}" for shot in ("zero_shot", "few_shot", "full_shot")}
    needed |= {f"synthesize_{name}" for name in ("diag", "dreambooth", "in_and_out")}
    assert {name for name, share in shares.items() if share} == needed
    assert {share for share in shares.values() if share} == {0.2}


@pytest.mark.parametrize("name", ["zero_shot", "few_shot", "full_shot"])
def test_configurations_of_the_classifier_are_valid(repository: Path, name: str) -> None:
    """Every cell is prepared with its preset's input size and batches, and sees the defective images."""
    settings = parsed(repository / "configs" / "in_and_out" / f"{name}.yaml")
    for method in settings.methods:
        ready = resolve_method(method, settings)
        run = ready.run_settings(settings, 0)
        preset = PRESETS[method.init_args["preset"]]
        assert ready.uses_defects
        assert run["image_size"] is None
        built = build_model({**run, "model": {**run["model"], "init_args": {**method.init_args, **UNTRAINED}}})
        assert input_size(built.pre_processor) == preset.image_size
        assert run["data"]["init_args"]["base"]["init_args"]["train_batch_size"] == preset.batch_size


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 synthetic defects, as from somewhere else."""
    return make_surfaces(tmp_path_factory.mktemp("synthetic") / "drawn", train=(0, 150), test=(0, 0), seed=5)


@pytest.mark.parametrize("name", ["paper_table1", "paper_table2"])
def test_tables_of_the_paper_run(
    repository: Path, root: Path, synthetic: Path, tmp_path: Path, executed: list[str], name: str
) -> None:
    """The configurations on made-up images, with the small backbone and without those that download."""
    content = yaml.safe_load((repository / "configs" / f"{name}.yaml").read_text())
    base = {"class_path": "KSDD2", "init_args": {"root": str(root), "num_workers": 0}}
    data = {"class_path": "SyntheticDefects"}
    data["init_args"] = {**content["data"]["init_args"], "base": base, "synthetic_root": str(synthetic)}
    methods = [method for method in content["methods"] if method["class_path"] in {"ExDD", "Patchcore"}][:4]
    for method in methods:
        if method["class_path"] == "Patchcore":
            method["init_args"] |= {"backbone": "resnet18", "pre_trained": False}
    changes = {"data": data, "methods": methods, "image_size": [64, 48], "backbone": "filter_bank", "seeds": [0]}
    results = compare({**content, **changes, "output": str(tmp_path / "out"), "resamples": 100, "accelerator": "cpu"})
    assert [run.error for run in results.runs] == [""] * len(methods)
    entries = {run.method: run.positive_entries for run in results.runs}
    page = (tmp_path / "out" / "results.md").read_text()
    if name == "paper_table2":
        drawn = [entries[f"Paper, {count} synthetic"] for count in (0, 50, 100, 150)]
        assert drawn == sorted(set(drawn))
        published = [method.published.get("image_AUROC") for method in results.methods]
        assert published == [0.931, 0.934, 0.942, 0.935]
        assert "| *Paper, 100 synthetic, published: ExDD, Table 2* | *94.2* |" in page
    else:
        assert entries["PatchCore"] is None
        assert entries["ExDD (full)"] > entries["ExDD (base)"]
        assert "| *PatchCore, published: ExDD, Table 1* | *91.2* |" in page


def test_without_validation_images_only_models_that_find_a_threshold_themselves_have_one(
    root: Path, tmp_path: Path, executed: list[str]
) -> None:
    methods = [
        EXDD,
        {"name": "Paper", "class_path": "ExDD", "init_args": {"scoring": "paper"}},
        {"name": "Padim", "class_path": "Padim", "init_args": {"backbone": "resnet18", "pre_trained": False}},
        {"name": "Classifier", "class_path": "DefectClassifier", "init_args": UNTRAINED, "trainer": {"max_epochs": 1}},
    ]
    config = configuration(root, tmp_path / "out", *methods, seeds=[0])
    config["data"]["init_args"]["val_split_ratio"] = 0
    results = compare(config)
    assert [run.error for run in results.runs] == [""] * 4
    assert {run.method: run.threshold for run in results.runs[1:]} == {"Paper": None, "Padim": None, "Classifier": 0.5}

    # ExDD's has the best F1 of all thresholds, by what the training images' out-of-fold probabilities say.
    parser = Compare.get_parser()
    settings = read_config(parser, parser.parse_object(config))
    run = resolve_method(settings.methods[0], settings).run_settings(settings, 0)
    model = build_model(run)
    worker.build_engine(str(tmp_path), "cpu").fit(model=model, datamodule=build_data(run["data"]))
    probability = model.model.calibration.training_probability.double().numpy()
    defective = model.model.calibration.training_defective.numpy()
    assert len(defective) == 18

    def f1(threshold: float) -> float:
        return float(f1_score(defective, probability > threshold))

    assert f1(results.runs[0].threshold) == max(map(f1, [-1, *probability]))

    note = "threshold of ExDD's calibrated score is the one that it finds on its training images"
    assert (tmp_path / "out" / "results.md").read_text().count(note) == 1
    assert html.unescape((tmp_path / "out" / "report.html").read_text()).count(note) == 1


def test_thresholds_need_no_word_where_there_are_validation_images(output: Path) -> None:
    assert all(run.threshold is not None for run in read_comparison(output).runs if not run.error)
    for name in ("results.md", "report.html"):
        assert "no validation images" not in (output / name).read_text()


def test_images_of_one_seed_are_listed_once(root: Path) -> None:
    files = DataFiles()
    described = {"class_path": "KSDD2", "init_args": {"root": str(root), "val_split_ratio": 0.2}}
    images = files.images(described)
    assert len(images) == len({image.image for image in images}) == 26
    assert files.fingerprint(described) == DataFiles().fingerprint(described)
    assert files.fingerprint(described) != files.fingerprint(
        {"class_path": "KSDD2", "init_args": {"root": str(root), "val_split_ratio": 0.2, "seed": 1}}
    )


def test_the_command_with_a_process_for_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(configuration(root, tmp_path / "out", EXDD, seeds=[0, 1])))
    monkeypatch.setitem(PIPELINE_REGISTRY, "compare", Compare)
    arguments = ["compare", "--config", str(path), "--seeds", "[4]"]
    monkeypatch.setattr(sys, "argv", ["anomalib", *arguments])
    AnomalibCLI(arguments)
    results = read_comparison(tmp_path / "out")
    assert [(run.seed, run.error) for run in results.runs] == [(4, "")]
    assert results.command == f"anomalib compare --config {path} --seeds '[4]'"
    log = (tmp_path / "out" / "runs" / "ExDD" / "4" / "log.txt").read_text()
    for words in ("Throughput", "epoch 1/1, batch 1/1\n", "validation batch 3/3\n", "test batch 3/3\n"):
        assert words in log
    assert results.machine.items() >= describe_allocation().items()
    said = capsys.readouterr().out
    for name in ("results.csv", "results.json", "results.md", "report.html"):
        assert f"{name}: {(tmp_path / 'out' / name).resolve()}" in said
    with pytest.raises(SystemExit, match="Error: Argument `baseline` has to be one of the methods") as caught:
        AnomalibCLI([*arguments, "--baseline", "Best"])
    assert "\n" not in str(caught.value)
