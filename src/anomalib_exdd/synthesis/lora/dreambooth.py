"""DreamBooth: an inpainting model is fine-tuned on the surface, and on its defects if there are any, before it draws.

The recipe and its numbers are those of In&Out (arXiv 2406.00501), which tunes a model that makes whole images. Here the
model fills in what a mask hides, and is trained to do so: examples are windows around defects, or around regions hidden
at random in normal images.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from anomalib_exdd.synthesis.base import Defect, Pixels, as_plain, check_range
from anomalib_exdd.synthesis.diffusion_pipeline import ModelSource, find_model, import_library, read_pipeline
from anomalib_exdd.synthesis.inpainting import DiagSynthesizer
from anomalib_exdd.synthesis.manifest import differences
from anomalib_exdd.utils.files import PARTIAL_FILES, write_atomically, write_file

from .examples import Examples, LoraSettings
from .trainer import LoraTrainer, drop_text_layers, is_xl

logger = logging.getLogger(__name__)

# The weights come last: a record without weights belongs to an interrupted training, weights without a record to a LoRA
# that was trained elsewhere.
WEIGHTS, RECORD, CARD, CHECKPOINT = "pytorch_lora_weights.safetensors", "lora.json", "README.md", "checkpoint.pt"
ADAPTER = "defects"
FEW_DEFECTS = 50  # In&Out has 5 or all 246; its weight for few would be too strong for many

CARD_TEMPLATE = """---
{base_line}library_name: diffusers
pipeline_tag: image-to-image
tags: [lora, inpainting, dreambooth, {family}]
license: other
---

# LoRA that draws defects into images of a surface

Low-rank changes to the U-Net of the inpainting model `{base}`, trained by anomalib-exdd with DreamBooth, after In&Out
(arXiv 2406.00501). Use: `pipeline.load_lora_weights("FOLDER", weight_name="{weights}")`.

How it was trained:

```json
{record}
```

The license of the base model `{base}` applies to these weights as well, with its restrictions of use. The images they
were trained on have an owner: pass the weights on only where the terms of both allow it.
"""


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
        has_weights, has_record = ((self.lora / name).is_file() for name in (WEIGHTS, RECORD))
        if (has_weights and not has_record) or not (defects or normals):
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
        found, state = record, None
        if has_weights:
            found = self._read_record()
        elif (self.lora / CHECKPOINT).is_file():
            state = torch.load(self.lora / CHECKPOINT, map_location="cpu", weights_only=True)
            found = state["record"]
        if found != record:
            what = f"The LoRA in `{self.lora}` was trained otherwise: {'; '.join(differences(found, record))}"
            msg = f"{what}. Set `lora` to another folder, or delete this one."
            raise ValueError(msg)
        if has_weights:
            logger.info("The LoRA in `%s` is used again.", self.lora)
        else:
            self._train(source, examples, record, state)

    def _read_record(self) -> dict[str, Any]:
        return dict(json.loads((self.lora / RECORD).read_text(encoding="utf-8")))

    def _train(
        self, source: ModelSource, examples: Examples, record: dict[str, Any], state: dict[str, Any] | None
    ) -> None:
        """Train a pipeline of its own, from a checkpoint's state if any: drawing uses the weights in the folder."""
        # Gradients want the range of bfloat16, even of models that draw in float16.
        dtype = torch.float32 if self._dtype(source) == torch.float32 else torch.bfloat16
        trainer = LoraTrainer(read_pipeline(source, dtype).to(self.device), self.training)
        if state is not None:
            trainer.load_state_dict(state)
        self.lora.mkdir(parents=True, exist_ok=True)
        for step in trainer.train(examples):
            if step % self.checkpoint_every == 0 and step < self.training.max_steps:
                with write_atomically(self.lora / CHECKPOINT) as partial:
                    torch.save({"record": record, **trainer.state_dict()}, partial)
        self._save(trainer.pipeline, record)
        self.pipeline = None
        del trainer
        gc.collect()
        torch.cuda.empty_cache()

    def _save(self, pipeline: Any, record: dict[str, Any]) -> None:
        """Write the LoRA of a pipeline's U-Net with its card and its record, and remove what only training needs."""
        base, described = record["base_model"], json.dumps(record, indent=2)
        card = CARD_TEMPLATE.format(
            base_line="" if record["base_revision"].startswith("local-") else f"base_model: {base}\n",
            family="stable-diffusion-xl" if is_xl(pipeline) else "stable-diffusion",
            base=base,
            weights=WEIGHTS,
            record=described,
        )
        with write_atomically(self.lora / WEIGHTS) as partial:
            pipeline.save_lora_weights(
                self.lora,
                unet_lora_layers=import_library("peft").get_peft_model_state_dict(pipeline.unet),
                unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
                weight_name=partial.name,
            )
            write_file(self.lora / CARD, card)
            write_file(self.lora / RECORD, described + "\n")
        for path in (self.lora / CHECKPOINT, *self.lora.glob(PARTIAL_FILES)):  # partial files of a killed training
            path.unlink(missing_ok=True)

    def _load(self) -> Any:
        if not (self.lora / WEIGHTS).is_file():
            msg = f"The folder `{self.lora}` of argument `lora` holds no finished LoRA. Call `prepare` to train it."
            raise ValueError(msg)
        weight = self.lora_weight
        if weight is None and (self.lora / RECORD).is_file():
            weight = published_weight(self._read_record()["counts"]["defects"])
        if weight is None:
            msg = f"Argument `lora_weight` has to be set: the number of defects in `{self.lora}` is not known."
            raise ValueError(msg)
        pipeline = super()._load()
        drop_text_layers(pipeline, self.training.clip_skip)
        logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)  # it warns of text encoders without a LoRA
        pipeline.load_lora_weights(str(self.lora), weight_name=WEIGHTS, adapter_name=ADAPTER, local_files_only=True)
        pipeline.set_adapters([ADAPTER], [weight])
        self._loaded |= {"lora_weight": weight, "lora_sha256": digest_of_weights(self.lora / WEIGHTS)}
        return pipeline


def published_weight(defects: int) -> float:
    """Return the weight of a LoRA when drawing, by the number of defects it was trained on."""
    if defects == 0:
        return 0.60
    return 0.95 if defects <= FEW_DEFECTS else 0.80


def digest_of_weights(path: Path) -> str:
    """Return the SHA-256 of a LoRA's numbers; the library writes the entries of the file in random order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
