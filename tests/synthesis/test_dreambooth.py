"""A LoRA is trained, kept, resumed and used again; what draws is what was trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from anomalib_exdd.synthesis import Defect
from anomalib_exdd.synthesis.diffusion_pipeline import find_model, read_pipeline
from anomalib_exdd.synthesis.inpainting import DiagSynthesizer
from anomalib_exdd.synthesis.lora import dreambooth
from anomalib_exdd.synthesis.lora.dreambooth import DreamBoothSynthesizer, digest_of_weights, published_weight
from anomalib_exdd.synthesis.lora.examples import Examples, LoraSettings, random_mask
from anomalib_exdd.synthesis.lora.trainer import LoraTrainer, noise_level_weight
from made_up_defects import textured, with_defect
from tiny_pipeline import tiny_pipeline, wanted

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = LoraSettings("skt background", ("cracked skt background", "scratched skt background"), working_size=64)
DEFECTS = [with_defect(number, 64, 64) for number in range(2)]
NORMALS = [textured(number, 64, 64) for number in range(3)]


def tiny(lora: Path, **arguments: Any) -> DreamBoothSynthesizer:
    small = {"max_steps": 4, "batch_size": 2, "working_size": 64, "num_inference_steps": 2, "learning_rate": 1e-2}
    return DreamBoothSynthesizer(str(lora), **{"model": str(tiny_pipeline()), **small, **arguments})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA that was trained in one go."""
    folder = tmp_path_factory.mktemp("trained") / "lora"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: sums depend on it
    tiny(folder).prepare(DEFECTS, NORMALS)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a training starts."""

    def fail(*_: Any) -> None:
        msg = "A training has started."
        raise AssertionError(msg)

    monkeypatch.setattr(dreambooth, "LoraTrainer", fail)


# Training


def test_the_preset_is_the_published_one() -> None:
    settings = DreamBoothSynthesizer("lora").settings
    published = {
        "instance_prompt": "skt background",
        "class_prompt": "background",
        "prompts": ["cracked skt background", "scratched skt background"],
        "rank": 32,
        "alpha": 16,
        "conv_rank": 4,
        "conv_alpha": 1,
        "learning_rate": 1e-5,
        "batch_size": 12,
        "min_snr": 5.0,
        "prior_weight": 1.0,
        "restarts": 3,
        "clip_skip": 2,
        "working_size": 512,
        "seed": 1234,
    }
    assert {name: settings[name] for name in published} == published
    assert [published_weight(count) for count in (0, 5, 246)] == [0.60, 0.95, 0.80]
    assert json.loads(json.dumps(settings)) == settings


def test_a_finished_lora_has_weights_a_card_and_a_record(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == ["README.md", "lora.json", WEIGHTS]
    names = set(load_file(trained / WEIGHTS))
    for part in ("attn2.to_q.lora_B", "ff.net.0.proj.lora_A", "resnets.0.conv1.lora_A", "downsamplers.0.conv.lora_B"):
        assert any(part in name for name in names), part
    assert not any("text_encoder" in name or "vae" in name for name in names)
    card = (trained / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "license of the base model `pipeline` applies" in card
    record = json.loads((trained / "lora.json").read_text())
    assert json.loads(card.partition("```json")[2].partition("```")[0]) == record
    assert (record["settings"]["rank"], record["settings"]["learning_rate"]) == (32, 0.01)
    assert record["counts"] == {"defects": 2, "normals": 3}
    assert record["base_model"] == "pipeline"  # the folder's path stays on this machine
    assert str(tiny_pipeline()) not in card + json.dumps(record)


def test_an_interrupted_training_ends_like_an_unbroken_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = tmp_path / "lora", Examples.__getitem__

    def stop_in_the_last_step(examples: Examples, position: int) -> Any:
        if position == 7:
            raise KeyboardInterrupt
        return plain(examples, position)

    monkeypatch.setattr(Examples, "__getitem__", stop_in_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        tiny(folder, checkpoint_every=2).prepare(DEFECTS, NORMALS)
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]
    (folder / ".checkpoint.0123.partial.pt").touch()  # as a killed process leaves it
    positions: list[int] = []

    def record_positions(examples: Examples, position: int) -> Any:
        positions.append(position)
        return plain(examples, position)

    monkeypatch.setattr(Examples, "__getitem__", record_positions)
    tiny(folder, checkpoint_every=2).prepare(DEFECTS, NORMALS)
    assert positions == [4, 5, 6, 7]
    resumed, unbroken = load_file(folder / WEIGHTS), load_file(trained / WEIGHTS)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert digest_of_weights(folder / WEIGHTS) == digest_of_weights(trained / WEIGHTS)
    assert {path.name for path in folder.iterdir()} == {path.name for path in trained.iterdir()}


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dreambooth, "write_file", stop)  # when the weights are to be finished
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path / "lora", max_steps=2, checkpoint_every=1).prepare(DEFECTS, NORMALS)
    with pytest.raises(ValueError, match=r"`settings\.rank` was 32 and is 8 now"):
        tiny(tmp_path / "lora", max_steps=2, rank=8).prepare(DEFECTS, NORMALS)


def test_training_lowers_the_loss() -> None:
    settings = replace(SETTINGS, learning_rate=3e-3, max_steps=25, batch_size=2, restarts=1)
    examples = Examples(DEFECTS[:1], NORMALS[:1], settings)
    pipeline = read_pipeline(find_model(str(tiny_pipeline())))
    trainer = LoraTrainer(pipeline, settings)
    batch = [examples[position] for position in range(1000, 1008)]

    def loss() -> float:
        with torch.no_grad():
            return float(trainer.loss(batch, torch.Generator().manual_seed(9)))

    before = loss()
    assert list(trainer.train(examples)) == list(range(1, 26))
    assert loss() < 0.95 * before
    assert all(("lora" in name) == value.requires_grad for name, value in pipeline.unet.named_parameters())


def test_of_a_model_in_half_precision_the_lora_is_trained_in_full(tmp_path: Path) -> None:
    pipeline = read_pipeline(find_model(str(tiny_pipeline())), torch.bfloat16)
    settings = replace(SETTINGS, max_steps=2, batch_size=2, learning_rate=1e-2)
    list(LoraTrainer(pipeline, settings).train(Examples(DEFECTS, NORMALS, settings)))
    lora = {name: value for name, value in pipeline.unet.named_parameters() if "lora" in name}
    assert {value.dtype for value in lora.values()} == {torch.float32}
    assert pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    assert all(torch.isfinite(value).all() for value in lora.values())
    assert any(value.any() for name, value in lora.items() if "lora_B" in name)


def test_stable_diffusion_reads_its_prompts_from_the_last_layer_but_one(tmp_path: Path) -> None:
    model = str(tiny_pipeline("sd"))
    synthesizer = tiny(tmp_path / "lora", model=model, max_steps=1, conv_rank=0)
    synthesizer.prepare([], NORMALS)
    result = synthesizer.synthesize([wanted()])[0]
    assert result.details["lora_weight"] == 0.60
    assert not any("conv" in name for name in load_file(tmp_path / "lora" / WEIGHTS))
    whole, cut = read_pipeline(find_model(model)), synthesizer.pipeline
    tokens = torch.tensor([[515, 3, 516]])
    layers = whole.text_encoder(tokens, output_hidden_states=True).hidden_states
    norm = getattr(whole.text_encoder, "text_model", whole.text_encoder).final_layer_norm
    assert torch.allclose(cut.text_encoder(tokens).last_hidden_state, norm(layers[-2]), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (("sdxl", {"in_channels": 4}), {}, "a U-Net with 9 input channels, made for inpainting"),
    ],
)
def test_models_that_cannot_be_trained(
    tmp_path: Path, model: tuple[Any, dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path / "lora", model=str(tiny_pipeline(model[0], **model[1])), **arguments).prepare(DEFECTS, NORMALS)


def test_a_training_that_diverges_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"diverged at step \d.*Lower `learning_rate`"):
        tiny(tmp_path / "lora", learning_rate=1e25).prepare(DEFECTS, NORMALS)
    assert not (tmp_path / "lora" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` has to be at least 1"),
        ({"max_steps": 0}, "`max_steps` has to be at least 1"),
        ({"batch_size": 0}, "`batch_size` has to be at least 1"),
        ({"prior_weight": -1.0}, "`prior_weight` has to be at least 0"),
        ({"seed": -1}, "`seed` has to be at least 0"),
        ({"checkpoint_every": 0}, "`checkpoint_every` has to be at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **arguments)


def test_the_learning_rate_falls_along_three_cosines() -> None:
    settings = replace(SETTINGS, max_steps=30, learning_rate=2.0)
    trainer, rates = LoraTrainer(read_pipeline(find_model(str(tiny_pipeline()))), settings), []
    for _ in range(30):
        rates += trainer.schedule.get_last_lr()
        trainer.optimizer.step()
        trainer.schedule.step()
    assert [rates[step] for step in (0, 10, 20)] == pytest.approx([2.0] * 3)
    assert [rates[step] for step in (5, 15, 25)] == pytest.approx([1.0] * 3)
    assert rates[:10] == sorted(rates[:10], reverse=True)


def test_noise_levels_count_by_their_limited_ratio() -> None:
    ratio = torch.tensor([1.0, 9.0, 1 / 9])
    noise = noise_level_weight(ratio, 5.0, predicts_velocity=False)
    velocity = noise_level_weight(ratio, 5.0, predicts_velocity=True)
    assert noise.tolist() == pytest.approx([1, 5 / 9, 1])
    assert velocity.tolist() == pytest.approx([1 / 2, 5 / 10, 1 / 10])


# Examples


def test_defects_take_turns_with_normal_images() -> None:
    examples = Examples(DEFECTS, NORMALS, replace(SETTINGS, prior_weight=0.5))
    seen = [examples[position] for position in range(12)]
    assert all(example.prompt == "background" for example in seen[1::2])
    assert {example.weight for example in seen[1::2]} == {0.5}
    assert {example.prompt for example in seen[::2]} <= set(SETTINGS.defect_prompts)
    assert {example.weight for example in seen[::2]} == {1.0}
    assert all(example.image.shape == (64, 64, 3) and example.mask.any() for example in seen)
    orders = [[examples.order(2 * round_ + turn, 2, kind=0) for turn in range(2)] for round_ in range(9)]
    assert all(sorted(order) == [0, 1] for order in orders)
    assert len({tuple(order) for order in orders}) == 2


def test_an_example_depends_on_its_position_alone() -> None:
    first, second = (Examples(DEFECTS, NORMALS, SETTINGS) for _ in range(2))
    late = [second[position] for position in (5, 4)]
    for example, again in zip([first[5], first[4]], late, strict=True):
        assert np.array_equal(example.image, again.image)
        assert np.array_equal(example.mask, again.mask)
        assert example.prompt == again.prompt


def test_without_defects_the_surface_is_all_there_is_to_learn() -> None:
    many = [NORMALS[0]] * 120
    examples = Examples([], many, SETTINGS)
    assert len(examples.normals) == 50
    assert {examples[position].prompt for position in range(6)} == {"skt background"}
    assert len(Examples(DEFECTS, many * 2, SETTINGS).normals) == 200
    assert Examples(DEFECTS, many, replace(SETTINGS, prior_weight=0)).normals == []


def test_all_examples_have_the_commonest_size() -> None:
    tall = [with_defect(number, 192, 64) for number in range(2)]
    examples = Examples([*DEFECTS[:1], *tall], NORMALS, replace(SETTINGS, working_size=128))
    assert examples.size == (192, 64)
    assert {examples[position].image.shape for position in range(6)} == {(192, 64, 3)}


def test_a_defect_without_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of defect `defects/00000.png` is empty"):
        Examples([replace(DEFECTS[0], mask=np.zeros((64, 64), bool))], NORMALS, SETTINGS)


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 100), st.integers(8, 100))
def test_something_is_always_hidden(seed: int, height: int, width: int) -> None:
    mask = random_mask(np.random.default_rng(seed), (height, width))
    assert mask.shape == (height, width)
    assert mask.any()


# Drawing with it


def test_what_is_reloaded_is_what_was_trained(trained: Path) -> None:
    synthesizer = tiny(trained, lora_weight=1.0)
    pipeline = read_pipeline(find_model(str(tiny_pipeline())))
    list(LoraTrainer(pipeline, synthesizer.training).train(Examples(DEFECTS, NORMALS, synthesizer.training)))
    synthesizer.synthesize([wanted()])
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 9, 8, 8, generator=generator), torch.randn(1, 5, 64, generator=generator)
    conditions = {"text_embeds": torch.randn(1, 32, generator=generator), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        first, second, base = (
            unet(latents, 500, encoder_hidden_states=states, added_cond_kwargs=conditions).sample
            for unet in (pipeline.unet, synthesizer.pipeline.unet, read_pipeline(find_model(str(tiny_pipeline()))).unet)
        )
    assert torch.equal(first, second)
    assert (first - base).abs().max() > 1e-3


def test_weight_zero_is_the_base_model(trained: Path) -> None:
    requests = [wanted(0), wanted(1)]
    base = DiagSynthesizer(
        str(tiny_pipeline()),
        num_inference_steps=2,
        working_size=64,
        prompts=DreamBoothSynthesizer("lora").prompts,
        negative_prompt="",
        guidance_scale=7.5,
    )
    plain = base.synthesize(requests)
    off = tiny(trained, lora_weight=0.0).synthesize(requests)
    on = tiny(trained).synthesize(requests)
    assert [np.array_equal(a.image, b.image) for a, b in zip(plain, off, strict=True)] == [True, True]
    assert [np.array_equal(a.image, b.image) for a, b in zip(plain, on, strict=True)] == [False, False]
    assert on[0].details["lora_weight"] == 0.95
    assert len(on[0].details["lora_sha256"]) == 64


@pytest.mark.usefixtures("no_training")
def test_a_finished_lora_is_used_again(trained: Path) -> None:
    tiny(trained).prepare(DEFECTS, NORMALS)
    tiny(trained).prepare([], [])


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "defects", "message"),
    [
        ({"rank": 8}, DEFECTS, "`settings.rank` was 32 and is 8 now"),
        ({"prompts": ["a dent"]}, DEFECTS, r"`settings.defect_prompts` was \[.*\] and is \['a dent'\] now"),
        (
            {},
            DEFECTS[:1],
            "`counts.defects` was 2 and is 1 now; `digests.defects` was '[0-9a-f]{64}' and is",
        ),
    ],
)
def test_a_lora_of_another_training_is_refused(
    trained: Path, arguments: dict[str, Any], defects: list[Defect], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(trained, **arguments).prepare(defects, NORMALS)


def test_a_lora_of_another_model_is_refused(trained: Path) -> None:
    other = tiny(trained, model=str(tiny_pipeline(seed=1)))
    with pytest.raises(ValueError, match=r"`base_revision` was 'local-.*' and is 'local-"):
        other.prepare(DEFECTS, NORMALS)


def test_drawing_without_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished LoRA. Call `prepare`"):
        tiny(tmp_path / "lora").synthesize([wanted()])


@pytest.mark.usefixtures("no_training")
def test_a_lora_from_elsewhere_is_used_as_it_is(trained: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes((trained / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="`lora_weight` has to be set"):
        tiny(tmp_path).synthesize([wanted()])
    foreign = tiny(tmp_path, lora_weight=0.95)
    foreign.prepare(DEFECTS, NORMALS)
    drawn, own = foreign.synthesize([wanted()]), tiny(trained).synthesize([wanted()])
    assert np.array_equal(drawn[0].image, own[0].image)


@pytest.mark.usefixtures("no_training")
def test_a_folder_without_weights_is_not_finished(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.json").write_text((trained / "lora.json").read_text())
    with pytest.raises(AssertionError, match="A training has started"):
        tiny(tmp_path).prepare(DEFECTS, NORMALS)
