"""DreamBooth: an inpainting model learns the surface, and its defects if there are some, before it draws.

The recipe and its numbers are those of In&Out (arXiv 2406.00501), which tunes a model that makes whole images. Here it
tunes one that fills in what a mask hides, and practises just that: images are windows around defects, or around places
hidden at random in normal images.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from anomalib_exdd.synthesis.base import Defect, Pixels
from anomalib_exdd.synthesis.diffusion_pipeline import ModelSource, find_model, load_inpainting
from anomalib_exdd.synthesis.inpainting import InpaintingSynthesizer

from . import folder as lora_folder
from .examples import Examples
from .settings import LoraSettings, published_weight
from .training import drop_text_layers, train_lora

logger = logging.getLogger(__name__)

_ADAPTER = "defects"


class DreamBoothSynthesizer(InpaintingSynthesizer):
    """Fine-tunes an inpainting model of Stable Diffusion (XL) with LoRA, then draws defects with it.

    Zero-shot it learns the surface from normal images only; few-shot and full-shot it learns the defects too. The
    finished LoRA is kept and used again by the next run with the same images and settings. A LoRA from elsewhere is
    used as it is: put its `pytorch_lora_weights.safetensors` into the folder, and set `lora_weight`.

    Args:
        lora: Folder of the LoRA: weights, card and record; until it is finished, its checkpoint.
        model: Inpainting model of Stable Diffusion (XL): folder that `save_pretrained` has written, or name on the hub.
        revision: Branch, tag or commit on the hub.
        instance_prompt: The surface in words; a rare word among them gets its meaning from the training.
        prompts: The surface with a defect in words: what images of defects are learned under, and what requests without
            a prompt take in turn. If None, the instance prompt after "cracked" and after "scratched".
        class_prompt: What kind of thing the surface is. Normal images learned under it keep the model from forgetting.
        rank: Rank of the changes to linear layers.
        alpha: Their scale; they count `alpha / rank`.
        conv_rank: Rank of the changes to convolutions; 0 for none.
        conv_alpha: Their scale.
        learning_rate: Greatest step of AdamW.
        max_steps: Steps of the training.
        batch_size: Images per step, half of them of the class.
        min_snr: Limit of the signal-to-noise ratio in the weights of the noise levels.
        prior_weight: Weight of the images of the class; 0 for none.
        restarts: How often the learning rate falls along a cosine to zero.
        clip_skip: Layer of the text encoder that is read, counted from the end. SDXL always reads the second.
        seed: Seed of the training.
        checkpoint_every: Steps after which an interrupted training can go on.
        lora_weight: How strongly the LoRA counts when drawing. If None, as published: 0.6 if it was trained without
            defects, 0.95 with up to 50 of them, 0.8 with more.
        negative_prompt: What is not to be drawn.
        num_inference_steps: Steps from noise to image.
        guidance_scale: How closely the words are followed.
        strength: Share of the steps that is taken.
        crop_padding: Pixels of surroundings that the model sees around the mask.
        working_size: Size at which the model learns and draws; see `InpaintingSynthesizer`.
        batched: Draw the images of a call together, rounded a little differently; see `InpaintingSynthesizer`.
        half_precision: Compute in half precision, on CUDA devices only. `auto` does so there.
        offload: When drawing, keep only the part of the model that computes right now on the GPU.
    """

    def __init__(
        self,
        lora: str,
        model: str = "stable-diffusion-v1-5/stable-diffusion-inpainting",
        revision: str | None = None,
        instance_prompt: str = "skt background",
        prompts: Sequence[str] | None = None,
        class_prompt: str = "background",
        rank: int = 32,
        alpha: float = 16,
        conv_rank: int = 4,
        conv_alpha: float = 1,
        learning_rate: float = 1e-5,
        max_steps: int = 1000,
        batch_size: int = 12,
        min_snr: float = 5.0,
        prior_weight: float = 1.0,
        restarts: int = 3,
        clip_skip: int = 2,
        seed: int = 1234,
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
    ) -> None:
        super().__init__(
            model,
            revision,
            tuple(f"{word} {instance_prompt}" for word in ("cracked", "scratched")) if prompts is None else prompts,
            negative_prompt,
            num_inference_steps,
            guidance_scale,
            strength,
            crop_padding,
            "native",
            working_size,
            batched,
            half_precision,
            offload,
        )
        if not self.prompts:
            msg = "Argument `prompts` is empty. Describe the surface with a defect, such as 'scratched skt background'."
            raise ValueError(msg)
        if checkpoint_every < 1:
            msg = f"Argument `checkpoint_every` has to be at least 1, but got {checkpoint_every}."
            raise ValueError(msg)
        self.lora = Path(lora).expanduser()
        self.lora_weight = lora_weight
        self.checkpoint_every = checkpoint_every
        self.training = LoraSettings(
            instance_prompt,
            self.prompts,
            class_prompt,
            rank,
            alpha,
            conv_rank,
            conv_alpha,
            learning_rate,
            max_steps,
            batch_size,
            min_snr,
            prior_weight,
            restarts,
            clip_skip,
            working_size,
            crop_padding,
            seed,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the images depend on besides the requests and the images learned from, as plain values."""
        training = asdict(self.training)
        del training["defect_prompts"]  # they are the prompts
        return {**training, **super().settings, "lora_weight": self.lora_weight}

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        """Train the LoRA, unless it is there already; go on where an earlier training was interrupted.

        Processes that share the folder take turns: the first one trains, the others use its LoRA.

        Args:
            defects: Real defects, none of them for zero-shot.
            normals: Normal images, of which 50 (zero-shot) or 200 are used. Without any images at all, the LoRA has to
                be there.

        Raises:
            ValueError: If the folder holds a LoRA of other images or settings, if the images are not usable, or if the
                model is not one of Stable Diffusion's for inpainting.
            RuntimeError: If the extra is not installed, or the training diverges.
            ConnectionError: If the model is neither here nor reachable.
        """
        if lora_folder.is_from_elsewhere(self.lora):
            logger.info("The LoRA in `%s` was not trained here and is used as it is.", self.lora)
            return
        if not defects and not normals and lora_folder.read_record(self.lora) is not None:
            return
        examples = Examples(defects, normals, self.training)
        source = find_model(self.model, self.revision)
        counts = {"defects": len(examples.defects), "normals": len(examples.normals)}
        record = lora_folder.make_record(source, asdict(self.training), examples.digests, counts)
        with self._turn():
            found = lora_folder.read_record(self.lora)
            if found is not None:
                lora_folder.check_same(found, record, self.lora)
                logger.info("The LoRA in `%s` is used again.", self.lora)
                return
            self._train(source, examples, record)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other process trains in the folder."""
        self.lora.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lora.with_name(f"{self.lora.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.warning("Another process trains the LoRA in `%s`: waiting for it.", self.lora)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _train(self, source: ModelSource, examples: Examples, record: dict[str, Any]) -> None:
        """Train on a pipeline of its own: what draws is what the folder holds."""
        resume = lora_folder.load_checkpoint(self.lora, record)
        # Gradients want the range of bfloat16, even of models that draw in float16.
        dtype = torch.float32 if self._dtype(source) == torch.float32 else torch.bfloat16
        pipeline = load_inpainting(self.model, self.revision, dtype, self.device)
        train_lora(
            pipeline,
            examples,
            self.training,
            resume,
            lambda step, tensors: lora_folder.save_checkpoint(self.lora, record, step, tensors),
            self.checkpoint_every,
        )
        lora_folder.save_lora(pipeline, self.lora, record)
        self._pipeline = None
        del pipeline
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> Any:
        record, source = lora_folder.read_record(self.lora), find_model(self.model, self.revision)
        if record is None and not lora_folder.is_from_elsewhere(self.lora):
            msg = (
                f"The folder `{self.lora}` holds no finished LoRA. Call `prepare` with defects or normal images first, "
                "or set `lora` to the folder of a finished one."
            )
            raise ValueError(msg)
        if record is None and self.lora_weight is None:
            msg = f"Argument `lora_weight` has to be set: nothing says on how many defects `{self.lora}` was trained."
            raise ValueError(msg)
        base = None if record is None else (record["base_model"], record["base_revision"])
        if base is not None and base != (source.name, source.revision):
            msg = (
                f"The LoRA in `{self.lora}` belongs to the model {base[0]} (revision {base[1]}), but `model` is "
                f"{source.name} (revision {source.revision}). Set `model` and `revision` to its own, or train anew."
            )
            raise ValueError(msg)
        pipeline = super()._load()
        weight = self.lora_weight
        if weight is None and record is not None:
            weight = published_weight(record["counts"]["defects"])
        drop_text_layers(pipeline, self.training.clip_skip)
        with _quiet("diffusers.loaders"):  # which warns of text encoders that the LoRA leaves alone
            pipeline.load_lora_weights(
                str(self.lora), weight_name=lora_folder.WEIGHTS, adapter_name=_ADAPTER, local_files_only=True
            )
        pipeline.set_adapters([_ADAPTER], [weight])
        self._loaded |= {"lora_weight": weight, "lora_sha256": lora_folder.digest_of_weights(self.lora)}
        return pipeline


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's warnings back."""
    library = logging.getLogger(name)
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)
