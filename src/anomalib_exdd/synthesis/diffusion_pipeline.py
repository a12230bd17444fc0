"""Finds and loads diffusers' inpainting pipelines.

The libraries of the optional extra are imported when the first image is wanted, never earlier.
"""

import hashlib
import inspect
import json
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

LIBRARIES = ("diffusers", "transformers", "accelerate", "peft")
INDEX = "model_index.json"  # lists the parts of a saved pipeline
EDGE_BYTES = 1 << 20
FIRST_WITH_DTYPE = (0, 42)  # older versions of diffusers ignore `dtype` silently; newer ones deprecate `torch_dtype`


class ModelSource(NamedTuple):
    """A pipeline whose weights are not read yet."""

    model: str  # local folder, or name on the Hugging Face hub
    name: str  # to write into files, without the path of a local folder
    revision: str  # commit on the hub; of a local folder, a fingerprint of its files that begins with `local-`
    is_local: bool  # whether it is a folder
    class_name: str  # of the saved pipeline


def import_library(name: str) -> ModuleType:
    """Import a module of the extra `synthesis`; a RuntimeError names the libraries that are not installed."""
    if missing := [library for library in LIBRARIES if util.find_spec(library) is None]:
        msg = (
            f"{', '.join(missing)} cannot be found, which diffusion models need. Install the extra with "
            '`pip install "anomalib-exdd[synthesis]"`, or use PerlinSynthesizer or PasteSynthesizer.'
        )
        raise RuntimeError(msg)
    return import_module(name)


def find_model(model: str, revision: str | None = None) -> ModelSource:
    """Find a pipeline in a folder, on the hub or in its cache; of the hub only a small index is read.

    Raises:
        RuntimeError: If diffusers is not installed.
        ValueError: If this is neither a folder nor the name of a model.
        FileNotFoundError: If the folder holds no pipeline.
        ConnectionError: If the hub is not reachable and the model is not in its cache.
    """
    path = Path(model).expanduser()
    is_local = path.is_dir()
    index = path / INDEX if is_local else _index_from_hub(model, revision)
    class_name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    if is_local:
        return ModelSource(str(path), path.name, _fingerprint(path), is_local, class_name)
    return ModelSource(model, model, index.parent.name, is_local, class_name)


def read_pipeline(source: ModelSource, dtype: torch.dtype = torch.float32) -> Any:
    """Read an inpainting pipeline of any class into memory.

    Only safetensors are read, because pickles can run code. Invisible watermarks, which a detector would learn as a
    sign of defects, and filters that blacken images are left out. Files of half precision are preferred for it.

    Raises:
        ValueError: If this is no inpainting pipeline, or if its weights are pickles or incomplete.
    """
    diffusers = import_library("diffusers")
    known = inspect.signature(getattr(diffusers, source.class_name, object)).parameters
    left_out = {"add_watermarker": False, "safety_checker": None, "requires_safety_checker": False}
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    options = {
        "use_safetensors": True,
        "local_files_only": source.is_local,
        "revision": None if source.is_local else source.revision,
        "torch_dtype" if version < FIRST_WITH_DTYPE else "dtype": dtype,
        **{name: value for name, value in left_out.items() if name in known},
    }
    reasons: dict[str | None, Exception] = {}
    for variant in (None, "fp16") if dtype == torch.float32 else ("fp16", None):
        try:
            return diffusers.AutoPipelineForInpainting.from_pretrained(source.model, variant=variant, **options)
        except (OSError, ValueError) as error:  # noqa: PERF203  two passes
            reasons[variant] = error
    reason = reasons[None]  # that there are no files of half precision explains nothing
    msg = (
        f"The pipeline `{source.model}` (a {source.class_name}, revision {source.revision}) cannot be loaded for "
        f"inpainting: {reason} Only complete weights in safetensors are read; `save_pretrained` writes them."
    )
    raise ValueError(msg) from reason


def _index_from_hub(model: str, revision: str | None) -> Path:
    """Return the index of a model on the hub, from its cache where that is up to date or the hub is not reachable."""
    hub, errors = import_library("huggingface_hub"), import_library("huggingface_hub.errors")
    try:
        return Path(hub.hf_hub_download(model, INDEX, revision=revision))
    except errors.HFValidationError as error:
        msg = f"Argument `model` is '{model}', neither a folder nor a name on the Hugging Face hub (`owner/name`)."
        raise ValueError(msg) from error
    except errors.LocalEntryNotFoundError as error:
        msg = (
            f"The model `{model}` is not in the local cache, and the Hugging Face hub is not reachable. Go online, or "
            f"download it elsewhere with `hf download {model} --local-dir FOLDER` and set `model` to that folder."
        )
        raise ConnectionError(msg) from error


def _fingerprint(folder: Path) -> str:
    """Identify a pipeline by the name, the size and both ends of each of its files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        size = path.stat().st_size
        digest.update(f"{relative.as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(size - EDGE_BYTES, 0))
            digest.update(file.read(EDGE_BYTES))
    return f"local-{digest.hexdigest()[:16]}"
