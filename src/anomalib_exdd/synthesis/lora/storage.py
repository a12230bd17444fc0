"""The folder of a LoRA: its weights, a model card, a record of its training, and a checkpoint until it is finished.

The weights come last: a record without weights belongs to an interrupted training, weights without a record to a LoRA
that was trained elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from anomalib_exdd.synthesis.diffusion_pipeline import import_library
from anomalib_exdd.synthesis.output_folder import differences
from anomalib_exdd.utils.files import PARTIAL_FILES, write_atomically, write_file

from .trainer import is_xl

WEIGHTS, RECORD, CARD, CHECKPOINT = "pytorch_lora_weights.safetensors", "lora.json", "README.md", "checkpoint.pt"

CARD_TEMPLATE = """---
{base_line}library_name: diffusers
pipeline_tag: image-to-image
tags: [lora, inpainting, dreambooth, {family}]
license: other
---

# LoRA that draws defects into images of a surface

Low-rank changes to the U-Net of the inpainting model `{base}` (revision {revision}), trained by anomalib-exdd with
DreamBooth, after In&Out (arXiv 2406.00501). Use: `pipeline.load_lora_weights("FOLDER", weight_name="{weights}")`.

- images of defects: {defects}
- normal images: {normals}

| setting | value |
| --- | --- |
{rows}

The license of the base model `{base}` applies to these weights as well, with its restrictions of use. The images they
were trained on have an owner: pass the weights on only where the terms of both allow it.
"""


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished LoRA, or None if it is not finished or was not trained here."""
    path = folder / RECORD
    if not (path.is_file() and (folder / WEIGHTS).is_file()):
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def is_from_elsewhere(folder: Path) -> bool:
    """Return whether the folder holds weights that were not trained here."""
    return (folder / WEIGHTS).is_file() and not (folder / RECORD).exists()


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse a LoRA of another base model, other settings or images."""
    if found != wanted:
        what = "; ".join(differences(found, wanted))
        msg = f"The LoRA in `{folder}` was trained otherwise: {what}. Set `lora` to another folder, or delete this one."
        raise ValueError(msg)


def save_checkpoint(folder: Path, record: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state of a training, in place of an earlier checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / CHECKPOINT) as partial:
        torch.save({"record": dict(record), **state}, partial)


def load_checkpoint(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state of an interrupted training, or None if there is no checkpoint; it has to be of the same record."""
    if not (folder / CHECKPOINT).is_file():
        return None
    state = dict(torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True))
    check_same(state["record"], record, folder)
    return state


def save_lora(pipeline: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the LoRA of a pipeline's U-Net with its card and its record, and remove what only training needs."""
    folder.mkdir(parents=True, exist_ok=True)
    card = CARD_TEMPLATE.format(
        base_line="" if record["base_revision"].startswith("local-") else f"base_model: {record['base_model']}\n",
        family="stable-diffusion-xl" if is_xl(pipeline) else "stable-diffusion",
        rows="\n".join(f"| {name} | {value} |" for name, value in record["settings"].items()),
        base=record["base_model"],
        revision=record["base_revision"],
        weights=WEIGHTS,
        **record["counts"],
    )
    with write_atomically(folder / WEIGHTS) as partial:
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=import_library("peft").get_peft_model_state_dict(pipeline.unet),
            unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
            weight_name=partial.name,
        )
        write_file(folder / CARD, card)
        write_file(folder / RECORD, json.dumps(record, indent=2) + "\n")
    for path in (folder / CHECKPOINT, *folder.glob(PARTIAL_FILES)):  # a killed training may have left partial files
        path.unlink(missing_ok=True)


def digest_of_weights(folder: Path) -> str:
    """Return the SHA-256 of a LoRA's numbers; the library writes the entries of the file in random order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
