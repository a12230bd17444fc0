"""A fixed bank of filters in place of a network, for use without any weights."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.utils.precision import Float32Buffers

STRIDE = 8
_SCALES = (1.0, 2.0, 4.0)  # standard deviations in pixels
_ORIENTATIONS = 4
_FLOOR = 0.02  # of the logarithm: responses below it are noise
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pre-processor's normalisation


class FilterBank(Float32Buffers):
    """Local energies of oriented filters and blobs on brightness, relative to the rest of the image.

    Pairs of Gabor filters in quadrature at 4 orientations and differences of Gaussians, at 3 scales; the magnitude of
    their responses is averaged and maximised over cells of 8 x 8 pixels, and its logarithm standardised within the
    image, because good parts differ more in brightness and roughness than good and bad spots on one part do.
    ``benchmarks/quickstart_backbone.py`` compares it with networks.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for index, scale in enumerate(_SCALES):
            self.register_buffer(f"filters_{index}", _filters(scale))
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the one feature map, shape (B, D, H // 8, W // 8), under the name ``"filter_bank"``."""
        brightness = (images_BCHW.float() * self.std + self.mean).mean(dim=1, keepdim=True)
        cells = [F.avg_pool2d(brightness, STRIDE), F.max_pool2d(brightness, STRIDE)]
        for index in range(len(_SCALES)):
            filters: Tensor = getattr(self, f"filters_{index}")
            reach = filters.shape[-1] // 2
            response = F.conv2d(F.pad(brightness, (reach,) * 4, mode="reflect"), filters)
            pairs, blob = response[:, :-1].unflatten(1, (_ORIENTATIONS, 2)), response[:, -1:]
            energy = torch.cat([(pairs.square().sum(dim=2) + 1e-8).sqrt(), F.relu(blob), F.relu(-blob)], dim=1)
            cells += [F.avg_pool2d(energy, STRIDE), F.max_pool2d(energy, STRIDE) / 2]
        logarithm = torch.log(torch.cat(cells, dim=1).abs() + _FLOOR)
        deviation, mean = torch.std_mean(logarithm, dim=(2, 3), keepdim=True)
        return {"filter_bank": (logarithm - mean) / (deviation + 1e-3)}


def _filters(scale: float) -> Tensor:
    """Build the filters of one scale, each of zero mean and unit absolute sum, shape (2 orientations + 1, 1, k, k)."""
    reach = math.ceil(3 * scale)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(float)
    filters = []
    for orientation in range(_ORIENTATIONS):
        angle = math.pi * orientation / _ORIENTATIONS
        across, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        envelope = np.exp(-(across**2 + (along / 2) ** 2) / (2 * scale**2))
        filters += [envelope * np.cos(math.pi / 2 / scale * across + phase) for phase in (0, math.pi / 2)]
    narrow, wide = (np.exp(-(x**2 + y**2) / (2 * (factor * scale) ** 2)) for factor in (1.0, 1.6))
    filters.append(narrow / narrow.sum() - wide / wide.sum())
    stacked = np.stack([f - f.mean() for f in filters])
    stacked /= np.abs(stacked).sum(axis=(1, 2), keepdims=True)
    return torch.from_numpy(stacked.astype(np.float32)).unsqueeze(1)
