"""DIAG: defects from nothing but words (arXiv 2407.03961), the synthesizer of the ExDD paper."""

from collections.abc import Sequence
from typing import Literal

from .inpainting import InpaintingSynthesizer


class DiagSynthesizer(InpaintingSynthesizer):
    """Draws defects with Stable Diffusion XL's inpainting model, from the prompts and settings of the paper.

    The settings are the published ones, but for the resolution: `native` leaves every pixel outside the mask as it is
    and lets the model see the surroundings of the mask. `resolution="stretch"` restores the published way.

    Args:
        model: Folder that `save_pretrained` has written, or name on the hub.
        revision: Branch, tag or commit on the hub.
        prompts: The defects in words; requests without a prompt take them in turn.
        negative_prompt: What is not to be drawn. Empty for models without one.
        num_inference_steps: Steps from noise to image.
        guidance_scale: How closely the words are followed. Models for few steps want 1.
        strength: Share of the steps that is taken.
        crop_padding: Pixels of surroundings that the model sees around the mask. If None, 32, or 2 for `stretch`.
        resolution: `native`, or `stretch` as published.
        working_size: Size at which the model draws; see `InpaintingSynthesizer`.
        batched: Draw the images of a call together, rounded a little differently; see `InpaintingSynthesizer`.
        half_precision: Compute in half precision, on CUDA devices only. `auto` does so there.
        offload: Keep only the part of the model that computes right now on the GPU: slower, for small GPUs.
    """

    def __init__(
        self,
        model: str = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        revision: str | None = None,
        prompts: Sequence[str] = ("white marks on the wall", "copper metal scratches"),
        negative_prompt: str = "smooth, plain, black, dark, shadow",
        num_inference_steps: int = 30,
        guidance_scale: float = 20.0,
        strength: float = 0.99,
        crop_padding: int | None = None,
        resolution: Literal["native", "stretch"] = "native",
        working_size: int | tuple[int, int] | None = None,
        batched: bool = False,
        half_precision: bool | Literal["auto"] = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(
            model,
            revision,
            prompts,
            negative_prompt,
            num_inference_steps,
            guidance_scale,
            strength,
            crop_padding,
            resolution,
            working_size,
            batched,
            half_precision,
            offload,
        )
