"""From patch scores to a heat map of the image's size.

Shape suffixes: B images, h x w patches, H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.models.pre_processor import resize_weights
from anomalib_exdd.utils.precision import Float32Buffers

_SIGNALS = 128  # blurred at a time
_PIL_PASSES = 3
_ONE = 1 << 24  # Pillow's fixed point
_DIGIT = 1 << 12


class SmoothMap(Float32Buffers):
    """Bilinear upsampling, then a Gaussian blur with ``sigma`` in pixels (paper, after equation 23).

    Both are linear and separable: one matrix for rows and one for columns are thirty times faster than a convolution of
    the upsampled map. Kernel and border (mirrored) are those of Anomalib's ``GaussianBlur2d``.
    """

    kernel: Tensor

    def __init__(self, sigma: float) -> None:
        super().__init__()
        reach = compute_kernel_size(sigma) // 2  # four standard deviations
        weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * sigma**2))
        # Not in the checkpoint, which may be used with another sigma.
        self.register_buffer("kernel", (weights / weights.sum()).float(), persistent=False)

    def forward(self, scores_B1hw: Tensor, image_size: Sequence[int]) -> Tensor:
        """Turn patch scores (B, 1, h, w) into a map (B, 1, H, W)."""
        reach = len(self.kernel) // 2
        matrices = []
        for size, target in zip(scores_B1hw.shape[-2:], image_size, strict=True):
            upsampling = resize_weights(size, target, self.kernel)
            padded = F.pad(upsampling.T.unsqueeze(1), (reach, reach), mode="reflect")
            # Few at a time: a convolution on a CPU holds its single channel sixteenfold.
            parts = (padded,) if torch.compiler.is_compiling() else padded.split(_SIGNALS)
            matrices.append(torch.cat([F.conv1d(part, self.kernel[None, None]) for part in parts]).squeeze(1).T)
        rows_Hh, columns_Ww = matrices
        return rows_Hh @ (scores_B1hw @ columns_Ww.T)


class PublishedMap(Float32Buffers):
    """The published code's heat map: an 8-bit Pillow image, blurred by Pillow, scaled back.

    Every map is divided by its maximum, truncated to 8 bits, blurred by ``ImageFilter.GaussianBlur(radius)`` and
    multiplied by the maximum again. Pillow's blur is three box blurs along the rows, then three along the columns, each
    rounded to 8 bits by fixed-point sums. The result here is Pillow's to the last bit, and can be exported.
    """

    kernel: Tensor

    def __init__(self, radius: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("kernel", pillow_box_kernel(radius), persistent=False)

    def forward(self, scores_B1hw: Tensor, image_size: Sequence[int]) -> Tensor:
        """Turn patch scores (B, 1, h, w) into a map (B, 1, H, W)."""
        upsampled = F.interpolate(scores_B1hw, size=tuple(image_size), mode="bilinear", align_corners=False)
        largest = upsampled.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        levels = torch.floor(upsampled / largest * 255)
        reach = self.kernel.shape[1] // 2
        for weight, padding in (
            (self.kernel[:, None, None, :], (reach, reach, 0, 0)),
            (self.kernel[:, None, :, None], (0, 0, reach, reach)),
        ):
            for _ in range(_PIL_PASSES):
                high, low = F.conv2d(F.pad(levels, padding, mode="replicate"), weight).split(1, dim=1)
                # (sum + half) >> 24, with the sum kept as high * 2^12 + low: every number stays below 2^24 and exact.
                levels = torch.floor((high + _DIGIT / 2 + torch.floor(low / _DIGIT)) / _DIGIT)
        return levels / 255 * largest


def pillow_box_kernel(radius: float) -> Tensor:
    """Build the box that Pillow convolves three times with to approximate a Gaussian.

    A box of fractional radius r has weight ``1 / (2 r + 1)`` inside and the fraction of it at both ends (Gwosdek et
    al., "Theoretical foundations of Gaussian convolution by extended box filtering", SSVM 2011). Pillow holds the
    weights as 24-bit fixed-point numbers: returned are their high and low 12 bits, float32, shape (2, 2 floor(r) + 3).
    """
    variance = radius * radius / _PIL_PASSES
    whole = int(((12 * variance + 1) ** 0.5 - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inside = int(np.float32(_ONE) / (np.float32(whole + fraction) * np.float32(2) + np.float32(1)))
    end = (_ONE - (2 * whole + 1) * inside) // 2
    weights = torch.tensor([end, *[inside] * (2 * whole + 1), end])
    return torch.stack([weights // _DIGIT, weights % _DIGIT]).float()
