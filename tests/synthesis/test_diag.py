"""DIAG's preset is the published one, and so is what it draws in the published mode."""

import inspect
import json

import numpy as np
import pytest
import torch
from made_up_defects import textured
from PIL import Image
from tiny_pipeline import tiny_pipeline, wanted

from anomalib_exdd.synthesis import Request
from anomalib_exdd.synthesis.diag import DiagSynthesizer
from anomalib_exdd.synthesis.inpainting import InpaintingSynthesizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_preset_is_the_published_one() -> None:
    assert DiagSynthesizer(resolution="stretch").settings == {
        "model": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        "revision": None,
        "prompts": ["white marks on the wall", "copper metal scratches"],
        "negative_prompt": "smooth, plain, black, dark, shadow",
        "num_inference_steps": 30,
        "guidance_scale": 20.0,
        "strength": 0.99,
        "crop_padding": 2,
        "resolution": "stretch",
        "working_size": None,
        "batched": False,
        "half_precision": "auto",
    }
    assert DiagSynthesizer().settings["crop_padding"] == 32
    assert DiagSynthesizer(crop_padding=7, resolution="stretch").settings["crop_padding"] == 7
    assert not DiagSynthesizer.needs_defects


def test_every_argument_reaches_the_base_class() -> None:
    names = list(inspect.signature(DiagSynthesizer).parameters)
    assert names == list(inspect.signature(InpaintingSynthesizer).parameters)
    given = {
        "model": "owner/model",
        "revision": "v2",
        "prompts": ["dents"],
        "negative_prompt": "smooth",
        "num_inference_steps": 7,
        "guidance_scale": 3.0,
        "strength": 0.5,
        "crop_padding": 9,
        "resolution": "stretch",
        "working_size": 64,
        "batched": True,
        "half_precision": False,
        "offload": True,
    }
    assert sorted(given) == sorted(names)
    synthesizer = DiagSynthesizer(**given)  # type: ignore[arg-type]
    assert synthesizer.settings == {name: value for name, value in given.items() if name != "offload"}
    assert synthesizer.offload
    assert json.loads(json.dumps(synthesizer.settings)) == synthesizer.settings


def test_the_published_mode_stretches_to_1024_and_is_drawn_as_diffusers_does() -> None:
    image, mask = textured(3, 64, 64), np.zeros((64, 64), dtype=bool)
    mask[24:41, 20:33] = True
    synthesizer = DiagSynthesizer(str(tiny_pipeline()), num_inference_steps=3, resolution="stretch", working_size=64)
    drawn = synthesizer.synthesize([Request(0, 11, image, mask)])[0]
    assert DiagSynthesizer(resolution="stretch")._size_for((632, 224)) == (1024, 1024)
    reference = synthesizer._pipeline(
        prompt="white marks on the wall",
        negative_prompt="smooth, plain, black, dark, shadow",
        image=Image.fromarray(image),
        mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
        padding_mask_crop=2,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=20.0,
        strength=0.99,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    assert np.abs(drawn.image.astype(int) - np.asarray(reference)).max() <= 1


def test_stretching_blurs_the_background_and_native_does_not() -> None:
    request = wanted(0, 70, 45)
    outside = ~request.mask
    model = str(tiny_pipeline())
    native = DiagSynthesizer(model, num_inference_steps=2).synthesize([request])[0]
    stretched = DiagSynthesizer(model, num_inference_steps=2, resolution="stretch", working_size=128)
    result = stretched.synthesize([request])[0]
    assert np.array_equal(native.image[outside], request.image[outside])
    assert result.image.shape == request.image.shape
    assert result.details["working_size"] == [128, 128]
    change = np.abs(result.image.astype(int) - request.image)
    assert 0 < change[outside].mean() < 3
    assert change[request.mask].mean() > 5
