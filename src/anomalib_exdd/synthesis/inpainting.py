"""Defects drawn by a diffusion model from words: DIAG (arXiv 2407.03961), the synthesizer of the ExDD paper."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from . import crops
from .base import Pixels, Request, Synthesis, Synthesizer, as_plain, check_mask, check_prompts, check_range
from .diffusion_pipeline import ModelSource, find_model, read_pipeline

Resolution = Literal["native", "stretch"]

PADDING = {"native": 32, "stretch": 2}
STRETCH_SIZE, BICUBIC = 1024, Image.Resampling.BICUBIC  # as in DIAG's code


class _Task(NamedTuple):
    """What the model is to draw."""

    request: Request  # with its words; for `stretch`, with image and mask stretched
    window: crops.Window  # what the model sees of it
    size: crops.Size  # of the window, when the model sees it


class DiagSynthesizer(Synthesizer):
    """Draws defects with Stable Diffusion XL's inpainting model, from the prompts and settings of the DIAG paper.

    The settings are the published ones, except for the resolution: `native` changes no pixel outside the mask and
    shows the model the surroundings of the mask. `resolution="stretch"` restores the published way. Any pipeline can
    be used that diffusers' `AutoPipelineForInpainting` loads; Stable Diffusion (XL) is tested. An image depends on its
    request and these settings alone: its noise is drawn on the CPU from its own seed.

    Args:
        model: Folder written by `save_pretrained`, or name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        prompts: The defects in words; requests without a prompt take them in turn.
        negative_prompt: What is not to be drawn. Empty for models without one.
        num_inference_steps: Steps from noise to image.
        guidance_scale: How closely the words are followed. Models for few steps want 1.
        strength: Share of the steps that is taken; below 1, the noise keeps a trace of what was there.
        crop_padding: Pixels of surroundings that the model sees around the mask. If None, 32, or 2 for `stretch`.
        resolution: `native` draws in a window in the proportions of the working size and changes the mask only.
            `stretch`, as published, stretches the whole image to a square and back, which blurs all of it a little.
        working_size: Size at which the model draws. `native`: that of the image by default; a number for a size of
            about that area in its proportions, in multiples of 64, such as 1024 for Stable Diffusion XL, which was
            trained on it; or height and width. `stretch`: 1024 by 1024 by default.
        batched: Draw the images of a call together, which is faster on a GPU. The sums of a batch are rounded
            differently, so that an image depends a little on how many are drawn beside it: by a grey level here and
            there in full precision, by more in half precision. Without, images do not depend on batches at all.
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
        resolution: Resolution = "native",
        working_size: int | tuple[int, int] | None = None,
        batched: bool = False,
        half_precision: bool | Literal["auto"] = "auto",
        offload: bool = False,
    ) -> None:
        check_range(0, guidance_scale=guidance_scale, crop_padding=crop_padding or 0)
        check_range(0, 1, strength=strength)
        if int(num_inference_steps * strength) < 1:
            msg = f"{num_inference_steps} `num_inference_steps` and `strength` {strength} leave no step. Use more."
            raise ValueError(msg)
        crops.check_working_size(working_size)
        check_prompts(prompts)
        self.model, self.revision = model, revision
        self.prompts, self.negative_prompt = tuple(prompts), negative_prompt
        self.num_inference_steps, self.guidance_scale, self.strength = num_inference_steps, guidance_scale, strength
        self.crop_padding = PADDING[resolution] if crop_padding is None else crop_padding
        self.resolution, self.working_size = resolution, working_size
        self.batched, self.half_precision, self.offload = batched, half_precision, offload
        self.pipeline: Any = None  # loaded with the first request
        self._loaded: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the images depend on, as plain values."""
        names = [name for name in signature(DiagSynthesizer).parameters if name != "offload"]
        return dict(as_plain({name: getattr(self, name) for name in names}))

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Draw a defect into each image; those of one working size together if `batched`.

        Raises:
            ValueError: If a request is not usable, or the settings do not go with the model.
            RuntimeError: If the extra is not installed, or the model's numbers overflow.
            ConnectionError: If the model is neither here nor reachable.
        """
        for request in requests:
            check_mask(request.image, request.mask)
        if requests and self.pipeline is None:
            self.pipeline = self._load()
        tasks = [self._task(request) for request in requests]
        batches: dict[Any, list[int]] = defaultdict(list)
        for number, task in enumerate(tasks):
            batches[task.size if self.batched else number].append(number)
        drawn: dict[int, Pixels] = {}
        for numbers in batches.values():
            drawn |= zip(numbers, self._draw([tasks[number] for number in numbers]), strict=True)
        return [self._finish(request, tasks[number], drawn[number]) for number, request in enumerate(requests)]

    def _load(self) -> Any:
        source = find_model(self.model, self.revision)
        dtype = self._dtype(source)
        self._loaded = {"model": source.name, "revision": source.revision, "dtype": str(dtype).removeprefix("torch.")}
        pipeline = read_pipeline(source, dtype)
        pipeline.set_progress_bar_config(disable=True)  # progress is counted in images, not steps
        if self.offload:
            pipeline.enable_model_cpu_offload(device=self.device)
        else:
            pipeline.to(self.device)
        return pipeline

    def _dtype(self, source: ModelSource) -> torch.dtype:
        """Precision of the weights: float16 for U-Nets; bfloat16 for transformers, which overflow in float16."""
        on_gpu = torch.device(self.device).type == "cuda"
        if self.half_precision is True and not on_gpu:
            msg = f"Argument `half_precision` needs a CUDA device, but got '{self.device}'. Use 'auto'."
            raise ValueError(msg)
        if not (self.half_precision and on_gpu):
            return torch.float32
        has_unet = source.class_name.startswith("StableDiffusion") and "Diffusion3" not in source.class_name
        return torch.float16 if has_unet else torch.bfloat16

    def _task(self, request: Request) -> _Task:
        frame, mask, setting = request.image, request.mask, self.working_size
        if not (request.prompt or self.prompts):
            msg = "A request has no prompt, and `prompts` is empty. Describe the defect in either of them."
            raise ValueError(msg)
        prompt = request.prompt or self.prompts[request.index % len(self.prompts)]
        if self.resolution == "native":
            size = crops.working_size(frame.shape[:2], setting)
        else:
            size = setting if isinstance(setting, tuple) else (setting or STRETCH_SIZE,) * 2
            frame, mask = crops.resized(frame, size, BICUBIC), crops.stretch_mask(mask, size)
        framed = replace(request, image=frame, mask=mask, prompt=prompt)
        return _Task(framed, crops.window_around(mask, self.crop_padding, size), size)

    def _draw(self, tasks: Sequence[_Task]) -> NDArray[np.uint8]:
        """Let the model fill the windows, all of one size: `[N, h, w, 3]`."""
        whole_cells = self.resolution == "native"
        images = np.stack([crops.cut(task.request.image, task.window, task.size) for task in tasks])
        masks = [crops.cut_mask(task.request.mask, task.window, task.size, whole_cells=whole_cells) for task in tasks]
        known = signature(self.pipeline.__call__).parameters
        arguments = {
            "prompt": [task.request.prompt for task in tasks],
            "image": torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255),
            # 0 and 1 are right for tensors, not for pictures.
            "mask_image": torch.from_numpy(np.stack(masks)[:, None].astype(np.float32)),
            "height": images.shape[1],
            "width": images.shape[2],
            "num_inference_steps": self.num_inference_steps,
            # Flux and Qwen call classifier-free guidance differently, and ignore the negative prompt without it.
            "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale": self.guidance_scale,
            # On the CPU, so that GPUs and CPUs, single images and batches start from the same noise.
            "generator": [torch.Generator("cpu").manual_seed(task.request.seed) for task in tasks],
            "output_type": "np",
        }
        if self.strength < 1 or "strength" in known:
            arguments["strength"] = self.strength
        if self.negative_prompt:
            arguments["negative_prompt"] = [self.negative_prompt] * len(tasks)
        if unknown := sorted(set(arguments) - set(known)):
            which = f"The pipeline `{self.model}` ({type(self.pipeline).__name__}) takes no {', '.join(unknown)}"
            msg = f"{which}. Set `strength` to 1 or `negative_prompt` to '', or choose a Stable Diffusion model."
            raise ValueError(msg)
        drawn = self.pipeline(**arguments).images
        if not np.isfinite(drawn).all():
            overflow = f"An image of the pipeline `{self.model}` overflows in {self._loaded['dtype']}"
            msg = f"{overflow}. Set `half_precision` to false, or choose another model."
            raise RuntimeError(msg)
        return (np.asarray(drawn) * 255).round().astype(np.uint8)

    def _finish(self, request: Request, task: _Task, drawn: Pixels) -> Synthesis:
        framed = task.request
        result = crops.paste_back(framed.image, drawn, task.window, framed.mask)
        details = {
            "prompt": framed.prompt,
            **self._loaded,
            "working_size": list(task.size),
            "window": list(task.window),
            "denoising_steps": int(self.num_inference_steps * self.strength),
        }
        # Resizing to the size that it has, as with `native`, leaves an image as it is.
        return Synthesis(crops.resized(result, request.mask.shape, BICUBIC), request.mask, details)
