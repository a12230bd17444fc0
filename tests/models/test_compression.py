"""Compressed exports: the backbone is in 8 bits, everything else as it was, and what it costs is told."""

import importlib.util
import logging
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from anomalib.deploy import CompressionType
from sklearn.metrics import average_precision_score
from torch import nn

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.models.exdd import export
from anomalib_exdd.models.exdd.export import average_precisions, backbone_operations, compress
from exported import needs_openvino
from filled import SIZE, filled

needs_nncf = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="NNCF is not installed")


@pytest.fixture(scope="module")
def model() -> ExDD:
    return filled("calibrated", backbone="test_resnet")


@pytest.fixture(scope="module")
def data(sample_root: Path) -> KSDD2:
    data = KSDD2(sample_root, num_workers=0)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def network(model: ExDD, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model as OpenVINO sees it, in full precision."""
    return read(model.to_openvino(tmp_path_factory.mktemp("network")))


def read(path: Path) -> Any:
    import openvino  # noqa: PLC0415

    return openvino.Core().read_model(path)


def predict(network: Any, images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Predict images one by one, in full precision."""
    import openvino  # noqa: PLC0415

    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = [compiled(image[None]) for image in images]
    return {
        output.any_name: np.concatenate([result[output.any_name] for result in results]) for output in compiled.outputs
    }


def convolutions(model: ExDD) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.model.feature_extractor.backbone.modules())


def convolutions_in_8_bits(network: Any) -> set[str]:
    """Name the convolutions whose weights are stored in 8 bits."""
    found = set()
    for op in network.get_ops():
        if op.get_type_name() == "Convolution":
            source = op.input_value(1).get_node()
            while source.get_type_name() in {"Convert", "Multiply", "Subtract", "Reshape"}:
                source = source.input_value(0).get_node()
            if source.get_element_type().get_type_name() in {"i8", "u8"}:
                found.add(op.get_friendly_name())
    return found


def fed_in_8_bits(network: Any) -> set[str]:
    """Name what takes values that were rounded to 8 bits."""
    return {
        target.get_node().get_friendly_name()
        for op in network.get_ops()
        if op.get_type_name() == "FakeQuantize"
        for target in op.output(0).get_target_inputs()
    }


def banks(network: Any, model: ExDD) -> int:
    """Count the constants in full precision of a bank's shape, which both banks have here."""
    return sum(
        op.get_type_name() == "Constant"
        and op.get_element_type().get_type_name() == "f32"
        and tuple(op.get_output_shape(0)) == tuple(model.model.negative_bank.features.shape)
        for op in network.get_ops()
    )


@needs_openvino
@pytest.mark.parametrize(
    ("backbone", "scoring"),
    [("test_resnet", "published"), ("resnet10t", "calibrated"), ("filter_bank", "calibrated")],
)
def test_backbone_is_told_from_the_rest(backbone: str, scoring: str, tmp_path: Path) -> None:
    """Other convolutions (boundary, blur) and products (banks, resizing) are left out, whatever the backbone."""
    model = filled(scoring, backbone=backbone)
    exported = read(model.to_openvino(tmp_path))
    names = backbone_operations(exported)
    kinds = Counter(op.get_type_name() for op in exported.get_ops() if op.get_friendly_name() in names)
    expected = 3 if backbone == "filter_bank" else convolutions(model)
    assert kinds["Convolution"] == expected
    assert not kinds.keys() & {"MatMul", "TopK", "ReduceL2", "Log", "Interpolate"} - (
        {"Log"} if backbone == "filter_bank" else set()
    )


@needs_openvino
@needs_nncf
def test_weights_alone_in_8_bits(network: Any, model: ExDD, data: KSDD2) -> None:
    found = compress(network, CompressionType.INT8, None, None, 0.01)
    # The first one's are multiplied by the normalisation when the model is loaded, and stay.
    assert len(convolutions_in_8_bits(found)) in {convolutions(model) - 1, convolutions(model)}
    assert not fed_in_8_bits(found)
    assert banks(network, model) == banks(found, model) == 2
    images = [data.test_data[row].image.numpy() for row in range(3)]
    plain, small = predict(network, images), predict(found, images)
    np.testing.assert_allclose(small["pred_score"], plain["pred_score"], atol=0.01)
    np.testing.assert_allclose(small["anomaly_map"], plain["anomaly_map"], atol=0.05)


