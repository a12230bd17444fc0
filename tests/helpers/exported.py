"""What the tests of all models' exports share: the extra they need, images, and the engines that run an export."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image

from anomalib_exdd.images.reading import read_image

needs_openvino = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript", "openvino")),
    reason="the extra `openvino` is not installed",
)


def random_images(count: int, size: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(count).random((count, 3, *size)).astype(np.float32)


def run_exports(model: Any, folder: Path, size: Sequence[int]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Export to ONNX and OpenVINO; yield batches of one, two and three images, and what each engine makes of them."""
    import onnxruntime  # noqa: PLC0415
    import openvino  # noqa: PLC0415

    onnx = model.to_onnx(folder, input_size=size)
    assert "faiss" not in onnx.read_bytes().decode("latin1").lower()
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    compiled = openvino.Core().compile_model(
        model.to_openvino(folder, input_size=size), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for count in (1, 2, 3):
        batch = random_images(count, size)
        yield batch, dict(zip(names, session.run(None, {session.get_inputs()[0].name: batch}), strict=True))
        result = compiled(batch)
        yield batch, {output.any_name: result[output] for output in compiled.outputs}


def write_photos(folder: Path, size: Sequence[int]) -> list[Path]:
    """Write photos that are larger than, as large as and smaller than a model's images, and of unusual kinds."""
    height, width = size
    kinds: list[tuple[str, int, int, dict[str, Any]]] = [
        ("large.png", 2 * height + 11, 5 * width - 3, {}),
        ("mixed.png", height // 2, 3 * width, {}),
        ("equal.png", height, width, {}),
        ("small.png", height // 2 + 3, width // 3, {}),
        ("transparent.png", 2 * height, 2 * width, {"alpha": True}),
    ]
    paths = []
    for number, (name, rows, columns, options) in enumerate(kinds):
        channels = 4 if options.pop("alpha", False) else 3
        pixels = np.random.default_rng(number).integers(0, 256, (rows, columns, channels), dtype=np.uint8)
        paths.append(folder / name)
        Image.fromarray(pixels).save(paths[-1], **options)
    deep = np.random.default_rng(9).integers(0, 65536, (2 * height, 2 * width), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return [*paths, folder / "deep.png"]


def assert_exports_predict_as_the_engine(
    model: Any, size: Sequence[int], folder: Path, monkeypatch: pytest.MonkeyPatch, *, fixed: bool
) -> None:
    """Compare exports with ``Engine.predict``, from the files on, in Anomalib's inferencers and in ONNX Runtime.

    Exports are for images of any size, or for the size of one photo, which the model shrinks.
    """
    import onnxruntime  # noqa: PLC0415

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(folder)  # OpenVINO's inferencer writes its cache to the working folder
    photos, export = write_photos(folder, size), {}
    assert error_without_antialiasing(model, photos[0]) > 0.01
    if fixed:
        with Image.open(photos[0]) as photo:
            photos, export = photos[:1], {"input_size": (photo.height, photo.width)}
    engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    in_torch = TorchInferencer(model.to_torch(folder), device="cpu")
    in_openvino = OpenVINOInferencer(model.to_openvino(folder, **export), device="CPU", config=exact)
    session = onnxruntime.InferenceSession(model.to_onnx(folder, **export), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for photo in photos:
        expected = engine.predict(model=model, dataset=PredictDataset(path=photo), return_predictions=True)[0]
        pixels = np.asarray(Image.open(photo).convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255
        given: Any = photo
        if photo.stem == "deep":  # as the README says: Anomalib's own reading would clip it
            given = read_image(photo)
            pixels = given[None].numpy()
        of_onnx = dict(zip(names, session.run(None, {session.get_inputs()[0].name: pixels}), strict=True))
        with torch.no_grad():
            of_torch = in_torch.predict(given)
        for engine_name, found in (
            ("torch", {name: getattr(of_torch, name) for name in names}),
            ("OpenVINO", {name: getattr(in_openvino.predict(given), name) for name in names}),
            ("ONNX Runtime", of_onnx),
        ):
            _assert_same_prediction(found, expected, f"{photo.name} in {engine_name}")


def _assert_same_prediction(found: dict[str, Any], expected: Any, name: str) -> None:
    anomaly_map = expected.anomaly_map.numpy().ravel()
    assert np.mean((anomaly_map > 0) & (anomaly_map < 1)) > 0.9, "the test's maps are clipped"
    np.testing.assert_allclose(np.ravel(found["pred_score"]), expected.pred_score.numpy(), atol=1e-4, err_msg=name)
    np.testing.assert_allclose(np.ravel(found["anomaly_map"]), anomaly_map, atol=1e-4, err_msg=name)
    assert np.ravel(found["pred_label"]).tolist() == expected.pred_label.tolist()
    differs = np.ravel(found["pred_mask"]) != expected.pred_mask.numpy().ravel()
    assert (np.abs(anomaly_map - 0.5)[differs] < 1e-4).all()


def error_without_antialiasing(model: Any, photo: Path) -> float:
    """Return by how much the score differs when an image is resized as Anomalib's own exports do."""
    image = torch.from_numpy(np.asarray(Image.open(photo).convert("RGB"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        plain, antialiased = (
            model.post_processor(model.model(transform(image))).pred_score
            for transform in (PreProcessor(model.pre_processor.transform), model.pre_processor.transform)
        )
    return float((plain - antialiased).abs())
