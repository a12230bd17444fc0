"""The only place where diffusers is imported: which inpainting pipeline is loaded, from where, and how.

Libraries of the optional extra are imported when the first image is wanted, never earlier.
"""

import hashlib
import inspect
import json
from functools import partial
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

LIBRARIES = ("diffusers", "transformers", "accelerate", "peft")
_INDEX = "model_index.json"  # what a saved pipeline consists of
_HALF_VARIANT = "fp16"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_EDGE_BYTES = 1 << 20
_FIRST_WITH_DTYPE = (0, 42)  # older versions ignore `dtype` without a word; newer ones deprecate `torch_dtype`


class ModelSource(NamedTuple):
    """A pipeline that was found, before its weights are read.

    Attributes:
        model: Local folder, or name on the Hugging Face hub.
        revision: Commit of a model on the hub; fingerprint of a local folder's files, which begins with `local-`.
        is_local: Whether it is a folder.
        class_name: Class of the saved pipeline.
    """

    model: str
    revision: str
    is_local: bool
    class_name: str

    @property
    def name(self) -> str:
        """Name to write into files: a local folder's path says more about the machine than about the model."""
        return Path(self.model).name if self.is_local else self.model


def import_library(name: str) -> ModuleType:
    """Import a library of the extra `synthesis`.

    Args:
        name: Module to import.

    Returns:
        The module.

    Raises:
        RuntimeError: If any of the extra's libraries is not installed.
    """
    missing = [library for library in LIBRARIES if util.find_spec(library) is None]
    if missing:
        msg = (
            f"Defects cannot be drawn by a diffusion model, because {', '.join(missing)} cannot be found. Install the "
            'extra with `pip install "anomalib-exdd[synthesis]"`, or use PerlinSynthesizer or PasteSynthesizer.'
        )
        raise RuntimeError(msg)
    return import_module(name)


def find_model(model: str, revision: str | None = None) -> ModelSource:
    """Find a pipeline in a folder, or on the hub or in its cache; of the hub only a small index is read.

    Args:
        model: Folder that `save_pretrained` has written, or name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        Where the pipeline is, and its exact revision.

    Raises:
        RuntimeError: If diffusers is not installed.
        ValueError: If there is no such pipeline.
        ConnectionError: If the hub is not reachable and the model is not in its cache.
    """
    diffusers = import_library("diffusers")
    path = Path(model).expanduser()
    is_local = path.is_dir()
    if is_local:
        if revision is not None:
            msg = f"Argument `revision` is '{revision}', but `{model}` is a folder, which has none. Leave it out."
            raise ValueError(msg)
        index = path / _INDEX
        if not index.is_file():
            msg = (
                f"The folder `{model}` is no diffusers pipeline: it holds no {_INDEX}. Give the folder that "
                "`pipeline.save_pretrained` has written; a single file of weights has to be converted first."
            )
            raise ValueError(msg)
        commit = _fingerprint(path)
    else:
        index = _index_from_hub(model, revision, looks_like_a_path=path.exists() or model.count("/") != 1)
        commit = index.parent.name
    class_name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    if not hasattr(diffusers, class_name):
        msg = (
            f"The pipeline `{model}` is a '{class_name}', which diffusers {diffusers.__version__} does not know. "
            "Update diffusers, or choose another inpainting pipeline."
        )
        raise ValueError(msg)
    return ModelSource(str(path) if is_local else model, commit, is_local, class_name)


