"""Finds the patches of training images that may be among their highest, cheaply, for the calibration.

Shape suffixes: N patches, P patches of an image, D features, S dimensions of the projection, M bank entries.
"""

from typing import Any

import torch
from torch import Tensor

from anomalib_exdd.precision import full_float32
from anomalib_exdd.sampling import gaussian_projection

from .calibration_set import CalibrationImage, entries_of, high_patches
from .kinship import Kinship, Origins
from .memory_bank import MemoryBank
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel

_ROUGH_STAGES = ((512, 8), (4096, 2))
"""The rough ranking's stages: entries of each bank to compare with (greedy selection puts a coarse coreset first), and
how many times as many patches are kept as make an image's score."""


class RoughRanking:
    """Ranks the patches of images by their distances in the coreset's projection, to entries of other images.

    Args:
        model: Model with filled banks.
        settings: The arguments of :class:`anomalib_exdd.models.exdd.ExDD` as attributes.
    """

    def __init__(self, model: ExDDModel, settings: Any) -> None:
        self.top_fraction = settings.top_fraction
        dimension = model.negative_bank.features.shape[1]
        device = model.negative_bank.features.device
        self._projection = gaussian_projection(dimension, settings.projected_dimension, settings.seed).to(device)
        self._banks = [
            _RoughBank(self._project(bank.features[: _ROUGH_STAGES[-1][0]].float()), bank, model.positive_bank.origins)
            for bank in (model.negative_bank, model.positive_bank)
        ]

    def high(self, image: CalibrationImage) -> Tensor:
        """Choose the patches that may be among the image's highest; see :func:`.calibration_set.high_patches`.

        Returns:
            Rows of the image's patches, int64, on the CPU.
        """
        query_PS = self._project(image.features.to(self._projection.device))
        rows = torch.arange(len(query_PS), device=query_PS.device)
        wanted = top_count(len(query_PS), self.top_fraction)
        for entries, spare in _ROUGH_STAGES:
            negative, positive = (bank.log_distances(image.path, query_PS[rows], entries) for bank in self._banks)
            if negative is not None:  # else a single normal image: no distance can be measured without it
                rows = rows[high_patches(negative, positive, spare * wanted)]
        return rows.cpu()

    def _project(self, features_ND: Tensor) -> Tensor:
        with full_float32(features_ND.device):
            return features_ND @ self._projection if len(features_ND) else features_ND


class _RoughBank:
    """The first entries of a bank, projected; measured by expanded distances, without a second look at the winners."""

    def __init__(self, entries_MS: Tensor, bank: MemoryBank, origins: Origins) -> None:
        self.entries_MS = entries_MS
        self.source_M = bank.source[: len(entries_MS)]
        self.kinship = Kinship(bank.sources, origins)
        self.norm_M = entries_MS.square().sum(dim=-1)

    def log_distances(self, path: str, query_PS: Tensor, entries: int) -> Tensor | None:
        """Return every patch's log-distance to the first entries of other images; None if there are no such."""
        own_M = entries_of(self.kinship.rows(path), self.source_M[:entries])
        if bool(own_M.all()):
            return None
        norm_M = self.norm_M[:entries].masked_fill(own_M, torch.inf)
        with full_float32(query_PS.device):
            nearest_P = torch.addmm(norm_M, query_PS, self.entries_MS[:entries].T, alpha=-2).amin(dim=1)
            return (nearest_P + query_PS.square().sum(dim=1)).clamp_min(EPSILON).log() / 2
