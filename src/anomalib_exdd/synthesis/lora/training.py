"""Fine-tuning an inpainting model to a surface and its defects: low-rank changes to its U-Net (LoRA), by DreamBooth.

A step depends on the settings, its number and what was learned before. So a training that was interrupted goes on from
its last checkpoint and ends with the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.random import SeedSequence
from torch import Tensor, nn
from tqdm.auto import tqdm

from anomalib_exdd.synthesis.crops import LATENT_CELL
from anomalib_exdd.synthesis.diffusion_pipeline import import_library

from .examples import Example, Examples
from .settings import LoraSettings

_LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
_CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv"]
_INPAINTING_CHANNELS = 9  # noisy latents, the mask, latents of what the mask leaves
_INIT, _NOISE = 0, 1  # what a stream of random numbers is for
_GREATEST_GRADIENT = 1.0

Tensors = dict[str, Tensor]


def train_lora(
    pipeline: Any,
    examples: Examples,
    settings: LoraSettings,
    resume: tuple[int, Tensors] | None,
    save: Callable[[int, Tensors], None],
    checkpoint_every: int,
) -> None:
    """Add a LoRA to the pipeline's U-Net and train it.

    Args:
        pipeline: Inpainting pipeline of Stable Diffusion (XL) in float32 or bfloat16, on its device; it is of no other
            use afterwards.
        examples: What to learn from.
        settings: How.
        resume: Number of steps that were taken, and what `save` got then.
        save: Called with the number of steps taken and everything needed to go on.
        checkpoint_every: After how many steps; never after the last.

    Raises:
        ValueError: If the pipeline has no U-Net for inpainting.
        RuntimeError: If the training diverges.
    """
    unet = _check_unet(pipeline)
    drop_text_layers(pipeline, settings.clip_skip)
    for part in (unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(requires_grad=False)
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)  # that of SDXL overflows in half precision
    parameters = _add_lora(unet, settings)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate)
    start = 0
    if resume is not None:
        start = resume[0]
        _restore(optimizer, parameters, resume[1], start)
    words = _Words(pipeline, settings)
    on_gpu = unet.device.type != "cpu"
    if on_gpu:
        unet.enable_gradient_checkpointing()
    unet.train()
    steps = range(start, settings.max_steps)
    bar = tqdm(steps, desc="Training the LoRA", initial=start, total=settings.max_steps, unit="step", delay=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        first = step * settings.batch_size
        batch = [examples[position] for position in range(first, first + settings.batch_size)]
        with _autocast(unet):
            loss = _loss(pipeline, batch, words, settings, _generator(settings.seed, _NOISE, step))
        if not math.isfinite(loss.item()):
            msg = (
                f"The training diverged at step {step}: its loss is {loss.item()}. Lower `learning_rate` "
                f"({settings.learning_rate}), or set `half_precision` to false."
            )
            raise RuntimeError(msg)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), _GREATEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % checkpoint_every == 0 and step + 1 < settings.max_steps:
            save(step + 1, _snapshot(optimizer, parameters))
    unet.eval()


def lora_config(settings: LoraSettings) -> Any:
    """Return peft's description of the LoRA."""
    convolutions = _CONVOLUTIONS if settings.conv_rank else []
    return import_library("peft").LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=[*_LINEAR, *convolutions],
        rank_pattern=dict.fromkeys(convolutions, settings.conv_rank),
        alpha_pattern=dict.fromkeys(convolutions, settings.conv_alpha),
    )


def noise_level_weight(signal: Tensor, min_snr: float, *, predicts_velocity: bool) -> Tensor:
    """Return how much noise levels count, so that the nearly clean ones do not drown the rest (arXiv 2303.09556).

    Args:
        signal: Share of the image in the variance, `[B]`, above 0 and below 1.
        min_snr: Limit of the signal-to-noise ratio.
        predicts_velocity: Whether the model predicts the velocity; otherwise it predicts the noise.

    Returns:
        Weights, `[B]`.
    """
    ratio = signal / (1 - signal)
    return ratio.clamp(max=min_snr) / (ratio + 1 if predicts_velocity else ratio)


def drop_text_layers(pipeline: Any, clip_skip: int) -> None:
    """Let Stable Diffusion read its prompts from an earlier layer: cut off the text encoder's last ones.

    The pipelines' own argument fails with transformers 5. Stable Diffusion XL always reads the last layer but one.

    Args:
        pipeline: The pipeline, which is changed.
        clip_skip: Layer to read, counted from the end; 1 is the last.

    Raises:
        ValueError: If there are not as many layers.
    """
    if getattr(pipeline, "text_encoder_2", None) is not None:
        return
    encoder = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder).encoder  # flat since transformers 5
    if clip_skip > len(encoder.layers):
        msg = f"Argument `clip_skip` is {clip_skip}, but the text encoder has only {len(encoder.layers)} layers."
        raise ValueError(msg)
    encoder.layers = encoder.layers[: len(encoder.layers) - (clip_skip - 1)]


