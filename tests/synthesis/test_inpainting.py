"""Inpainting pipelines are found, loaded and fed rightly; DIAG's settings; nothing outside the mask changes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from anomalib_exdd.synthesis import Request, Synthesis
from anomalib_exdd.synthesis.crops import Window, cut, cut_mask, paste_back, stretch_mask, window_around, working_size
from anomalib_exdd.synthesis.diffusion_pipeline import find_model, read_pipeline
from anomalib_exdd.synthesis.inpainting import DiagSynthesizer
from made_up_defects import textured
from tiny_pipeline import tiny_pipeline, wanted

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**arguments: Any) -> DiagSynthesizer:
    plain = {"prompts": ["a surface with a scratch"], "negative_prompt": "", "guidance_scale": 7.5}
    return DiagSynthesizer(**{"model": str(tiny_pipeline()), "num_inference_steps": 3, **plain, **arguments})


def grey_levels(first: Synthesis, second: Synthesis) -> int:
    return int(np.abs(first.image.astype(int) - second.image).max())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the tiny pipeline to spoil."""
    return Path(shutil.copytree(tiny_pipeline(), tmp_path / "copied"))


# Finding and loading


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match=r'diffusers cannot be found.*pip install "anomalib-exdd\[synthesis\]"'):
        DiagSynthesizer().synthesize([wanted()])


def test_a_folder_has_a_fingerprint_that_changes_with_its_weights(copied: Path) -> None:
    before = find_model(str(copied))
    assert before.is_local
    assert before.name == "copied"
    assert before.revision == find_model(str(tiny_pipeline())).revision
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_model(str(copied)).revision != before.revision


def test_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("model", ["/nowhere/at/all", "owner/not a name"])
def test_neither_a_folder_nor_a_name(model: str) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a name on the Hugging Face hub"):
        find_model(model)


def test_the_hub_is_not_reachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"owner/model` is not in .*not reachable.*hf download owner/model"):
        find_model("owner/model", "v1")


def test_a_model_in_the_hubs_cache_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--owner--model"
    shutil.copytree(tiny_pipeline(), cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "diffusers.pipelines.pipeline_utils.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = tiny(model="owner/model").synthesize([wanted()])[0]
    assert (result.details["model"], result.details["revision"]) == ("owner/model", commit)
    assert grey_levels(result, tiny().synthesize([wanted()])[0]) == 0


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("NoSuchPipeline", "a NoSuchPipeline.* cannot be loaded for inpainting"),
        ("DDPMPipeline", "a DDPMPipeline.* cannot be loaded for inpainting"),
    ],
)
def test_other_pipelines_are_refused(copied: Path, class_name: str, message: str) -> None:
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": class_name}))
    with pytest.raises(ValueError, match=message):
        read_pipeline(find_model(str(copied)))


@pytest.mark.parametrize(
    ("part", "name"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_pickles_are_refused(copied: Path, part: str, name: str) -> None:
    weights = copied / part / f"{name}.safetensors"
    pickled = "pytorch_model" if name == "model" else name
    torch.save(load_file(weights), weights.with_name(f"{pickled}.bin"))
    weights.unlink()
    with pytest.raises(
        ValueError, match=r"cannot be loaded for inpainting: .*Only complete weights in safetensors.*`save_pretrained`"
    ):
        read_pipeline(find_model(str(copied)))


def test_missing_weights_are_named(copied: Path) -> None:
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded for inpainting: .*diffusion_pytorch_model.safetensors"):
        read_pipeline(find_model(str(copied)))


def test_half_precision_files_are_taken_where_there_are_no_others_and_the_reverse(tmp_path: Path) -> None:
    whole = read_pipeline(find_model(str(tiny_pipeline())))
    whole.save_pretrained(tmp_path, variant="fp16")
    loaded = read_pipeline(find_model(str(tmp_path)))
    assert loaded.unet.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, whole.unet.conv_in.weight)
    half = read_pipeline(find_model(str(tiny_pipeline())), torch.float16)
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.float16}


def test_nothing_marks_or_censors_the_images() -> None:
    assert read_pipeline(find_model(str(tiny_pipeline()))).watermark is None
    assert read_pipeline(find_model(str(tiny_pipeline("sd")))).safety_checker is None


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"`half_precision` needs a CUDA device, but got 'cpu'"):
        tiny(half_precision=True).synthesize([wanted()])


