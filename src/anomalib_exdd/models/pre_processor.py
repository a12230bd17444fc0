"""Pre-processing that is the same in training and in every exported model.

Shape suffixes: B images, C channels, H x W pixels, h x w pixels after resizing.
"""

import logging
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Resize, Transform

from .transforms import steps_of

logger = logging.getLogger(__name__)

ONNX_OPSET = 18
"""What torch writes; to the older operator set that Anomalib asks for, models cannot be converted."""

_BILINEAR = {InterpolationMode.BILINEAR, "bilinear", 2}  # names as torchvision takes them


class AntialiasedPreProcessor(PreProcessor):  # type: ignore[misc]
    """Anomalib's pre-processor, whose exports resize with antialiasing where training does.

    Anomalib exports resizing without antialiasing, because OpenVINO would ignore it: an exported model would see other
    pixels than the trained one if images are shrunk. Here exports resize by matrix products.
    """

    @classmethod
    def of(cls, given: nn.Module | bool) -> nn.Module | bool:
        """Return an equal pre-processor of this class for one of Anomalib's own; anything else as it is."""
        return cls(given.transform) if type(given) is PreProcessor else given

    def forward(self, batch: Tensor) -> Tensor:
        """Pre-process images that come from a file, float, shape (B, C, H, W), as in training."""
        if not torch.compiler.is_compiling():
            return self.transform(batch) if self.transform else batch
        for step in steps_of(self.transform):
            batch = _traced(step, batch)
        return batch


def resize_weights(size: int, target: int, like: Tensor) -> Tensor:
    """Return the matrix that resizes along one axis as ``F.interpolate(mode="bilinear", antialias=True)`` does.

    Its shape is (target, size), its device and type are those of ``like``; rows sum to 1. The size is unknown while an
    export for images of any size is traced.
    """
    pixel = torch.arange(size, device=like.device, dtype=like.dtype)
    scale = (pixel[-1:] + 1) / target  # as a tensor: nothing may branch on a size that is unknown
    centre = (torch.arange(target, device=like.device, dtype=like.dtype) + 0.5) * scale
    weights = (1 - ((pixel - centre.unsqueeze(1) + 0.5) / scale.clamp_min(1)).abs()).clamp_min(0)
    return weights / weights.sum(dim=1, keepdim=True)


def _traced(step: Transform, images_BCHW: Tensor) -> Tensor:
    """Apply a transform in operations that ONNX and OpenVINO have."""
    as_anomalib_exports: Any = get_exportable_transform(step)
    if not isinstance(step, Resize) or not step.antialias:
        return as_anomalib_exports(images_BCHW)
    if step.interpolation not in _BILINEAR or len(step.size) != 2:
        message = "Exported without antialiasing: %s. Scores may change; resize bilinearly, by (height, width)."
        logger.warning(message, step)
        return as_anomalib_exports(images_BCHW)
    rows_hH, columns_wW = (
        resize_weights(size, target, images_BCHW)
        for size, target in zip(images_BCHW.shape[-2:], step.size, strict=True)
    )
    planes_NHW = images_BCHW.flatten(end_dim=1)  # OpenVINO mixes up the dimensions when it joins products and channels
    if len(rows_hH) < len(columns_wW):  # the smaller product first
        planes_Nhw = (rows_hH @ planes_NHW) @ columns_wW.T
    else:
        planes_Nhw = rows_hH @ (planes_NHW @ columns_wW.T)
    return planes_Nhw.unflatten(0, images_BCHW.shape[:2])
