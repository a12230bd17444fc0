"""Inpainting pipelines of Stable Diffusion's two families, small enough for tests: random weights, nothing downloaded.

What they draw is noise, but every part is there: tokenizers, text encoders, an autoencoder that shrinks by 8, a U-Net
with nine input channels, a scheduler. A pipeline is built once a session and saved as a folder of safetensors.
"""

import json
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import numpy as np
import torch

from anomalib_exdd.synthesis import Request
from made_up_defects import textured

CHANNELS = (32, 64)
START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def tiny_pipeline(family: Literal["sdxl", "sd"] = "sdxl", seed: int = 0, **unet: Any) -> Path:
    """Return the folder of a saved pipeline; the same arguments give the same folder."""
    diffusers: Any = import_module("diffusers")  # slow to import: only tests that draw pay for it
    folder = Path(mkdtemp(prefix=f"tiny-{family}-"))
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "tokenizer": _tokenizer(folder / "words"),
        "text_encoder": _text_encoder(projected=False),
        "unet": diffusers.UNet2DConditionModel(**{**_unet_settings(family), **unet}),
        "vae": diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(8, 16, 16, 16),
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.13025,
            force_upcast=False,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    }
    if family == "sdxl":
        parts["tokenizer_2"] = _tokenizer(folder / "words-2", pad_token="!")  # noqa: S106
        parts["text_encoder_2"] = _text_encoder(projected=True)
        pipeline = diffusers.StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionInpaintPipeline(**parts)
    target = folder / "pipeline"
    pipeline.save_pretrained(target)
    return target


def wanted(index: int = 0, height: int = 64, width: int = 64, *, seed: int | None = None, prompt: str = "") -> Request:
    """Return a request: a small rectangle, elsewhere for each number, in a surface of its own."""
    mask = np.zeros((height, width), dtype=bool)
    top, left = 8 + 5 * index % (height - 28), 10 + 3 * index % (width - 28)
    mask[top : top + 12, left : left + 9] = True
    return Request(index, index if seed is None else seed, textured(index, height, width), mask, prompt)


def _unet_settings(family: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "sample_size": 32,
        "in_channels": 9,
        "out_channels": 4,
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 32,
    }
    if family == "sdxl":
        settings |= {
            "transformer_layers_per_block": (1, 1),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,  # 32 of the pooled prompt and 6 numbers of 8
            "cross_attention_dim": 64,
        }
    return settings


def _text_encoder(*, projected: bool) -> Any:
    transformers: Any = import_module("transformers")
    words = len(_vocabulary())
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def _tokenizer(folder: Path, pad_token: str = END) -> Any:
    """Return a tokenizer of single letters, by way of the files that all versions of the library read."""
    tokenizer: Any = import_module("transformers").CLIPTokenizer
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(_MERGES) + "\n")
    return tokenizer.from_pretrained(
        folder,
        model_max_length=77,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad_token,
    )


_MERGES = ("t h", "th e</w>", "i n")


@cache
def _vocabulary() -> dict[str, int]:
    """Return the words: CLIP's 256 letters, the same at the end of a word, what the merges make, start and end."""
    shown = list(chain(range(33, 127), range(161, 173), range(174, 256)))
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [*map(chr, shown), *(chr(256 + number) for number in range(len(hidden)))]
    merged = [merge.replace(" ", "") for merge in _MERGES]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    return {word: number for number, word in enumerate(words)}
