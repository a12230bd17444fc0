"""The folder of a LoRA: its weights, a card for people, a record for programs, and checkpoints until it is finished.

The weights come last: a record without them is that of a training that was interrupted, and weights without a record
are those of a LoRA from elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalib_exdd.utils.files import write_atomically, write_file

from .diffusion_pipeline import ModelSource, import_library

WEIGHTS, RECORD, CARD, CHECKPOINT = "pytorch_lora_weights.safetensors", "lora.json", "README.md", "training.safetensors"


def make_record(
    source: ModelSource, settings: Mapping[str, Any], digests: Mapping[str, str], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Return everything that decides how a LoRA comes out, as plain values."""
    plain = json.loads(json.dumps({"settings": settings, "digests": digests, "counts": counts}))
    return {"base_model": source.name, "base_revision": source.revision, **plain}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished LoRA, or None if there is none.

    Raises:
        ValueError: If the file is broken.
    """
    path = folder / RECORD
    if not (path.is_file() and (folder / WEIGHTS).is_file()):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("base_model", "base_revision", "settings", "digests", "counts")}
    except (ValueError, KeyError, TypeError) as error:
        msg = f"The record `{path}` cannot be read ({error!r}). Delete the folder `{folder}` to train anew."
        raise ValueError(msg) from error


def is_from_elsewhere(folder: Path) -> bool:
    """Tell whether the folder holds weights that were not trained here."""
    return (folder / WEIGHTS).is_file() and not (folder / RECORD).exists()


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse a LoRA that was trained otherwise than is wanted.

    Raises:
        ValueError: If base model, settings or images differ.
    """
    differences = []
    for name in wanted:
        if isinstance(wanted[name], dict):
            keys = [*wanted[name], *(key for key in found[name] if key not in wanted[name])]
            pairs = [(key, found[name].get(key), wanted[name].get(key)) for key in keys]
        else:
            pairs = [(name, found[name], wanted[name])]
        differences += [f"{key} {was!r} instead of {now!r}" for key, was, now in pairs if was != now]
    if differences:
        msg = (
            f"The LoRA in `{folder}` was trained with other images or settings: {'; '.join(differences)}. Set `lora` "
            "to another folder, or delete this one to train anew."
        )
        raise ValueError(msg)


def save_checkpoint(folder: Path, record: Mapping[str, Any], step: int, tensors: Mapping[str, Tensor]) -> None:
    """Write what a training needs to go on, in place of an earlier checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / CHECKPOINT) as partial:
        save_file(dict(tensors), partial, metadata={"step": str(step), "record": json.dumps(record)})


def load_checkpoint(folder: Path, record: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]] | None:
    """Read the checkpoint of an interrupted training.

    Args:
        folder: Folder of the LoRA.
        record: How it is to be trained.

    Returns:
        The number of steps taken and the tensors, or None if there is no checkpoint.

    Raises:
        ValueError: If it belongs to another training.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        check_same(json.loads(metadata["record"]), record, folder)
        return int(metadata["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def save_lora(pipeline: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the LoRA of a pipeline's U-Net with its card and its record, and remove its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = import_library("peft").get_peft_model_state_dict(pipeline.unet)
    description = pipeline.unet.peft_config["default"].to_dict()
    with write_atomically(folder / WEIGHTS) as partial:
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers,
            unet_lora_adapter_metadata=description,
            weight_name=partial.name,
        )
        write_file(folder / CARD, _card(record, xl=getattr(pipeline, "text_encoder_2", None) is not None))
        write_file(folder / RECORD, json.dumps(record, indent=2) + "\n")
    (folder / CHECKPOINT).unlink(missing_ok=True)


def digest_of_weights(folder: Path) -> str:
    """Return the SHA-256 of a LoRA's numbers; the order of entries in the file is left to chance by the library."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _card(record: Mapping[str, Any], *, xl: bool) -> str:
    """Return the model card: Hugging Face's header, then what a reader wants to know."""
    settings, counts, base = record["settings"], record["counts"], record["base_model"]
    on_the_hub = not record["base_revision"].startswith("local-")
    header = [
        "---",
        *([f"base_model: {base}"] if on_the_hub else []),
        "library_name: diffusers",
        "pipeline_tag: image-to-image",
        f"tags: [lora, inpainting, dreambooth, {'stable-diffusion-xl' if xl else 'stable-diffusion'}]",
        "license: other",
        "---",
    ]
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join(
        [
            *header,
            "",
            "# LoRA that draws defects into images of a surface",
            "",
            f"Low-rank changes to the U-Net of the inpainting model `{base}` (revision {record['base_revision']}),",
            "trained by anomalib-exdd with DreamBooth, after In&Out (arXiv 2406.00501).",
            "",
            f"- images of defects: {counts['defects']}",
            f"- normal images: {counts['normals']}",
            f"- prompts for defects: {', '.join(repr(prompt) for prompt in settings['defect_prompts'])}",
            "",
            "| setting | value |",
            "| --- | --- |",
            *rows,
            "",
            "## Use",
            "",
            "```python",
            f'pipeline.load_lora_weights("FOLDER", weight_name="{WEIGHTS}")',
            "```",
            "",
            "## License",
            "",
            f"The license of the base model `{base}` applies to these weights as well, with its restrictions of use.",
            "The images they were trained on have an owner: pass the weights on only where the terms of both allow it.",
            "",
        ]
    )
