"""How far images are from normal ones by their usual patches: what changes with lamp, camera or product.

A defect changes few of an image's patches and hardly the mean over a sample of them. Distances of training images leave
out their own entries in the bank, as for the calibration.

Shape suffixes: B images, P patches of an image, I images.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .calibration_set import SAMPLED_PATCHES
from .patches import evenly_spaced
from .scoring import EPSILON
from .torch_model import ExDDModel


def normal_distance(nearest_BP: Tensor) -> Tensor:
    """Return the geometric mean of an evenly spaced sample of the patches' distances to normal ones, shape (B,)."""
    rows = evenly_spaced(nearest_BP.shape[1], SAMPLED_PATCHES).to(nearest_BP.device)
    return nearest_BP[:, rows].clamp_min(EPSILON).log().mean(dim=1).exp()


def training_distances(model: ExDDModel) -> NDArray[np.float64] | None:
    """Return the same of the normal training images that the checkpoint keeps patches of, out of fold, shape (I,).

    None if the model has one normal training image only: without its own entries, nothing is left.
    """
    measured = model.measure_training(0.0)
    if measured is None:
        return None
    rows = measured.sampled & ~measured.defective[measured.image]
    image = measured.image[rows]
    total, count = torch.bincount(image, measured.log_negative[rows, 0]), torch.bincount(image)
    found: NDArray[np.float64] = (total / count)[count > 0].exp().numpy()
    return found
