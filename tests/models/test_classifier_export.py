"""Exported classifiers give the checkpoint's probabilities and maps, for any number of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from exported import needs_openvino, random_images, run_exports
from PIL import Image

from anomalib_exdd import DefectClassifier

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
    post._image_threshold.copy_(scores.pred_score.median())
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
def test_inferencers_agree_on_an_image_of_another_size(
    model: DefectClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 111, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)  # OpenVINO's inferencer writes its cache to the working folder
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    torch_found = TorchInferencer(model.to_torch(tmp_path), device="cpu").predict(tmp_path / "photo.png")
    torch.testing.assert_close(torch_found.pred_score.ravel(), expected.pred_score.ravel(), rtol=1e-4, atol=1e-6)
    inferencer = OpenVINOInferencer(
        model.to_openvino(tmp_path), device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = inferencer.predict(tmp_path / "photo.png")
    np.testing.assert_allclose(np.ravel(found.pred_score), expected.pred_score.numpy().ravel(), rtol=1e-3)
    assert np.asarray(found.anomaly_map).shape[-2:] == SIZE
