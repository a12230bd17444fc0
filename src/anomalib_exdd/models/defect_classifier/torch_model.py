"""The classifier as a plain torch module: a backbone, one linear layer, and the map that the two imply.

Shape suffixes: B images, C channels, H x W pixels, h x w cells of the backbone's last feature maps.
"""

import logging
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.models.settings import check
from anomalib_exdd.models.weights import (
    WithoutInitialValues,
    check_is_file,
    check_is_known,
    file_weights,
    fresh_layers,
    initial_network,
    not_in_file,
    seeded,
    timm_weights,
)

logger = logging.getLogger(__name__)

_UNPOOLED: dict[str, Any] = {"num_classes": 0, "global_pool": ""}  # the last feature maps, without timm's own head
_PROBE_SIDE = 64  # pixels of the image that tells the shape of a backbone's output


class DefectClassifierModel(nn.Module):
    """Probability that an image is defective, and its class activation map (Zhou et al., 2016).

    A linear layer after global average pooling is linear in every cell of the last feature maps: applied to the cells
    it gives a map, in log-odds, whose mean is the image's logit exactly.

    The architecture is built without weights. They are loaded by :meth:`load_weights` when training starts, unless a
    checkpoint was restored before, which needs neither network nor file.

    The arguments are those of :class:`.DefectClassifier`; a ValueError if timm does not know the backbone, or it has no
    feature maps.
    """

    def __init__(
        self,
        backbone: str,
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        freeze_batch_norm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_is_known(backbone)
        self.weights = None if weights is None else Path(weights)
        self.backbone_name = backbone
        self.freeze_batch_norm = freeze_batch_norm
        self.seed = seed
        self.weights_ready = weights is None and not pre_trained
        self.fresh: list[str] = [] if pre_trained or weights else [""]
        channels = _num_channels(backbone)
        with nullcontext() if self.weights_ready else WithoutInitialValues():
            self.backbone = initial_network(backbone, seed, **_UNPOOLED)
        with seeded(seed):
            self.head = nn.Linear(channels, 1)

    def load_weights(self) -> None:
        """Load the backbone's weights if they have not been loaded or restored yet."""
        if self.weights_ready:
            return
        check_is_file(self.weights)  # here and not above: a checkpoint of another machine brings its weights
        if self.weights is None:
            loaded = timm_weights(self.backbone_name, **_UNPOOLED)
        else:
            loaded, missing = file_weights(self.weights, self.backbone_name, self.seed, **_UNPOOLED)
            fresh = fresh_layers([name for name, value in loaded.items() if value.ndim > 1], missing)
            if fresh is None:
                raise not_in_file(self.weights, self.backbone_name, missing)
            if fresh:
                layers = ", ".join(f"`{layer}`" for layer in fresh)
                message = "%s has no weights for %s of %s: learned from scratch (seed %d)."
                logger.warning(message, self.weights, layers, self.backbone_name, self.seed)
            self.fresh = fresh
        self.backbone.load_state_dict(loaded)
        self.weights_ready = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "DefectClassifierModel":
        """Switch between training and evaluation; frozen batch norms stay in evaluation."""
        super().train(mode)
        if mode and self.freeze_batch_norm:
            for name, module in self.backbone.named_modules():
                is_fresh = any(f"{name}.".startswith(f"{layer}." if layer else "") for layer in self.fresh)
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and not is_fresh:
                    module.eval()
        return self

    def activation(self, images_BCHW: Tensor) -> Tensor:
        """Return each cell's part of the logit, float32, shape (B, h, w); the mean is the logit."""
        if not self.weights_ready:
            msg = "The classifier has no weights yet. Train the model, or load a trained checkpoint, before predicting."
            raise ValueError(msg)
        features_BChw = self.backbone(images_BCHW)
        with torch.autocast(device_type=images_BCHW.device.type, enabled=False):
            weight_11C = self.head.weight.float()[..., None, None]
            return F.conv2d(features_BChw.float(), weight_11C, self.head.bias.float()).squeeze(1)

    def forward(self, images_BCHW: Tensor) -> InferenceBatch:
        """Classify normalised images: probabilities of shape (B,), and maps of log-odds of shape (B, 1, H, W)."""
        return predictions(self.activation(images_BCHW), images_BCHW)

    def get_extra_state(self) -> dict[str, Any]:
        """Keep in checkpoints which layers were learned from scratch: their batch norms are never frozen."""
        return {"fresh": self.fresh}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore which layers were learned from scratch; the weights are restored with it."""
        self.fresh, self.weights_ready = list(state["fresh"]), True


def predictions(activation_Bhw: Tensor, images_BCHW: Tensor) -> InferenceBatch:
    """Turn the cells' parts of the logit into a probability and a map of the images' size."""
    size = images_BCHW.shape[-2:]
    upsampled = F.interpolate(activation_Bhw.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
    return InferenceBatch(pred_score=torch.sigmoid(activation_Bhw.mean(dim=(1, 2))), anomaly_map=upsampled)


def _num_channels(backbone: str) -> int:
    """Return the number of channels of the last feature maps; a ValueError if there are none for images of any size."""
    shape: tuple[int, ...] = ()
    with suppress(RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError), torch.device("meta"):
        network: Any = timm.create_model(backbone, pretrained=False, **_UNPOOLED).eval()
        shape = network(torch.zeros(1, 3, _PROBE_SIDE, 2 * _PROBE_SIDE)).shape
    has_to_be = "a timm model whose output is feature maps for images of any size, such as resnet50"
    check("backbone", backbone, has_to_be, fits=len(shape) == 4 and shape[3] == 2 * shape[2])
    return shape[1]
