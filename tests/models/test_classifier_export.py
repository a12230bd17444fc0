"""Exported classifiers give the checkpoint's probabilities and maps, for any number of images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_exdd import DefectClassifier
from exported import assert_exports_predict_as_the_engine, needs_openvino, random_images, run_exports

SIZE = (64, 96)


@pytest.fixture
def model() -> DefectClassifier:
    """A classifier with statistics and thresholds, and scores on both sides of them."""
    model = DefectClassifier("test_resnet", pre_trained=False, image_size=SIZE)
    torch.manual_seed(0)
    model.train().model(torch.randn(8, 3, *SIZE))
    torch.nn.init.normal_(model.model.head.weight, std=0.3)
    with torch.no_grad():
        scores = model.eval().model(model.pre_processor(torch.from_numpy(random_images(8, SIZE))))
    post = model.post_processor
    post._image_threshold.copy_(scores.pred_score.median())  # noqa: SLF001  Anomalib has no other way to set it
    reach = scores.anomaly_map.abs().max() * 4  # wide enough for nothing to be clipped
    post.pixel_min.copy_(-reach)
    post.pixel_max.copy_(reach)
    return model


def assert_parity(found: dict[str, np.ndarray], model: DefectClassifier, batch: np.ndarray) -> None:
    with torch.no_grad():
        expected = model(torch.from_numpy(batch))
    assert expected.anomaly_map.min() > 0
    assert expected.anomaly_map.max() < 1
    np.testing.assert_allclose(found["pred_score"].ravel(), expected.pred_score.numpy().ravel(), rtol=1e-4)
    np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map.numpy(), rtol=1e-4, atol=1e-5)
    assert found["pred_label"].ravel().tolist() == expected.pred_label.numpy().ravel().tolist()
    assert np.mean(found["pred_mask"] != expected.pred_mask.numpy()) < 1e-3


@needs_openvino
def test_onnx_and_openvino_parity_at_any_batch_size(model: DefectClassifier, tmp_path: Path) -> None:
    for batch, found in run_exports(model, tmp_path, SIZE):
        assert_parity(found, model, batch)


@needs_openvino
@pytest.mark.parametrize("fixed", [False, True])
def test_files_are_predicted_as_the_engine_does(
    model: DefectClassifier, fixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_exports_predict_as_the_engine(model, SIZE, tmp_path, monkeypatch, fixed=fixed)
