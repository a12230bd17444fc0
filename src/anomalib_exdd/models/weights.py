"""Networks of timm and where their weights come from: timm's own, or a local file that runs no code."""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

INITIAL_SEED = 0
"""Seed of networks without weights."""

_SEEDING = threading.Lock()  # all threads draw from one generator
_RANDOM = {
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_),  # the last is a step of the truncated normal
    *(nn.init.kaiming_normal_, nn.init.kaiming_uniform_),
}


class WithoutInitialValues(TorchFunctionMode):
    """Context in which networks are built without drawing initial weights, for those that are loaded afterwards.

    Until then the weights are uninitialised memory. Unlike on the meta device, buffers that no state dict holds have
    their values. Other threads are not affected.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip functions that fill a tensor with random numbers."""
        kwargs = kwargs or {}
        if func in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed within the block, also in several threads, and restore the generator of the CPU after it."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of the CPU alone: torch.manual_seed would reach all devices
        yield


def check_is_known(backbone: str) -> None:
    """Raise a ValueError if timm does not have a backbone."""
    if not timm.is_model(backbone):
        similar = timm.list_models(f"*{backbone.split('.', maxsplit=1)[0][:6]}*")[:5]
        msg = f"Argument `backbone` has to be a timm model, but got {backbone!r}. Similar names: {similar or 'none'}."
        raise ValueError(msg)


def check_is_file(weights: Path | None) -> None:
    """Raise a ValueError if a file of weights does not exist."""
    if weights is not None and not weights.is_file():
        msg = f"Argument `weights` has to be a file, but there is none at {weights}."
        raise ValueError(msg)


def initial_network(backbone: str, seed: int = INITIAL_SEED, **options: Any) -> nn.Module:
    """Build a network of timm with random weights that depend on the seed alone; ``options`` are timm's."""
    with seeded(seed):
        return timm.create_model(backbone, pretrained=False, **options)


def timm_weights(backbone: str, **options: Any) -> dict[str, Tensor]:
    """Load timm's ImageNet weights; a RuntimeError if they are neither cached nor within reach."""
    try:
        return timm.create_model(backbone, pretrained=True, **options).state_dict()
    except Exception as error:  # every hub client and version fails with classes of its own
        msg = (
            f"The ImageNet weights of {backbone!r} are not in the local cache and could not be downloaded "
            f"({type(error).__name__}). Give `--model.weights FILE`, or go without: `--model.pre_trained false`."
        )
        raise RuntimeError(msg) from error


def file_weights(
    path: Path, backbone: str, seed: int = INITIAL_SEED, **options: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Read a network's weights from a local file; tensors that it lacks are drawn as :func:`initial_network` draws.

    Returns:
        The complete weights, and the names of the tensors (of two dimensions and more) that are not in the file.
    """
    overlay = {"state_dict": read_state_dict(path)}
    try:
        with seeded(seed):
            network = timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        initial = initial_network(backbone, seed, **options).state_dict()
    except (RuntimeError, ValueError, KeyError) as error:
        msg = f"The weights in {path} do not fit the backbone {backbone!r}: {error}"
        raise ValueError(msg) from error
    loaded: dict[str, Tensor] = network.state_dict()
    # timm leaves tensors that the file lacks as they were drawn, and goes on: those are equal to the same draw.
    return loaded, [name for name, value in loaded.items() if value.ndim > 1 and torch.equal(value, initial[name])]


def not_in_file(path: Path, backbone: str, missing: list[str]) -> ValueError:
    """Return the error for a file that lacks tensors of the network."""
    lacks = f"{len(missing)} of its tensors are not in the file, the first of them {missing[0]!r}"
    return ValueError(f"The weights in {path} do not fit the backbone {backbone!r}: {lacks}.")


def fresh_layers(names: list[str], missing: list[str]) -> list[str] | None:
    """Name the layers that have to be learned from scratch, because a file of weights lacks the end of a network.

    Of all tensors of a network, in its order, and those that are missing in the file, these are the largest layers
    without any in the file; None if the file has none, or some behind them: then it belongs to another network.

    Example:
        >>> fresh_layers(["stem.0", "layer1.a.w", "layer2.a.w", "layer2.b.w"], ["layer2.a.w", "layer2.b.w"])
        ['layer2']
    """
    if not missing:
        return []
    present = [name for name in names if name not in set(missing)]
    if not present or names[: len(present)] != present:
        return None

    def layer_of(name: str) -> str:
        prefixes = accumulate(name.split("."), "{}.{}".format)
        return next(each for each in prefixes if not any(f"{other}.".startswith(f"{each}.") for other in present))

    return list(dict.fromkeys(layer_of(name) for name in missing))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code in the file; a ValueError if it holds anything but tensors."""
    try:
        content: dict[str, Tensor] = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # timm and torch have no common class for what may be wrong with a file
        msg = f"The weights in {path} cannot be read as plain tensors (safetensors, pth), or are no state dict: {error}"
        raise ValueError(msg) from error
    if not all(isinstance(value, Tensor) for value in content.values()):
        msg = f"The weights in {path} are no state dict: they hold more than tensors."
        raise ValueError(msg)
    return content


def fingerprint(values: Iterable[Any]) -> str:
    """Return the SHA-256 of the bytes of all tensors among the values, of any dtype, in hexadecimal."""
    content = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