# Settings and requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 1, "strength": 0.99}, "leave no step. Use more"),
        ({"strength": 0.0}, "leave no step"),
        ({"strength": 1.5}, "`strength` has to be between 0 and 1"),
        ({"guidance_scale": -1.0}, "`guidance_scale` has to be at least 0"),
        ({"crop_padding": -1}, "`crop_padding` has to be at least 0"),
        ({"working_size": 100}, "multiple of 8, .* but got 100"),
        ({"working_size": (64, 90)}, r"multiple of 8, .* but got \(64, 90\)"),
        ({"prompts": "a scratch"}, "`prompts` has to be a list"),
        ({"prompts": ["a scratch", " "]}, "none of them empty"),
    ],
)
def test_settings_without_a_meaning_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_pipelines_that_would_ignore_settings_are_refused() -> None:
    class Strengthless:
        def __call__(
            self, prompt, image, mask_image, height, width, num_inference_steps, guidance_scale, generator, output_type
        ) -> None: ...

    synthesizer = tiny(negative_prompt="smooth")
    synthesizer.pipeline = Strengthless()
    with pytest.raises(ValueError, match=r"Strengthless\) takes no negative_prompt, strength. Set `strength` to 1"):
        synthesizer.synthesize([wanted()])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((64, 64), dtype=bool), "The mask is empty"),
        (np.ones((64, 64), dtype=np.uint8), r"of bool, but are .* and \[64, 64\] of uint8"),
        (np.ones((64, 32), dtype=bool), r"but are \[64, 64, 3\] of uint8 and \[64, 32\] of bool"),
    ],
)
def test_masks_that_would_silently_do_nothing_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().synthesize([Request(0, 0, textured(0, 64, 64), mask)])


def test_a_request_without_any_words_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt, and `prompts` is empty"):
        tiny(prompts=[]).synthesize([wanted()])


def test_numbers_that_overflow_are_noticed() -> None:
    synthesizer = tiny()
    synthesizer.synthesize([wanted()])
    torch.nn.init.constant_(synthesizer.pipeline.unet.conv_out.bias, float("nan"))
    with pytest.raises(RuntimeError, match=r"overflows in float32. Set `half_precision` to false"):
        synthesizer.synthesize([wanted()])


# Images


@pytest.mark.parametrize("family", ["sdxl", "sd"])
@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_only_the_mask_changes(family: Any, size: tuple[int, int]) -> None:
    request = wanted(1, *size)
    result = tiny(model=str(tiny_pipeline(family))).synthesize([request])[0]
    assert result.image.dtype == np.uint8
    assert np.array_equal(result.image[~request.mask], request.image[~request.mask])
    assert np.abs(result.image.astype(int) - request.image)[request.mask].mean() > 5
    assert np.array_equal(result.mask, request.mask)


def test_a_window_is_drawn_as_diffusers_itself_draws_it() -> None:
    image = textured(9, 64, 64)
    mask = np.zeros((64, 64), dtype=bool)
    mask[24:40, 24:40] = True  # its window is blown up to twice its size: resized masks fit the latent image's cells
    synthesizer = tiny(crop_padding=8, negative_prompt="smooth", guidance_scale=20.0)
    assert_drawn_as_diffusers_does(synthesizer, Request(0, 5, image, mask, "a deep scratch"))


def assert_drawn_as_diffusers_does(synthesizer: DiagSynthesizer, request: Request) -> None:
    """Compare with the pipeline's own way to draw within a crop, at 64 by 64 pixels."""
    drawn = synthesizer.synthesize([request])[0].image
    reference = synthesizer.pipeline(
        prompt=request.prompt or synthesizer.prompts[0],
        negative_prompt=synthesizer.negative_prompt,
        image=Image.fromarray(request.image),
        mask_image=Image.fromarray(request.mask.astype(np.uint8) * 255),
        padding_mask_crop=synthesizer.crop_padding,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=20.0,
        strength=0.99,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    assert np.abs(drawn.astype(int) - np.asarray(reference)).max() <= 1


def test_batches_equal_single_images() -> None:
    requests = [wanted(0), wanted(1, 70, 60), wanted(2), wanted(3, 70, 60), wanted(4)]
    single = tiny(batched=False).synthesize(requests)
    together = tiny(batched=True).synthesize(requests)
    for request, alone, beside in zip(requests, single, together, strict=True):
        assert grey_levels(alone, beside) <= 1
        assert np.array_equal(beside.image[~request.mask], request.image[~request.mask])
        assert alone.details == beside.details


def test_batches_go_through_the_model_together() -> None:
    synthesizer = tiny(batched=True)
    synthesizer.synthesize([wanted()])
    batches: list[int] = []
    synthesizer.pipeline.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    synthesizer.synthesize([wanted(0), wanted(1, 70, 60), wanted(2)])
    assert set(batches) == {2, 4}  # one image and two, each with and without the words


def test_an_image_depends_on_its_request_alone() -> None:
    requests = [wanted(number) for number in range(3)]
    synthesizer = tiny()
    forward = synthesizer.synthesize(requests)
    backward = synthesizer.synthesize(requests[::-1])[::-1]
    alone = tiny().synthesize(requests[1:2])
    assert [grey_levels(*pair) for pair in zip(forward, backward, strict=True)] == [0, 0, 0]
    assert grey_levels(alone[0], forward[1]) == 0
    other = synthesizer.synthesize([wanted(1, seed=77)])
    assert grey_levels(other[0], forward[1]) > 5


def test_words_come_from_the_request_or_in_turn_from_the_list() -> None:
    synthesizer = tiny(prompts=["a dent", "a stain"])
    results = synthesizer.synthesize([wanted(0), wanted(1), wanted(2), wanted(3, prompt="a hole")])
    assert [result.details["prompt"] for result in results] == ["a dent", "a stain", "a dent", "a hole"]
    told = synthesizer.synthesize([wanted(0, prompt="a stain")])[0]
    assert grey_levels(told, results[0]) > 0


def test_details_and_settings_tell_everything() -> None:
    synthesizer = tiny(working_size=(128, 64), crop_padding=4, num_inference_steps=4)
    details = synthesizer.synthesize([wanted(0, 70, 60)])[0].details
    assert details == {
        "prompt": "a surface with a scratch",
        "model": "pipeline",
        "revision": find_model(str(tiny_pipeline())).revision,
        "dtype": "float32",
        "working_size": [128, 64],
        "window": [0, 6, 34, 17],
        "denoising_steps": 3,
    }
    plain = synthesizer.settings
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["working_size"], plain["crop_padding"], plain["strength"]) == ([128, 64], 4, 0.99)