def load_inpainting(
    model: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    offload: bool = False,
) -> Any:
    """Load a pipeline for inpainting, whatever its class.

    Weights are read from safetensors alone, because pickles can run code. Invisible watermarks, which would be learned
    as a trait of defects, and filters that blacken images they misjudge are left out.

    Args:
        model: Folder that `save_pretrained` has written, or name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub.
        dtype: Precision of the weights. Files of half precision are preferred for it where there are any.
        device: Where to compute.
        offload: Keep in the device's memory only what computes right now.

    Returns:
        The diffusers pipeline.

    Raises:
        RuntimeError: If diffusers is not installed.
        ValueError: If this is no inpainting pipeline, if its weights are pickles, or if `dtype` or `offload` do not go
            with the device.
        ConnectionError: If the hub is not reachable and the model is not in its cache.
    """
    kind = torch.device(device).type
    if dtype != torch.float32 and kind != "cuda":
        msg = (
            f"Argument `dtype` is {dtype}, but half precision works on CUDA devices only, and the device is '{device}'."
        )
        raise ValueError(msg)
    if offload and kind == "cpu":
        msg = "Argument `offload` is True, but the device is the CPU: there is nothing to offload from. Leave it out."
        raise ValueError(msg)
    source = find_model(model, revision)
    pipeline = _read(source, dtype)
    pipeline.set_progress_bar_config(disable=True)  # images are counted, not steps
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def _read(source: ModelSource, dtype: torch.dtype) -> Any:
    """Read the weights, in the variant that suits the precision or else in the other one."""
    diffusers = import_library("diffusers")
    if source.is_local:
        _refuse_pickles(Path(source.model))
    known = inspect.signature(getattr(diffusers, source.class_name).__init__).parameters
    wanted = {"add_watermarker": False, "safety_checker": None, "requires_safety_checker": False}
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    options = {
        "torch_dtype" if version < _FIRST_WITH_DTYPE else "dtype": dtype,
        "use_safetensors": True,
        "local_files_only": source.is_local,
        **({} if source.is_local else {"revision": source.revision}),
        **{name: value for name, value in wanted.items() if name in known},
    }
    read = partial(diffusers.AutoPipelineForInpainting.from_pretrained, source.model, **options)
    first, second = (None, _HALF_VARIANT) if dtype == torch.float32 else (_HALF_VARIANT, None)
    try:
        return read(variant=first)
    except (OSError, ValueError) as error:
        reason = error
    try:
        return read(variant=second)
    except (OSError, ValueError) as error:
        reason = reason if first is None else error  # that there are no files of half precision explains nothing
    if "AutoPipeline can't find" in str(reason):
        msg = (
            f"The pipeline `{source.model}` is a '{source.class_name}', for which diffusers has no inpainting. Choose "
            "an inpainting pipeline, such as diffusers/stable-diffusion-xl-1.0-inpainting-0.1."
        )
    else:
        msg = (
            f"The pipeline `{source.model}` (revision {source.revision}) cannot be loaded: {reason} Only weights in "
            "safetensors are read. Check that the files are complete, or save them anew with `save_pretrained`."
        )
    raise ValueError(msg) from reason


def _index_from_hub(model: str, revision: str | None, *, looks_like_a_path: bool) -> Path:
    """Return the index of a model on the hub, from its cache where that is up to date or the hub is not reachable."""
    if looks_like_a_path:
        msg = (
            f"Argument `model` is '{model}', which is neither a folder nor a name on the Hugging Face hub. Check the "
            "path of the folder that `save_pretrained` has written, or give a name of the form `owner/name`."
        )
        raise ValueError(msg)
    hub, errors = import_library("huggingface_hub"), import_library("huggingface_hub.errors")
    try:
        return Path(hub.hf_hub_download(model, _INDEX, revision=revision))
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        problem = "is not on the Hugging Face hub under this name and revision, or needs an account"
        fix = "Check `model` and `revision`; for a gated model, accept its terms on its page and run `hf auth login`."
        raise ValueError(_not_found(model, revision, problem, fix)) from error
    except errors.LocalEntryNotFoundError as error:
        problem = "is not in the local cache, and the Hugging Face hub is not reachable"
        fix = (
            "Go online, or download it on another machine with "
            f"`hf download {model} --local-dir FOLDER` and set `model` to that folder."
        )
        raise ConnectionError(_not_found(model, revision, problem, fix)) from error
    except (errors.EntryNotFoundError, errors.HFValidationError) as error:
        problem = f"is no diffusers pipeline ({error})"
        fix = "Choose an inpainting pipeline, such as diffusers/stable-diffusion-xl-1.0-inpainting-0.1."
        raise ValueError(_not_found(model, revision, problem, fix)) from error
    except OSError as error:  # the hub answers, but not with the file
        problem = f"cannot be fetched from the Hugging Face hub ({error})"
        raise ConnectionError(_not_found(model, revision, problem, "Try again later.")) from error


def _not_found(model: str, revision: str | None, problem: str, fix: str) -> str:
    which = f"`{model}`" if revision is None else f"`{model}` (revision {revision})"
    return f"The model {which} {problem}. {fix}"


def _refuse_pickles(folder: Path) -> None:
    """Refuse a part of the pipeline that has weights, but none in safetensors.

    Raises:
        ValueError: If there is one.
    """
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [path for path in part.iterdir() if path.is_file()]
        pickles = sorted(path.name for path in files if path.suffix in _PICKLES)
        if pickles and not any(path.suffix == ".safetensors" for path in files):
            msg = (
                f"The weights `{part / pickles[0]}` are a pickle, which can run code when it is read. Load the "
                "pipeline where you trust it and save it with `save_pretrained`, which writes safetensors."
            )
            raise ValueError(msg)


def _fingerprint(folder: Path) -> str:
    """Tell pipelines in folders apart: by all small files, and by the size and both ends of the large ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        size = path.stat().st_size
        digest.update(f"{relative.as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(size - _EDGE_BYTES, 0))
            digest.update(file.read(_EDGE_BYTES))
    return f"local-{digest.hexdigest()[:16]}"