@needs_openvino
@needs_nncf
def test_backbone_computes_in_8_bits(network: Any, model: ExDD, data: KSDD2, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = compress(network, CompressionType.INT8_PTQ, data, None, 0.01)
    assert len(convolutions_in_8_bits(found)) == convolutions(model)
    assert fed_in_8_bits(found) <= backbone_operations(network)
    assert banks(found, model) == 2
    images = [data.test_data[row].image.numpy() for row in range(6)]
    plain, small = predict(network, images), predict(found, images)
    np.testing.assert_allclose(small["pred_score"], plain["pred_score"], atol=0.05)
    assert np.abs(small["anomaly_map"] - plain["anomaly_map"]).mean() < 0.05
    assert "average precision on 6 test images: image AP" in caplog.text


@needs_openvino
@needs_nncf
def test_layers_are_taken_back_until_the_metric_holds(network: Any, data: KSDD2) -> None:
    class OfTheOriginal:
        """A metric that only the first model satisfies: all layers have to be taken back."""

        models = 0

        def reset(self) -> None:
            self.models += 1

        def update(self, prediction: Any) -> None:
            assert prediction.gt_label.shape == prediction.pred_score.shape == (1,)

        def compute(self) -> float:
            return 1.0 if self.models <= 2 else 0.0  # NNCF tries the first on one image before

    metric = OfTheOriginal()
    found = compress(network, CompressionType.INT8_ACQ, data, metric, 0.01)
    assert metric.models > 3
    images = [data.test_data[row].image.numpy() for row in range(2)]
    np.testing.assert_allclose(
        predict(found, images)["pred_score"], predict(network, images)["pred_score"], rtol=0, atol=1e-5
    )


@needs_openvino
@needs_nncf
def test_engine_exports_compressed_for_images_of_one_size(model: ExDD, data: KSDD2, tmp_path: Path) -> None:
    path = model.to_openvino(tmp_path, input_size=SIZE, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    exported = read(path)
    assert tuple(side.get_length() for side in list(exported.input(0).partial_shape)[-2:]) == SIZE
    assert len(convolutions_in_8_bits(exported)) == convolutions(model)
    assert exported.get_rt_info(["framework", "model"]).value == "ExDD"


@needs_openvino
def test_average_precision_agrees_with_scikit_learn(network: Any, data: KSDD2) -> None:
    items = [data.test_data[row] for row in range(len(data.test_data))]
    expected = predict(network, [item.image.numpy() for item in items])
    found = average_precisions(network, data.test_data)
    labels = [int(item.gt_label) for item in items]
    assert found["image AP"] == pytest.approx(average_precision_score(labels, expected["pred_score"]), abs=1e-6)
    masks = []
    for item in items:  # a pixel of the map is defect if any pixel of the image below it is
        mask = np.zeros(SIZE, dtype=bool)
        height, width = item.gt_mask.shape
        for row, column in np.argwhere(item.gt_mask.numpy()):
            tops = [r for r in range(SIZE[0]) if r * height // SIZE[0] <= row < -(-(r + 1) * height // SIZE[0])]
            lefts = [c for c in range(SIZE[1]) if c * width // SIZE[1] <= column < -(-(c + 1) * width // SIZE[1])]
            mask[np.ix_(tops, lefts)] = True
        masks.append(mask[::4, ::4])
    pixels = expected["anomaly_map"][:, 0, ::4, ::4]
    assert found["pixel AP"] == pytest.approx(average_precision_score(np.ravel(masks), pixels.ravel()), abs=1e-6)


@pytest.mark.parametrize(("loss", "level"), [(0.006, logging.WARNING), (0.004, logging.INFO)])
def test_a_loss_of_half_a_point_is_warned_of(
    loss: float, level: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, data: KSDD2
) -> None:
    values = {"original": {"image AP": 0.97, "pixel AP": 0.6}, "compressed": {"image AP": 0.98, "pixel AP": 0.6 - loss}}
    monkeypatch.setattr(export, "average_precisions", lambda model, dataset: values[model])
    with caplog.at_level(logging.INFO):
        export.tell_loss("original", "compressed", data.test_data, CompressionType.INT8)
    (record,) = caplog.records
    assert record.levelno == level
    assert f"image AP 97.0 to 98.0, pixel AP 60.0 to {60 - 100 * loss:.1f}" in record.getMessage()


def test_a_loss_that_cannot_be_measured_is_told(data: KSDD2, caplog: pytest.LogCaptureFixture) -> None:
    one_class = SimpleNamespace(samples=data.test_data.samples[data.test_data.samples["label_index"] == 0])
    export.tell_loss(None, None, one_class, CompressionType.INT8)
    assert "normal and defective test images" in caplog.text


def test_ranges_come_from_validation_images_where_there_are_any(data: KSDD2, sample_root: Path) -> None:
    assert export.calibration_images(data) is data.train_data
    validated = KSDD2(sample_root, val_split_ratio=0.3, num_workers=0)
    validated.setup("fit")
    assert export.calibration_images(validated) is validated.val_data


def test_many_images_are_drawn_from_all_over(data: KSDD2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_IMAGES", 5)
    rows = list(export.image_loader(data.train_data).dataset.indices)
    assert len(rows) == len(set(rows)) == 5
    labels = [int(data.train_data[row].gt_label) for row in rows]
    assert set(labels) == {0, 1}


@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="NNCF is not installed")
@pytest.mark.parametrize("kind", [CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_ranges_need_data(kind: CompressionType) -> None:
    with pytest.raises(ValueError, match=rf"{kind.value}.*`--data KSDD2 --data\.root FOLDER`"):
        compress(None, kind, None, None, 0.01)


def test_absent_nncf_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ModuleNotFoundError, match=r"int8.*anomalib-exdd\[openvino\].*fp16"):
        compress(None, CompressionType.INT8, None, None, 0.01)
