"""Fine-tuning an inpainting model to a surface and its defects: low-rank changes to its U-Net (LoRA), by DreamBooth.

A step depends on the settings, its number and the steps before. An interrupted training that goes on from its last
checkpoint ends with the same numbers as an unbroken one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import SeedSequence
from torch import Tensor, nn
from tqdm.auto import tqdm

from anomalib_exdd.synthesis.crops import LATENT_CELL
from anomalib_exdd.synthesis.diffusion_pipeline import import_library

from .examples import Example, Examples, LoraSettings

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv"]
INPAINTING_CHANNELS = 9  # noisy latents, the mask, latents of the image without what is hidden
GREATEST_GRADIENT = 1.0


class LoraTrainer:
    """Adds a LoRA to an inpainting pipeline of Stable Diffusion (XL), in float32 or bfloat16, and trains it.

    The pipeline is changed and should not be used for anything else afterwards. A ValueError refuses other pipelines.
    """

    def __init__(self, pipeline: Any, settings: LoraSettings) -> None:
        unet = getattr(pipeline, "unet", None)
        if unet is None or unet.config.in_channels != INPAINTING_CHANNELS:
            needed = f"a U-Net with {INPAINTING_CHANNELS} input channels, made for inpainting"
            msg = f"A LoRA needs {needed}. Choose such a model, as stable-diffusion-v1-5/stable-diffusion-inpainting."
            raise ValueError(msg)
        drop_text_layers(pipeline, settings.clip_skip)
        self.pipeline, self.settings, self.step = pipeline, settings, 0
        self.is_xl, self.is_half = is_xl(pipeline), unet.dtype != torch.float32
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(requires_grad=False)
        pipeline.vae.to(torch.float32)  # that of SDXL overflows in half precision
        self.scheduler = import_library("diffusers").DDPMScheduler.from_config(pipeline.scheduler.config)
        prompts = {settings.instance_prompt, settings.class_prompt, *settings.defect_prompts}
        self._embeddings = {prompt: self._encode_prompt(prompt) for prompt in prompts}
        convolutions = CONVOLUTIONS if settings.conv_rank else []
        lora = import_library("peft").LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            init_lora_weights="gaussian",
            target_modules=[*LINEAR, *convolutions],
            rank_pattern=dict.fromkeys(convolutions, settings.conv_rank),
            alpha_pattern=dict.fromkeys(convolutions, settings.conv_alpha),
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws the first matrices; the second ones are zero at first
            torch.default_generator.manual_seed(settings.seed)
            unet.add_adapter(lora)
        # Small steps would be lost in half precision.
        import_library("diffusers.training_utils").cast_training_params(unet, torch.float32)
        self._parameters = {name: value for name, value in unet.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(self._parameters.values(), lr=settings.learning_rate)
        self.schedule = import_library("diffusers.optimization").get_cosine_with_hard_restarts_schedule_with_warmup(
            self.optimizer, num_warmup_steps=0, num_training_steps=settings.max_steps, num_cycles=settings.restarts
        )

    def train(self, examples: Examples) -> Iterator[int]:
        """Take the steps that are left, and yield how many were taken after each; a RuntimeError: they diverge."""
        settings, unet = self.settings, self.pipeline.unet
        if unet.device.type != "cpu":
            unet.enable_gradient_checkpointing()
        unet.train()
        steps = range(self.step, settings.max_steps)
        bar = tqdm(steps, "Training the LoRA", settings.max_steps, initial=self.step, unit="step", delay=2)
        for step in bar:
            first = step * settings.batch_size
            batch = [examples[position] for position in range(first, first + settings.batch_size)]
            seed = SeedSequence([settings.seed, 1, step]).generate_state(1, np.uint64)
            # In bfloat16 where the frozen weights are: its range needs no scaling of the loss.
            with torch.autocast(unet.device.type, dtype=torch.bfloat16, enabled=self.is_half):
                loss = self.loss(batch, torch.Generator("cpu").manual_seed(int(seed[0])))
            if not math.isfinite(loss.item()):
                diverged = f"The training diverged at step {step}: its loss is {loss.item()}"
                msg = f"{diverged}. Lower `learning_rate` ({settings.learning_rate}), or set `half_precision` to false."
                raise RuntimeError(msg)
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters.values(), GREATEST_GRADIENT)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.step = step + 1
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            yield self.step
        unet.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an interrupted training needs to go on."""
        return {
            "step": self.step,
            "lora": {name: value.detach() for name, value in self._parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` has returned."""
        self.step = state["step"]
        self.pipeline.unet.load_state_dict(state["lora"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def loss(self, batch: Sequence[Example], generator: torch.Generator) -> Tensor:
        """Return the U-Net's error at a random noise level, weighted by noise level and kind of image."""
        device, scheduler = self.pipeline.unet.device, self.scheduler
        pixels, hidden = (np.stack([getattr(example, name) for example in batch]) for name in ("image", "mask"))
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        masks = torch.from_numpy(hidden).to(device)[:, None].float()
        with torch.no_grad():
            latents = self._encode_images(images, generator)
            visible = self._encode_images(images * (1 - masks), generator)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        times = torch.randint(len(scheduler.alphas_cumprod), (len(batch),), generator=generator).to(device)
        noisy = scheduler.add_noise(latents, noise, times)
        seen = torch.cat([noisy, masks[..., ::LATENT_CELL, ::LATENT_CELL], visible], dim=1)
        conditions = self._conditions([example.prompt for example in batch], (images.shape[2], images.shape[3]))
        predicted = self.pipeline.unet(seen, times, **conditions).sample
        predicts_velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, times) if predicts_velocity else noise
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        ratio = import_library("diffusers.training_utils").compute_snr(scheduler, times)
        weight = noise_level_weight(ratio, self.settings.min_snr, predicts_velocity=predicts_velocity)
        return (error * weight * torch.tensor([example.weight for example in batch], device=device)).mean()

    def _encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        vae = self.pipeline.vae
        with torch.autocast(images.device.type, enabled=False):
            return vae.encode(images).latent_dist.sample(generator) * vae.config.scaling_factor

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> tuple[Tensor, ...]:
        encoded = self.pipeline.encode_prompt(
            prompt, device=self.pipeline.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return (encoded[0], encoded[2]) if self.is_xl else (encoded[0],)

    def _conditions(self, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        embeddings = [self._embeddings[prompt] for prompt in prompts]
        states, *pooled = (torch.cat(parts) for parts in zip(*embeddings, strict=True))
        if not self.is_xl:
            return {"encoder_hidden_states": states}
        # Original size, corner of the crop, wanted size: as the pipeline sets them when it draws.
        times = torch.tensor([[*size, 0, 0, *size]], dtype=states.dtype, device=states.device)
        conditions = {"text_embeds": pooled[0], "time_ids": times.repeat(len(prompts), 1)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": conditions}


def noise_level_weight(ratio: Tensor, min_snr: float, *, predicts_velocity: bool) -> Tensor:
    """Return weights, `[B]`, of signal-to-noise ratios, `[B]`: min-SNR (arXiv 2303.09556)."""
    return ratio.clamp(max=min_snr) / (ratio + 1 if predicts_velocity else ratio)


def is_xl(pipeline: Any) -> bool:
    """Tell Stable Diffusion XL, which has two text encoders, from Stable Diffusion."""
    return getattr(pipeline, "text_encoder_2", None) is not None


def drop_text_layers(pipeline: Any, clip_skip: int) -> None:
    """Let Stable Diffusion read its prompts from an earlier layer, counted from the end: cut off the last ones.

    The pipelines' own argument fails with transformers 5. Stable Diffusion XL always reads the last layer but one.
    """
    if is_xl(pipeline):
        return
    encoder = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder).encoder  # flat since transformers 5
    encoder.layers = encoder.layers[: len(encoder.layers) - (clip_skip - 1)]
