"""Patch features of a frozen backbone (paper, section 3.2.1)."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from timm.models import FeatureDictNet, FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anomalib_exdd.models.weights import (
    INITIAL_SEED,
    WithoutInitialValues,
    check_is_file,
    check_is_known,
    file_weights,
    not_in_file,
    seeded,
    timm_weights,
)

from .filter_bank import FilterBank

FILTER_BANK = "filter_bank"  # name of the backbone that needs no weights

_PREPARING = threading.RLock()  # first predictions may come from several threads at once


class PatchFeatureExtractor(nn.Module):
    """Locally averaged features of several layers, resized to the first layer's grid and concatenated.

    Weights are loaded when features are first needed, unless a state dict came before: a trained checkpoint brings its
    own, and needs neither network nor file.

    Args:
        backbone: As ``layers``, ``pre_trained`` and ``weights`` an argument of :class:`.ExDD`.
        padded: Average over 3 x 3 neighbourhoods with padding, as PatchCore does; False averages without padding and
            pools back to the grid adaptively, as the published code of ExDD does.

    Attributes:
        fine_layer: The layer before the first one, if its grid is twice as fine.
        reductions: Pixels to a cell of each layer; none for a backbone that relates patches to the whole image.

    Raises:
        ValueError: If timm does not know the backbone or the backbone has no such layer.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        padded: bool = True,
    ) -> None:
        super().__init__()
        self.backbone_name = backbone
        self.layers = tuple(layers)
        self.pre_trained = pre_trained
        self.weights = None if weights is None else Path(weights)
        self.padded = padded
        self.weights_ready = backbone == FILTER_BANK or (weights is None and not pre_trained)
        self.fine_layer: str | None = None
        self.reductions: tuple[int, ...] = ()
        self.backbone: nn.Module
        self._folded: tuple[nn.Module, ...] = ()  # a tuple, so that it is no submodule with a state of its own
        if backbone == FILTER_BANK:
            self.backbone = FilterBank()
            return
        self.fine_layer = _check_backbone(backbone, self.layers)
        layers = self.layers if self.fine_layer is None else (self.fine_layer, *self.layers)
        with seeded(INITIAL_SEED), nullcontext() if self.weights_ready else WithoutInitialValues():
            self.backbone = TimmFeatureExtractor(backbone, layers, pre_trained=False)
        self.backbone.requires_grad_(requires_grad=False).eval()
        self.reductions = tuple(getattr(self.backbone, "reductions", ()))[-len(self.layers) :]

    def load_weights(self) -> None:
        """Load the backbone's weights if they have not been loaded or restored yet."""
        with _PREPARING:
            if self.weights_ready:
                return
            check_is_file(self.weights)  # not in the constructor: a checkpoint of another machine brings its weights
            options: dict[str, Any] = {}
            if not self.backbone._uses_intermediates:  # noqa: SLF001  Anomalib has no public name for it
                options = {"features_only": True, "out_indices": self.backbone.idx}
            if self.weights is None:
                loaded = timm_weights(self.backbone_name, **options)
            else:
                loaded, missing = file_weights(self.weights, self.backbone_name, **options)
                if missing:
                    raise not_in_file(self.weights, self.backbone_name, missing)
            network: Any = self.backbone.feature_extractor
            network.load_state_dict(loaded)
            self._folded = ()
            self.weights_ready = True

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Extract patch features; see :meth:`extract`."""
        return self.extract(images_BCHW)[0]

    def extract(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Extract patch features of normalised images, (B, D, h, w), and those of the layer before, on a finer grid.

        The fine ones are not averaged, shape (B, F, 2 h, 2 w); None if the backbone has no such layer.
        """
        if not self.weights_ready:
            self.load_weights()
        parameter = next(self.backbone.parameters(), images_BCHW)
        images_BCHW = images_BCHW.to(parameter.dtype)
        if not torch.compiler.is_compiling():
            # Convolutions are faster with the channels last, and patches are rows of such features without a copy.
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return self._extract(images_BCHW)

    def _extract(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        network = self.backbone if torch.compiler.is_compiling() else self._inference_network()
        maps = list(network(images_BCHW).values())
        fine = None if self.fine_layer is None else maps.pop(0)
        grid = maps[0].shape[-2:]
        if self.padded:
            pooled = [F.avg_pool2d(features, 3, stride=1, padding=1) for features in maps]
            resized = [pooled[0]]
            resized += [F.interpolate(features, size=grid, mode="bilinear") for features in pooled[1:]]
        else:
            resized = [adaptive_average(F.avg_pool2d(features, 3, stride=1), grid) for features in maps]
        return torch.cat(resized, dim=1), fine

    def _inference_network(self) -> nn.Module:
        """Return the backbone with its batch norms folded into the convolutions, which is faster."""
        with _PREPARING:
            self._folded = self._folded or (with_folded_norms(self.backbone),)
            return self._folded[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PatchFeatureExtractor":
        self._folded = ()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.weights_ready = True
        self._folded = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the folded network out: it is made again where it is needed."""
        return {**self.__dict__, "_folded": ()}


def with_folded_norms(network: nn.Module) -> nn.Module:
    """Return a copy with batch norms folded into the convolutions that they follow; outputs differ by rounding.

    ``torch.fx`` would change ``nn.Module`` for all threads of the process. Batch norms of unknown modules stay; without
    any that can be folded, the network itself is returned.
    """
    found = [(path, *pair) for path, module in network.named_modules() for pair in _conv_norm_pairs(module)]
    if not found or any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):  # noqa: SLF001
        return network  # hooks may look at what folding changes
    folded = copy.deepcopy(network).eval()
    for path, conv, norm in found:
        module = folded.get_submodule(path)
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
    return folded


def _conv_norm_pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Name the children of a module that are a convolution and the batch norm that alone takes its output."""
    kind = type(module)  # compared exactly: a subclass may run its children differently
    pairs: list[tuple[str, str]] = []
    if kind in {BasicBlock, Bottleneck}:
        pairs = [(f"conv{number}", f"bn{number}") for number in (1, 2, 3)]
    elif kind in {nn.Sequential, FeatureListNet, FeatureDictNet}:
        pairs = list(pairwise(module._modules))  # noqa: SLF001  names, those of repeated modules included
    returned = getattr(module, "return_layers", {})
    for conv, norm in pairs:
        children = type(getattr(module, conv, None)), type(getattr(module, norm, None))
        if children == (nn.Conv2d, nn.BatchNorm2d) and conv not in returned:
            yield conv, norm


def adaptive_average(features_BChw: Tensor, grid: Sequence[int]) -> Tensor:
    """Pool (B, C, h, w) to a grid as ``adaptive_avg_pool2d`` does, which ONNX lacks for sizes that do not divide."""
    weights = []
    for size, target in zip(features_BChw.shape[-2:], grid, strict=True):
        cell = torch.arange(target, device=features_BChw.device).unsqueeze(1)
        position = torch.arange(size, device=features_BChw.device)
        start, end = (cell * size) // target, ((cell + 1) * size + target - 1) // target
        inside = ((position >= start) & (position < end)).to(features_BChw.dtype)
        weights.append(inside / inside.sum(dim=1, keepdim=True))
    rows, columns = weights
    return rows @ features_BChw @ columns.T


def _check_backbone(backbone: str, layers: tuple[str, ...]) -> str | None:
    """Refuse unknown backbones and layers, and return the layer before the first one if its grid is twice as fine."""
    if not layers:
        msg = "Argument `layers` has to name at least one layer of the backbone."
        raise ValueError(msg)
    check_is_known(backbone)
    if "vit" in backbone.lower():  # Anomalib reads transformers' blocks by number
        return None
    with torch.device("meta"):
        network: Any = timm.create_model(backbone, pretrained=False, features_only=True)
    available = network.feature_info.module_name()
    unknown = [layer for layer in layers if layer not in available]
    if unknown:
        msg = f"Argument `layers` names {unknown}, but the backbone {backbone!r} has the layers {available}."
        raise ValueError(msg)
    reductions = dict(zip(available, network.feature_info.reduction(), strict=True))
    before = available[: available.index(layers[0])][-1:]
    return next((name for name in before if 2 * reductions[name] == reductions[layers[0]]), None)
