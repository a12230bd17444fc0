"""Anomalib's own command line, from training to export, with this package's names.

The commands run in this process, which spares the import of Anomalib for each of them; the installed scripts themselves
are run by `test_packaging.py`.
"""

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from PIL import Image

from made_up_images import invert

Run = Callable[..., AnomalibCLI]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(folder)

    def command(*arguments: str | Path) -> AnomalibCLI:
        return AnomalibCLI([str(argument) for argument in arguments])

    return command


@pytest.fixture(scope="module")
def checkpoint(folder: Path, sample_root: Path) -> Path:
    """Train with the literal command, and return where the README says that the checkpoint is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["train", "--model", "ExDD", "--data", "KSDD2", "--data.root", str(sample_root)]
        arguments += ["--model.backbone", "filter_bank", "--model.image_size", "[316, 112]", "--data.num_workers", "0"]
        AnomalibCLI(arguments)
    return folder / "results" / "ExDD" / "KSDD2" / "latest" / "weights" / "lightning" / "model.ckpt"


def test_train_writes_checkpoint_and_pictures(checkpoint: Path, sample_root: Path) -> None:
    assert checkpoint.is_file()
    pictures = sorted((checkpoint.parents[2] / "images" / "test").glob("*.png"))
    assert [picture.name for picture in pictures] == sorted(p.name for p in (sample_root / "test").glob("200??.png"))
    with Image.open(pictures[0]) as picture:
        width, height = picture.size
    assert height == 564 + 24  # the line with the decision
    assert width == 4 * 200  # four panels, wide enough for their labels
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"]["backbone"] == "filter_bank"
    assert len(content["state_dict"]["model.positive_bank.features"]) > 0
    thresholds = [value for name, value in content["state_dict"].items() if name.startswith("post_processor.")]
    assert len(thresholds) == 6
    assert all(value.isfinite() for value in thresholds), "found without validation images, and saved"


def test_validate_says_that_there_is_nothing(
    checkpoint: Path, sample_root: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    before = checkpoint.read_bytes()
    run("validate", "--model", "ExDD", "--data", "KSDD2", "--data.root", sample_root, "--ckpt_path", checkpoint)
    assert "nothing is validated, because `val_split_ratio` is 0. Test instead" in caplog.text
    assert checkpoint.read_bytes() == before


def test_test_and_predict_need_no_settings_again(checkpoint: Path, sample_root: Path, run: Run, folder: Path) -> None:
    tested = run("test", "--model", "ExDD", "--data", "KSDD2", "--data.root", sample_root, "--ckpt_path", checkpoint)
    assert tuple(tested.model.hparams.image_size) == (316, 112)
    metrics = tested.engine.trainer.callback_metrics
    assert {"image_AUROC", "image_AUPR", "pixel_AUROC", "pixel_AUPR"} <= set(metrics)
    assert metrics["image_AUROC"] > 0.5

    images = folder / "inbox"
    images.mkdir()
    for name in ("20000", "20003"):
        with Image.open(sample_root / "test" / f"{name}.png") as image:
            image.convert("L").save(images / f"{name}.jpg")  # a grey photo in another format
    predicted = run("predict", "--model", "ExDD", "--data", images, "--ckpt_path", checkpoint)
    written = {path.name for path in Path(predicted.engine.trainer.default_root_dir).rglob("2000?.*")}
    assert {"20000.jpg", "20003.jpg"} <= written


@pytest.mark.parametrize("export_type", ["torch", "onnx", "openvino"])
def test_export_writes_a_model_that_scores(checkpoint: Path, run: Run, folder: Path, export_type: str) -> None:
    if export_type != "torch" and importlib.util.find_spec("openvino") is None:
        pytest.skip("the extra `openvino` is not installed")
    root = folder / "exported"
    run("export", "--model", "ExDD", "--export_type", export_type, "--ckpt_path", checkpoint, "--export_root", root)
    suffix = {"torch": "pt", "onnx": "onnx", "openvino": "xml"}[export_type]
    path = root / "weights" / export_type / f"model.{suffix}"
    assert path.is_file()
    if export_type == "onnx":
        import onnxruntime  # noqa: PLC0415

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        batch = np.random.default_rng(0).random((3, 3, 316, 112)).astype(np.float32)
        scores = session.run(["pred_score"], {session.get_inputs()[0].name: batch})[0]
        assert np.isfinite(scores).all()
        assert scores.size == 3


def test_banks_are_shown_taught_and_forgotten(
    run: Run, checkpoint: Path, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = next(path for path in sorted((sample_root / "test").glob("*_GT.png")) if np.asarray(Image.open(path)).any())
    image, changed = mask.with_name(mask.name.replace("_GT", "")), tmp_path / "changed.ckpt"
    before = checkpoint.read_bytes()
    run(
        "teach", "--ckpt_path", checkpoint, "--image", image, "--mask", mask, "--output", changed, "--kind", "deep dent"
    )
    assert checkpoint.read_bytes() == before
    assert f"patches of {image} (deep dent) are in the positive bank now" in capsys.readouterr().out
    run("info", "--ckpt_path", changed, "--json", tmp_path / "info.json", "--all")
    content = json.loads((tmp_path / "info.json").read_text())
    (taught,) = [each for each in content["sources"] if each["bank"] == "positive" and each["source"] == str(image)]
    assert taught["kind"] == "deep dent"
    (change,) = content["history"]
    assert (change["action"], change["kind"], change["entries"]) == ("teach", "deep dent", taught["entries"])
    shown = capsys.readouterr().out
    assert f"  {taught['entries']:6d}  {image} (deep dent)\n" in shown
    assert f"deep dent: {taught['entries']} entries from 1 images" in shown
    trained = {row["kind"] for row in csv.DictReader((sample_root / "sources.csv").open()) if row["split"] == "train"}
    assert all(f"{kind}: " in shown for kind in trained - {"good"})
    assert f"teach {image} (deep dent): {taught['entries']} entries\n" in shown
    assert content["decisions"]["accept"] <= content["decisions"]["reject"]
    capsys.readouterr()
    run("forget", "--ckpt_path", changed, "--source", image.name)
    assert f"entries of {image} are gone" in capsys.readouterr().out
    run("teach", "--ckpt_path", changed, "--image", image, "--box", "[10, 20, 30, 40]")
    run("info", "--ckpt_path", changed)
    assert "deep dent: " not in capsys.readouterr().out
    run("teach", "--ckpt_path", changed, "--image", image, "--good")
    assert f"patches of {image} are in the negative bank now" in capsys.readouterr().out
    run("info", "--ckpt_path", changed)
    assert f"teach good {image}: " in capsys.readouterr().out
    run("predict", "--model", "ExDD", "--model.explain", "2", "--data", image, "--ckpt_path", changed)
    assert list(Path().rglob(f"explanations/{image.stem}.png"))


def test_an_inverted_mask_is_told_when_it_is_taught(
    run: Run, checkpoint: Path, sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(sample_root / "test" / "20003_GT.png", tmp_path / "mask.png")
    mask = invert(tmp_path / "mask.png")
    image = sample_root / "test" / "20003.png"
    run("teach", "--ckpt_path", checkpoint, "--image", image, "--mask", mask, "--output", tmp_path / "taught.ckpt")
    assert f"defect by these masks (1): `{mask}`" in caplog.text


def test_mistakes_with_the_banks_are_named_in_one_line(run: Run, checkpoint: Path, sample_root: Path) -> None:
    image = sample_root / "test" / "20000.png"
    for arguments, message in (
        (["teach", "--image", image], "Give either --mask or --box"),
        (["teach", "--image", image, "--box", "[0, 0, 5000, 3]"], "in the image of"),
        (["teach", "--image", image, "--box", "[0, 0, 5, 3]", "--good"], "Give either --mask or --box"),
        (["teach", "--image", image, "--good", "--kind", "dent"], "A good part has no kind"),
        (["teach", "--image", "nothing.png", "--box", "[0, 0, 5, 3]"], "nothing.png does not exist"),
        (["forget", "--source", "nobody.png"], "No image in the banks is called nobody.png"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(arguments[0], "--ckpt_path", checkpoint, *arguments[1:])
    with pytest.raises(SystemExit, match=r"missing\.ckpt does not exist"):
        run("info", "--ckpt_path", "missing.ckpt")


def test_labels_without_masks_train(run: Run, sample_root: Path, folder: Path, tmp_path: Path) -> None:
    """The README's way for images with labels and without masks: image metrics, decisions, and a positive bank."""
    for mask in sorted((sample_root / "train").glob("*_GT.png")):
        image = mask.with_name(mask.name.replace("_GT", ""))
        target = tmp_path / ("bad" if np.asarray(Image.open(mask)).any() else "good") / image.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(image.read_bytes())
    run(
        *("train", "--model", "ExDD", "--model.positive_patches", "farthest", "--model.backbone", "filter_bank"),
        *("--model.image_size", "[316, 112]", "--data", "DefectFolder", "--data.name", "labels"),
        *("--data.root", tmp_path, "--data.normal", "good", "--data.defective", "bad", "--data.num_workers", "0"),
    )
    trained = folder / "results" / "ExDD" / "labels" / "latest" / "weights" / "lightning" / "model.ckpt"
    content = torch.load(trained, weights_only=True)["state_dict"]
    assert len(content["model.positive_bank.features"]) > 0
    assert content["model.calibration.training_defective"].any()


def test_wrong_arguments_are_named(run: Run, sample_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--model.scoring", "best"], "scoring"),
        (["--model.coreset_ratio", "0.1"], "coreset_ratio"),
    ):
        with pytest.raises(SystemExit):
            run("train", "--model", "ExDD", "--data", "KSDD2", "--data.root", sample_root, *arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="`negative_ratio` has to be in"):
        run("train", "--model", "ExDD", "--data", "KSDD2", "--model.negative_ratio", "2")


def test_quickstart_configuration_is_valid(repository: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    parsed = AnomalibCLI(["train", "--config", str(repository / "configs" / "quickstart.yaml")], run=False)
    assert type(parsed.model).__name__ == "ExDD"
    assert type(parsed.datamodule).__name__ == "SurfaceSample"
    assert parsed.model.hparams.backbone == "filter_bank"
    switched = ["--model.backbone", "resnet18"]  # the single flag that the README names
    parsed = AnomalibCLI(["train", "--config", str(repository / "configs" / "quickstart.yaml"), *switched], run=False)
    assert parsed.model.model.feature_extractor.layers == ("layer2", "layer3")
    assert parsed.model.model.feature_extractor.pre_trained