def test_no_requests_need_no_model() -> None:
    assert tiny(model="owner/absent").synthesize([]) == []


def test_the_thinnest_scratch_is_drawn() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[5:60, 3] = True  # between the pixels at which the model samples the mask
    request = Request(0, 0, textured(0, 64, 64), mask)
    image = tiny(crop_padding=64).synthesize([request])[0].image
    assert np.abs(image.astype(int) - request.image)[mask].mean() > 5


# DIAG


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


def test_the_published_mode_stretches_to_1024_and_is_drawn_as_diffusers_does() -> None:
    image, mask = textured(3, 64, 64), np.zeros((64, 64), dtype=bool)
    mask[24:41, 20:33] = True
    synthesizer = DiagSynthesizer(str(tiny_pipeline()), num_inference_steps=3, resolution="stretch", working_size=64)
    assert (synthesizer.prompts[0], synthesizer.negative_prompt, synthesizer.crop_padding) == (
        "white marks on the wall",
        "smooth, plain, black, dark, shadow",
        2,
    )
    assert_drawn_as_diffusers_does(synthesizer, Request(0, 11, image, mask))


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


# Windows


def test_working_sizes() -> None:
    assert working_size((632, 224), None) == (640, 256)
    assert working_size((632, 224), (96, 80)) == (96, 80)
    assert working_size((632, 224), 512) == (832, 320)
    assert working_size((300, 300), 512) == (512, 512)


def test_windows_are_centred_and_moved_into_the_image() -> None:
    mask = np.zeros((100, 100), dtype=bool)
    mask[40:50, 60:64] = True
    assert window_around(mask, 5, (64, 64)) == Window(35, 52, 20, 20)
    mask[0, 99] = True
    assert window_around(mask, 0, (64, 64)) == Window(0, 50, 50, 50)


masks = st.builds(
    lambda height, width, top, left, bottom, right: (
        height,
        width,
        *sorted((top % height, bottom % height)),
        *sorted((left % width, right % width)),
    ),
    *[st.integers(9, 90)] * 2,
    *[st.integers(0, 89)] * 4,
)


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 40), st.sampled_from([(64, 64), (64, 128), (192, 64)]), st.booleans())
def test_windows_hold_the_mask_and_keep_proportions(
    place: tuple[int, ...], padding: int, size: tuple[int, int], whole_cells: bool
) -> None:
    height, width, top, bottom, left, right = place
    mask = np.zeros((height, width), dtype=bool)
    mask[top : bottom + 1, left : right + 1] = True
    window = window_around(mask, padding, size)
    assert window.top <= max(top - padding, 0)
    assert window.left <= max(left - padding, 0)
    assert window.top + window.height >= min(bottom + 1 + padding, height)
    assert window.left + window.width >= min(right + 1 + padding, width)
    assert abs(window.height * size[1] - window.width * size[0]) <= max(size)  # at most a pixel off
    hidden = cut_mask(mask, window, size, whole_cells=whole_cells)
    assert hidden[::8, ::8].any()
    image = textured(0, height, width)
    seen = cut(image, window, size)
    assert seen.shape == (*size, 3)
    result = paste_back(image, 255 - seen, window, mask)
    assert np.array_equal(result[~mask], image[~mask])
    assert not np.array_equal(result[mask], image[mask])


def test_a_window_over_the_border_shows_a_reflection() -> None:
    image = textured(0, 20, 20)
    seen = cut(image, Window(-4, 0, 20, 20), (20, 20))
    assert np.array_equal(seen[4:], image[:16])
    assert np.array_equal(seen[:4], image[4:0:-1])


def test_stretched_masks_never_vanish() -> None:
    mask = np.zeros((640, 640), dtype=bool)
    mask[100, 100] = True
    assert stretch_mask(mask, (64, 64)).sum() == 1