class _Words:
    """The prompts as the U-Net reads them, encoded once."""

    def __init__(self, pipeline: Any, settings: LoraSettings) -> None:
        self.is_xl = getattr(pipeline, "text_encoder_2", None) is not None
        self.encoded: dict[str, tuple[Tensor, ...]] = {}
        for prompt in {settings.instance_prompt, settings.class_prompt, *settings.defect_prompts}:
            with torch.no_grad():
                encoded = pipeline.encode_prompt(
                    prompt,
                    device=pipeline.unet.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                )
            self.encoded[prompt] = (encoded[0], encoded[2]) if self.is_xl else (encoded[0],)

    def arguments(self, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """Return the U-Net's arguments for some prompts and images of a size."""
        states = torch.cat([self.encoded[prompt][0] for prompt in prompts])
        if not self.is_xl:
            return {"encoder_hidden_states": states}
        pooled = torch.cat([self.encoded[prompt][1] for prompt in prompts])
        # Original size, corner of the crop, wanted size: as the pipeline sets them when it draws.
        times = torch.tensor([[*size, 0, 0, *size]], dtype=states.dtype, device=states.device)
        conditions = {"text_embeds": pooled, "time_ids": times.repeat(len(prompts), 1)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": conditions}


def _check_unet(pipeline: Any) -> Any:
    unet = getattr(pipeline, "unet", None)
    channels = None if unet is None else unet.config.in_channels
    if channels != _INPAINTING_CHANNELS:
        has = "has no U-Net" if unet is None else f"has a U-Net with {channels} input channels, not made for inpainting"
        msg = (
            f"The {type(pipeline).__name__} {has}: no LoRA can be trained for it here. Choose an inpainting model of "
            "Stable Diffusion, such as stable-diffusion-v1-5/stable-diffusion-inpainting."
        )
        raise ValueError(msg)
    return unet


def _add_lora(unet: Any, settings: LoraSettings) -> Tensors:
    """Add the LoRA, its first matrices drawn from the seed, its second ones zero: at first it changes nothing."""
    unet.add_adapter(lora_config(settings))
    generator = _generator(settings.seed, _INIT, 0)
    parameters = {name: value for name, value in unet.named_parameters() if value.requires_grad}
    for name, value in parameters.items():
        value.data = value.data.float()  # small steps would be lost in half precision
        if "lora_A" in name:
            rank = value.shape[0]
            value.data.copy_(torch.randn(value.shape, generator=generator) / rank)
        else:
            value.data.zero_()
    return parameters


def _loss(
    pipeline: Any, batch: Sequence[Example], words: _Words, settings: LoraSettings, generator: torch.Generator
) -> Tensor:
    """Return how badly the U-Net tells the noise from what is hidden, weighted by noise level and kind of image."""
    device, scheduler = pipeline.unet.device, pipeline.scheduler
    images = torch.from_numpy(np.stack([example.image for example in batch])).to(device).permute(0, 3, 1, 2)
    images = images.float() / 127.5 - 1
    masks = torch.from_numpy(np.stack([example.mask for example in batch])).to(device)[:, None].float()
    with torch.no_grad():
        latents = _encode(pipeline.vae, images, generator)
        left = _encode(pipeline.vae, images * (1 - masks), generator)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    times = torch.randint(len(scheduler.alphas_cumprod), (len(batch),), generator=generator)
    signal = scheduler.alphas_cumprod[times].to(device)  # share of the image in the variance
    along, across = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    seen = torch.cat([along * latents + across * noise, masks[..., ::LATENT_CELL, ::LATENT_CELL], left], dim=1)
    conditions = words.arguments([example.prompt for example in batch], (images.shape[2], images.shape[3]))
    predicted = pipeline.unet(seen, times.to(device), **conditions).sample
    predicts_velocity = scheduler.config.prediction_type == "v_prediction"
    target = along * noise - across * latents if predicts_velocity else noise
    error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    weight = noise_level_weight(signal, settings.min_snr, predicts_velocity=predicts_velocity)
    kinds = torch.tensor([example.weight for example in batch], device=device)
    return (error * weight * kinds).mean()


def _encode(vae: Any, images: Tensor, generator: torch.Generator) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return vae.encode(images).latent_dist.sample(generator) * vae.config.scaling_factor


def _autocast(unet: Any) -> AbstractContextManager[Any]:
    """Compute in bfloat16 where the frozen weights are: its range needs no scaling of the loss."""
    if all(value.dtype == torch.float32 for value in unet.parameters()):
        return nullcontext()
    return torch.autocast(unet.device.type, dtype=torch.bfloat16)


def _generator(seed: int, purpose: int, number: int) -> torch.Generator:
    state = SeedSequence([seed, purpose, number]).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))


def _snapshot(optimizer: torch.optim.Optimizer, parameters: Tensors) -> Tensors:
    """Return everything that a training needs to go on."""
    tensors: Tensors = {}
    for name, value in parameters.items():
        state = optimizer.state[value]
        tensors[f"value.{name}"] = value.detach().cpu().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = state[moment].cpu().contiguous()
    return tensors


def _restore(optimizer: torch.optim.Optimizer, parameters: Tensors, tensors: Tensors, step: int) -> None:
    for name, value in parameters.items():
        value.data.copy_(tensors[f"value.{name}"])
        optimizer.state[value] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"exp_avg.{name}"].to(value.device),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(value.device),
        }
