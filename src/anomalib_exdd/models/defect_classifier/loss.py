"""The loss of image labels, with the rare class weighted up.

Shape suffix: B images.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

PositiveWeight = float | Literal["balanced"]


class LabelLoss(nn.Module):
    """Weighted binary cross-entropy of images' logits; all images count 1 until ``weights`` are set."""

    weights = (1.0, 1.0)  # of a normal and of a defective image

    def forward(self, logits_B: Tensor, labels_B: Tensor) -> Tensor:
        """Return the mean of the images' weighted losses, float32."""
        labels = labels_B.bool()
        losses = F.binary_cross_entropy_with_logits(logits_B.float(), labels.float(), reduction="none")
        return (losses * torch.where(labels, self.weights[1], self.weights[0])).mean()


def label_weights(normal: int, defective: int, pos_weight: PositiveWeight) -> tuple[float, float]:
    """Return the weights of a normal and of a defective image, whose mean over so many training images is 1.

    "balanced" is scikit-learn's rule of that name, ``n / (2 n_class)``: both kinds count the same together.

    Example:
        >>> label_weights(30, 10, "balanced"), label_weights(30, 10, 1.0)
        ((0.6666666666666666, 2.0), (1.0, 1.0))
    """
    if normal == 0 or defective == 0:
        kind = "defective" if defective == 0 else "normal"
        msg = f"The training images have no {kind} one. Add some; defects may be made by `anomalib synthesize`."
        raise ValueError(msg)
    ratio = normal / defective if pos_weight == "balanced" else float(pos_weight)
    scale = (normal + defective) / (normal + ratio * defective)
    return scale, ratio * scale
