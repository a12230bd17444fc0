"""An exported file says by which thresholds to judge its scores; the examples do so."""

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.models.exdd.export import export_metadata
from exported import needs_openvino
from filled import filled

pytestmark = needs_openvino


@pytest.fixture(scope="module")
def exported(trained: tuple[ExDD, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[ExDD, Path]:
    """A trained model with decisions, and its export for OpenVINO."""
    model = trained[0]
    assert model.decisions is not None
    return model, model.to_openvino(tmp_path_factory.mktemp("exported"))


def parts(root: Path) -> list[Path]:
    return sorted(path for path in (root / "test").glob("*.png") if not path.stem.endswith("_GT"))


def expected_line(model: ExDD, photo: Path, sample_root: Path) -> tuple[str, float]:
    """Return decision and probability of an image, from the checkpoint."""
    data = KSDD2(sample_root, num_workers=0)
    data.setup("test")
    row = list(data.test_data.samples["image_path"]).index(str(photo))
    with torch.no_grad():
        image = model.pre_processor(torch.as_tensor(data.test_data[row].image)[None])
        probability = float(model.model(image).pred_score)
    return model.decisions.name(probability), probability


def check_lines(output: str, model: ExDD, photos: list[Path], sample_root: Path) -> None:
    lines = output.splitlines()
    assert len(lines) == len(photos)
    for line, photo in zip(lines, photos, strict=True):
        found = re.fullmatch(r"(.+): (accept|review|reject), probability ([\d.e-]+)", line)
        assert found, line
        decision, probability = expected_line(model, photo, sample_root)
        assert Path(found[1]).stem == photo.stem
        assert found[2] == decision
        assert float(found[3]) == pytest.approx(probability, abs=1e-3)


def test_onnx_and_openvino_say_the_same(exported: tuple[ExDD, Path], tmp_path: Path) -> None:
    import onnx  # noqa: PLC0415
    import openvino  # noqa: PLC0415

    model, path = exported
    expected = export_metadata(model)
    onnx_path = model.to_onnx(tmp_path)
    in_onnx = {each.key: each.value for each in onnx.load(onnx_path, load_external_data=False).metadata_props}
    assert in_onnx == expected
    assert [each.name for each in onnx_path.parent.iterdir() if "partial" in each.name] == []
    network = openvino.Core().read_model(path)
    assert {name: network.get_rt_info(["framework", name]).value for name in expected} == expected
    assert expected["model"] == "ExDD"
    assert expected["version"] == version("anomalib-exdd")
    assert expected["image_size"] == "96 64"
    assert expected["label_threshold"] == expected["mask_threshold"] == "0.5"


def test_thresholds_are_on_the_scale_of_the_exported_score(exported: tuple[ExDD, Path]) -> None:
    model = exported[0]
    written = export_metadata(model)
    found = {name: float(written[name]) for name in written if name.startswith(("accept", "reject", "probability"))}
    post = model.post_processor
    middle, span = float(post.image_threshold), float(post.image_max - post.image_min)
    for name, probability in (("accept_below", model.decisions.accept), ("reject_from", model.decisions.reject)):
        assert found[name] == pytest.approx((probability - middle) / span + 0.5, abs=1e-6)
        back = found["probability_at_0"] + (found["probability_at_1"] - found["probability_at_0"]) * found[name]
        assert back == pytest.approx(probability, abs=1e-6)


def test_without_a_calibration_there_are_no_decisions() -> None:
    found = export_metadata(filled("ratio", backbone="filter_bank"))
    assert found.keys() == {"model", "version", "image_size", "label_threshold", "mask_threshold"}
    untrained = filled("ratio", backbone="filter_bank")
    for name in ("_image_threshold", "_pixel_threshold"):
        getattr(untrained.post_processor, name).fill_(math.nan)
    assert export_metadata(untrained).keys() == {"model", "version", "image_size"}


def test_python_example(exported: tuple[ExDD, Path], repository: Path, sample_root: Path) -> None:
    model, path = exported
    photos = parts(sample_root)
    script = repository / "examples" / "python" / "verdict.py"
    done = subprocess.run([sys.executable, script, path, *photos], capture_output=True, text=True, check=True)
    check_lines(done.stdout, model, photos, sample_root)


@pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="no compiler for C++, or no CMake"
)
def test_cpp_example(exported: tuple[ExDD, Path], repository: Path, sample_root: Path, tmp_path: Path) -> None:
    package = Path(str(importlib.util.find_spec("openvino").origin)).parent
    if not (package / "cmake").is_dir():
        pytest.skip("this OpenVINO has no headers")
    model, path = exported
    source = repository / "examples" / "cpp"
    configure = ["cmake", "-S", source, "-B", tmp_path / "build", f"-DOpenVINO_DIR={package / 'cmake'}"]
    for command in (configure, ["cmake", "--build", tmp_path / "build"]):
        subprocess.run(command, capture_output=True, check=True)
    program = tmp_path / "build" / "verdict"
    photos, output = parts(sample_root), ""
    for photo in photos:
        picture = tmp_path / f"{photo.stem}.ppm"
        with Image.open(photo) as image:
            image.convert("RGB").save(picture)
        output += subprocess.run([program, path, picture], capture_output=True, text=True, check=True).stdout
    check_lines(output, model, photos, sample_root)
    failed = subprocess.run([program, path, photos[0]], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "is not a binary PPM" in failed.stderr
