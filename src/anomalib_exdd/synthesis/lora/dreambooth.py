"""DreamBooth: an inpainting model is fine-tuned on the surface, and on its defects if there are any, before it draws.

The recipe and its numbers are those of In&Out (arXiv 2406.00501), which tunes a model that makes whole images. Here the
model fills in what a mask hides, and is trained to do so: examples are windows around defects, or around regions hidden
at random in normal images.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from anomalib_exdd.synthesis.base import Defect, Pixels, as_plain, check_range
from anomalib_exdd.synthesis.diffusion_pipeline import ModelSource, find_model, load_inpainting
from anomalib_exdd.synthesis.inpainting import DiagSynthesizer

from . import storage
from .examples import Examples
from .hyperparameters import LoraSettings, published_weight
from .trainer import LoraTrainer, drop_text_layers

logger = logging.getLogger(__name__)

ADAPTER = "defects"


class DreamBoothSynthesizer(DiagSynthesizer):
    """Fine-tunes an inpainting model of Stable Diffusion (XL) with LoRA, then draws defects with it.

    Zero-shot it learns the surface from normal images only; few-shot and full-shot it learns the defects too. The
    finished LoRA is kept and used again by the next run with the same images and settings. A LoRA from elsewhere is
    used as it is: put its `pytorch_lora_weights.safetensors` into the folder, and set `lora_weight`.

    Args:
        lora: Folder of the LoRA: weights, card and record; until it is finished, its checkpoint.
        model: Inpainting model of Stable Diffusion (XL): folder written by `save_pretrained`, or name on the hub.
        revision: Branch, tag or commit on the hub.
        instance_prompt: The surface in words; a rare word among them gets its meaning from the training.
        prompts: The surface with a defect in words: what images of defects are learned under, and what requests without
            a prompt take in turn. If None, the instance prompt after "cracked" and after "scratched".
        checkpoint_every: Steps after which an interrupted training can go on.
        lora_weight: Weight of the LoRA when drawing. If None, as published: 0.6 if it was trained without defects, 0.95
            with up to 50 of them, 0.8 with more.
        negative_prompt: What is not to be drawn.
        num_inference_steps: Steps from noise to image.
        guidance_scale: How closely the words are followed.
        strength: Share of the steps that is taken.
        crop_padding: Pixels of surroundings that the model sees around the mask.
        working_size: Size at which the model learns and draws; see `DiagSynthesizer`.
        batched: Draw the images of a call together, rounded a little differently; see `DiagSynthesizer`.
        half_precision: Compute in half precision, on CUDA devices only. `auto` does so there.
        offload: When drawing, keep only the part of the model that computes right now on the GPU.
        **training: Further settings of the training; see `LoraSettings`.
    """

    def __init__(
        self,
        lora: str,
        model: str = "stable-diffusion-v1-5/stable-diffusion-inpainting",
        revision: str | None = None,
        instance_prompt: str = "skt background",
        prompts: Sequence[str] | None = None,
        checkpoint_every: int = 100,
        lora_weight: float | None = None,
        negative_prompt: str = "",
        num_inference_steps: int = 30,
        guidance_scale: float = 7.5,
        strength: float = 0.99,
        crop_padding: int = 32,
        working_size: int | tuple[int, int] | None = 512,
        batched: bool = False,
        half_precision: bool | Literal["auto"] = "auto",
        offload: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(
            model=model,
            revision=revision,
            prompts=[f"{word} {instance_prompt}" for word in ("cracked", "scratched")] if prompts is None else prompts,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            strength=strength,
            crop_padding=crop_padding,
            working_size=working_size,
            batched=batched,
            half_precision=half_precision,
            offload=offload,
        )
        check_range(1, checkpoint_every=checkpoint_every)
        self.lora = Path(lora).expanduser()
        self.lora_weight = lora_weight
        self.checkpoint_every = checkpoint_every
        self.training = LoraSettings(
            instance_prompt=instance_prompt,
            defect_prompts=self.prompts,
            working_size=working_size,
            crop_padding=crop_padding,
            **training,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the images depend on, as plain values."""
        training = as_plain(asdict(self.training))
        del training["defect_prompts"]  # they are the prompts
        return {**training, **super().settings, "lora_weight": self.lora_weight}

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        """Train the LoRA, unless it is there already; go on where an earlier training was interrupted.

        Without any images, the LoRA has to be there.

        Raises:
            ValueError: If the folder holds a LoRA of other images or settings, or if the model is of another kind.
            RuntimeError: If the training diverges.
        """
        if storage.is_from_elsewhere(self.lora) or not (defects or normals):
            return
        examples = Examples(defects, normals, self.training)
        source = find_model(self.model, self.revision)
        record = {
            "base_model": source.name,
            "base_revision": source.revision,
            "settings": as_plain(asdict(self.training)),
            "digests": examples.digests,
            "counts": {"defects": len(examples.defects), "normals": len(examples.normals)},
        }
        found = storage.read_record(self.lora)
        if found is None:
            self._train(source, examples, record)
        else:
            storage.check_same(found, record, self.lora)
            logger.info("The LoRA in `%s` is used again.", self.lora)

    def _train(self, source: ModelSource, examples: Examples, record: dict[str, Any]) -> None:
        """Train a pipeline of its own: drawing uses the weights in the folder."""
        state = storage.load_checkpoint(self.lora, record)
        # Gradients want the range of bfloat16, even of models that draw in float16.
        dtype = torch.float32 if self._dtype(source) == torch.float32 else torch.bfloat16
        trainer = LoraTrainer(load_inpainting(source, dtype, self.device), self.training)
        if state is not None:
            trainer.load_state_dict(state)
        trainer.train(examples, lambda state: storage.save_checkpoint(self.lora, record, state), self.checkpoint_every)
        storage.save_lora(trainer.pipeline, self.lora, record)
        self.pipeline = None
        del trainer
        gc.collect()
        torch.cuda.empty_cache()

    def _load(self) -> Any:
        if not (self.lora / storage.WEIGHTS).is_file():
            msg = f"The folder `{self.lora}` of argument `lora` holds no finished LoRA. Call `prepare` to train it."
            raise ValueError(msg)
        record, weight = storage.read_record(self.lora), self.lora_weight
        if weight is None and record is not None:
            weight = published_weight(record["counts"]["defects"])
        if weight is None:
            msg = f"Argument `lora_weight` has to be set: the number of defects in `{self.lora}` is not known."
            raise ValueError(msg)
        pipeline = super()._load()
        drop_text_layers(pipeline, self.training.clip_skip)
        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)  # it warns of text encoders without a LoRA
        pipeline.load_lora_weights(
            str(self.lora), weight_name=storage.WEIGHTS, adapter_name=ADAPTER, local_files_only=True
        )
        pipeline.set_adapters([ADAPTER], [weight])
        self._loaded |= {"lora_weight": weight, "lora_sha256": storage.digest_of_weights(self.lora)}
        return pipeline
