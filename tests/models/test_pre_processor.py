"""What is exported resizes as training does."""

import logging
from typing import Any

import pytest
import torch
from anomalib.pre_processing import PreProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_exdd import DefectClassifier, ExDD
from anomalib_exdd.models.pre_processor import AntialiasedPreProcessor, resize_weights

IMAGES = torch.rand(2, 3, 75, 120, generator=torch.Generator().manual_seed(0))
NORMALIZE = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def traced(processor: PreProcessor) -> torch.Tensor:
    """Return what an export of the pre-processor makes of the images."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    example = torch.rand(3, 3, 32, 34)
    return torch.export.export(processor, (example,), dynamic_shapes=shapes, strict=False).module()(IMAGES)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_products_resize_as_torch_does_with_antialiasing(size: int, target: int, seed: int) -> None:
    signal = torch.rand(1, 1, 1, size, generator=torch.Generator().manual_seed(seed))
    expected = F.interpolate(signal, (1, target), mode="bilinear", antialias=True)
    weights = resize_weights(size, target, signal)
    torch.testing.assert_close(signal @ weights.T, expected, rtol=0, atol=1e-5)
    if size == target:
        assert torch.equal(weights, torch.eye(size))
    if size <= target:
        plain = F.interpolate(signal, (1, target), mode="bilinear", align_corners=False)
        torch.testing.assert_close(signal @ weights.T, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [
        Resize((40, 64)),
        Compose([Resize((64, 40), antialias=True), NORMALIZE]),
        Compose([Compose([Resize((150, 30))]), CenterCrop((20, 20)), NORMALIZE]),
        Resize((40, 64), antialias=False),
        NORMALIZE,
        None,
    ],
)
def test_an_export_sees_what_training_sees(transform: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = IMAGES if transform is None else transform(IMAGES)
    processor = AntialiasedPreProcessor.of(PreProcessor(transform))
    assert isinstance(processor, AntialiasedPreProcessor)
    assert torch.equal(processor(IMAGES), expected)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(traced(processor), expected, rtol=0, atol=1e-5)
    assert "antialiasing" not in caplog.text


@pytest.mark.parametrize("resize", [Resize((40, 64), interpolation=InterpolationMode.BICUBIC), Resize(40)])
def test_what_cannot_be_exported_with_antialiasing_is_said(resize: Resize, caplog: pytest.LogCaptureFixture) -> None:
    processor = AntialiasedPreProcessor(resize)
    assert torch.equal(processor(IMAGES), resize(IMAGES))
    with caplog.at_level(logging.WARNING):
        torch.export.export(processor, (IMAGES,), strict=False)
    assert "Exported without antialiasing: Resize(size=[40" in caplog.text


@pytest.mark.parametrize("model", [ExDD, DefectClassifier])
def test_models_take_it_in_place_of_anomalibs(model: type[Any]) -> None:
    transform = Compose([Resize((64, 32), antialias=True), NORMALIZE])
    own = torch.nn.Identity()
    arguments = {"backbone": "test_resnet", "pre_trained": False}
    for given_processor in (True, PreProcessor(transform)):
        built = model(**arguments, image_size=(64, 32), pre_processor=given_processor)
        assert torch.equal(built.pre_processor(IMAGES), transform(IMAGES))
        restored = model(**arguments)
        restored.pre_processor.load_checkpoint_config(built.pre_processor.checkpoint_config())
        assert torch.equal(restored.pre_processor(IMAGES), transform(IMAGES))
        torch.testing.assert_close(traced(restored.pre_processor), transform(IMAGES), rtol=0, atol=1e-5)
    assert model(**arguments, pre_processor=own).pre_processor is own
    assert model(**arguments, pre_processor=False).pre_processor is None
