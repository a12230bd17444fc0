"""Exported models give the checkpoint's scores, for any number of images."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.deploy import TorchInferencer

from anomalib_exdd import KSDD2, ExDD
from exported import (
    assert_exports_predict_as_the_engine,
    needs_openvino,
    random_images,
    run_exports,
)
from filled import SIZE, filled


def assert_parity(found: dict[str, np.ndarray], model: ExDD, batch: np.ndarray) -> None:
    with torch.no_grad():
        expected = model(torch.from_numpy(batch))
    np.testing.assert_allclose(found["pred_score"].ravel(), expected.pred_score.numpy().ravel(), rtol=1e-4)
    difference = np.abs(found["anomaly_map"] - expected.anomaly_map.numpy())
    if model.hparams.scoring == "published":  # an 8-bit map: rounding may move a pixel by one of its 255 levels
        assert np.quantile(difference, 0.999) < 1e-4
        assert difference.max() < 0.01
    elif model.hparams.scoring == "calibrated":  # log-odds cross zero: relative to the largest
        assert difference.max() < 1e-4 * expected.anomaly_map.abs().max().item()
    else:
        np.testing.assert_array_less(difference, 1e-4 * expected.anomaly_map.abs().numpy() + 1e-6)
    assert found["pred_label"].ravel().tolist() == expected.pred_label.numpy().ravel().tolist()


@needs_openvino
@pytest.mark.parametrize(
    ("scoring", "arguments"),
    [
        ("calibrated", {"backbone": "filter_bank"}),
        ("calibrated", {"backbone": "filter_bank", "bank_precision": "float16"}),
        ("ratio", {"backbone": "resnet18"}),
        ("paper", {"backbone": "filter_bank"}),
        ("published", {"backbone": "resnet18"}),
        ("normal", {"backbone": "filter_bank", "positive": False}),
    ],
)
def test_onnx_and_openvino_parity_at_any_batch_size(scoring: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = filled(scoring, **arguments)
    for batch, found in run_exports(model, tmp_path, SIZE):
        assert_parity(found, model, batch)


@needs_openvino
@pytest.mark.parametrize("fixed", [False, True])
def test_files_are_predicted_as_the_engine_does(fixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled("calibrated", backbone="test_resnet")
    model.post_processor.pixel_min.copy_(torch.tensor(-40.0))
    model.post_processor.pixel_max.copy_(torch.tensor(40.0))
    assert_exports_predict_as_the_engine(model, SIZE, tmp_path, monkeypatch, fixed=fixed)


@needs_openvino
def test_onnx_is_exported_without_a_detour(
    trained: tuple[ExDD, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnx  # noqa: PLC0415

    with caplog.at_level(logging.WARNING):
        exported = trained[0].to_onnx(tmp_path)
    assert onnx.load(exported).opset_import[0].version == 18
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    assert not [each.getMessage() for each in caplog.records if "version" in each.getMessage()]


def test_torch_export_keeps_the_scores_of_a_model_that_has_searched(
    trained: tuple[ExDD, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_root: Path
) -> None:
    model = trained[0]
    batch = torch.from_numpy(random_images(2, SIZE))
    expected = model(batch)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    exported = TorchInferencer(model.to_torch(tmp_path), device="cpu").model
    torch.testing.assert_close(exported(batch).pred_score, expected.pred_score)
    assert KSDD2(sample_root).name == "KSDD2"
