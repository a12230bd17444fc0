"""What the tests of all models' exports share: the extra they need, images, and the engines that run an export."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
