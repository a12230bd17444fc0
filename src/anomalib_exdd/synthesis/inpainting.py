"""Defects drawn by a diffusion model from words: DIAG (arXiv 2407.03961), the synthesizer of the ExDD paper."""

from collections import defaultdict
from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from . import crops
from .base import Mask, Pixels, Request, Synthesis, Synthesizer, as_plain, check_mask, check_prompts, check_range
from .diffusion_pipeline import ModelSource, find_model, load_inpainting

Resolution = Literal["native", "stretch"]

PADDING = {"native": 32, "stretch": 2}
STRETCH_SIZE, BICUBIC = 1024, Image.Resampling.BICUBIC  # as in DIAG's code


class _Task(NamedTuple):
    """A request as the model gets it."""

    request: Request
    prompt: str
    frame: Pixels  # what is pasted into: the image, or the image stretched
    frame_mask: Mask
    window: crops.Window
    image: Pixels  # the window at the working size
    mask: Mask


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
        batches: dict[Any, list[tuple[int, _Task]]] = defaultdict(list)
        for number, request in enumerate(requests):
            task = self._task(request)
            batches[task.mask.shape if self.batched else number].append((number, task))
        results: dict[int, Synthesis] = {}
        for batch in batches.values():
            numbers, tasks = zip(*batch, strict=True)
            results |= zip(numbers, self._draw(tasks), strict=True)
        return [results[number] for number in range(len(requests))]

    def _load(self) -> Any:
        source = find_model(self.model, self.revision)
        dtype = self._dtype(source)
        pipeline = load_inpainting(source, dtype, self.device, offload=self.offload)
        self.check_pipeline(pipeline)
        self._loaded = {"model": source.name, "revision": source.revision, "dtype": str(dtype).removeprefix("torch.")}
        return pipeline

    def _dtype(self, source: ModelSource) -> torch.dtype:
        """Precision of the weights: float16 for U-Nets; bfloat16 for transformers, which overflow in float16."""
        on_gpu = torch.device(self.device).type == "cuda"
        if not (on_gpu if self.half_precision == "auto" else self.half_precision):
            return torch.float32
        has_unet = source.class_name.startswith("StableDiffusion") and "Diffusion3" not in source.class_name
        return torch.float16 if has_unet else torch.bfloat16

    def _task(self, request: Request) -> _Task:
        frame, mask, setting = request.image, request.mask, self.working_size
        if not (request.prompt or self.prompts):
            msg = "A request has no prompt, and `prompts` is empty. Describe the defect in either of them."
            raise ValueError(msg)
        if self.resolution == "native":
            size = crops.working_size(frame.shape[:2], setting)
        else:
            size = setting if isinstance(setting, tuple) else (setting or STRETCH_SIZE,) * 2
            frame, mask = crops.resized(frame, size, BICUBIC), crops.stretch_mask(mask, size)
        window = crops.window_around(mask, self.crop_padding, size)
        image = crops.cut(frame, window, size)
        hidden = crops.cut_mask(mask, window, size, whole_cells=self.resolution == "native")
        prompt = request.prompt or self.prompts[request.index % len(self.prompts)]
        return _Task(request, prompt, frame, mask, window, image, hidden)

    def _draw(self, tasks: Sequence[_Task]) -> list[Synthesis]:
        images = np.stack([task.image for task in tasks]).transpose(0, 3, 1, 2)
        masks = np.stack([task.mask for task in tasks])[:, None]
        parameters = signature(self.pipeline.__call__).parameters
        arguments = {
            "prompt": [task.prompt for task in tasks],
            "image": torch.from_numpy(images.astype(np.float32) / 255),
            "mask_image": torch.from_numpy(masks.astype(np.float32)),  # 0 and 1 are right for tensors, not for pictures
            "height": images.shape[2],
            "width": images.shape[3],
            "num_inference_steps": self.num_inference_steps,
            "strength": self.strength,
            # On the CPU, so that GPUs and CPUs, single images and batches start from the same noise.
            "generator": [torch.Generator("cpu").manual_seed(task.request.seed) for task in tasks],
            "output_type": "np",
        }
        # Flux and Qwen call classifier-free guidance differently, and ignore the negative prompt without it.
        arguments["true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"] = self.guidance_scale
        if self.negative_prompt:
            arguments["negative_prompt"] = [self.negative_prompt] * len(tasks)
        drawn = self.pipeline(**{name: value for name, value in arguments.items() if name in parameters}).images
        if not np.isfinite(drawn).all():
            overflow = f"An image of the pipeline `{self.model}` overflows in {self._loaded['dtype']}"
            msg = f"{overflow}. Set `half_precision` to false, or choose another model."
            raise RuntimeError(msg)
        windows = (np.asarray(drawn) * 255).round().astype(np.uint8)
        return [self._finish(task, window) for task, window in zip(tasks, windows, strict=True)]

    def _finish(self, task: _Task, drawn: Pixels) -> Synthesis:
        result = crops.paste_back(task.frame, drawn, task.window, task.frame_mask)
        if self.resolution == "stretch":
            result = crops.resized(result, task.request.mask.shape, BICUBIC)
        details = {
            "prompt": task.prompt,
            **self._loaded,
            "working_size": list(task.mask.shape),
            "window": list(task.window),
            "denoising_steps": int(self.num_inference_steps * self.strength),
        }
        return Synthesis(result, task.request.mask, details)

    def check_pipeline(self, pipeline: Any) -> None:
        """Refuse a pipeline that would silently ignore settings."""
        needed = {"prompt", "image", "mask_image", "generator"}
        needed |= {"strength"} if self.strength < 1 else set()
        needed |= {"negative_prompt"} if self.negative_prompt else set()
        if missing := sorted(needed - set(signature(pipeline.__call__).parameters)):
            which = f"The pipeline `{self.model}` ({type(pipeline).__name__}) takes no {', '.join(missing)}"
            msg = f"{which}. Set `strength` to 1 or `negative_prompt` to '', or choose a Stable Diffusion model."
            raise ValueError(msg)
