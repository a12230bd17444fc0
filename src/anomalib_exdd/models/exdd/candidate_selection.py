"""Finds the patches of training images that may be among their highest, cheaply, for the calibration.

Shape suffixes: N patches, P patches of an image, D features, S numbers of a short vector, M bank entries.
"""

from typing import Any

import torch
from torch import Tensor

from anomalib_exdd.coreset import gaussian_projection
from anomalib_exdd.search.pca import principal_axes
from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.precision import full_float32

from .boundary import Folds
from .calibration_set import CalibrationImage, entries_of, high_patches
from .memory_bank import MemoryBank, Origins, SharedSources
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel

_STAGES = ((512, 24), (4096, 2))
"""Entries of each bank to compare with (greedy selection puts a coarse coreset first), and how many times as many
patches are kept as make an image's score."""
_LARGEST_REST = 0.2  # share of the variance that short vectors keep as one number only


class CandidateSelection:
    """Ranks the patches of images by distances in few dimensions, to entries of other images, and by the boundary.

    Args:
        model: Model with filled banks and, where there are defects enough, a learnt boundary.
        settings: The arguments of :class:`anomalib_exdd.models.exdd.ExDD` as attributes.
        folds: Which network of the boundary has not seen which image; None: none of them has seen the images.
    """

    def __init__(self, model: ExDDModel, settings: Any, folds: Folds | None = None) -> None:
        self.top_fraction = settings.top_fraction
        self._boundary, self._folds = model.boundary, folds
        vectors_MD = model.negative_bank.vectors
        self._centre_D = vectors_MD.mean(dim=0)
        axes_DS = principal_axes(vectors_MD - self._centre_D, _LARGEST_REST)
        self._keeps_rest = axes_DS is not None
        if axes_DS is None:  # features that vary in all directions alike
            axes_DS = gaussian_projection(vectors_MD.shape[1], settings.projected_dimension, settings.seed)
        self._axes_DS = axes_DS.to(vectors_MD)
        self._banks = [
            _RoughBank(self._short(bank.features[: _STAGES[-1][0]].float()), bank, model.positive_bank.origins)
            for bank in (model.negative_bank, model.positive_bank)
        ]

    def high(self, image: CalibrationImage) -> Tensor:
        """Choose the patches that may be among the image's highest: those that are by one of three rankings.

        Returns:
            Rows of the image's patches, ascending, int64, on the CPU.
        """
        features_PD = image.features.to(self._axes_DS.device)
        query_PS = self._short(features_PD)
        rows = torch.arange(len(query_PS), device=query_PS.device)
        wanted = top_count(len(query_PS), self.top_fraction)
        for entries, spare in _STAGES:
            negative, positive = (bank.log_distances(image.path, query_PS[rows], entries) for bank in self._banks)
            if negative is not None:  # else a single normal image: no distance can be measured without it
                rows = rows[high_patches(negative, positive, spare * wanted)]
        if self._boundary.is_fitted:
            count = min(len(features_PD), _STAGES[-1][1] * wanted)
            rows = torch.cat([rows, self._log_odds(image.path, features_PD).topk(count).indices]).unique()
        return rows.cpu()

    def _log_odds(self, path: str, features_PD: Tensor) -> Tensor:
        if self._folds is None:
            return self._boundary(features_PD)
        return self._boundary.of_fold(features_PD, self._folds.of(path))

    def _short(self, features_ND: Tensor) -> Tensor:
        """Return the coordinates on the axes, and the norm of what is left, float32, shape (N, S)."""
        if len(features_ND) == 0:
            return features_ND
        with full_float32(features_ND.device):
            centred_ND = features_ND - self._centre_D
            head_NS = centred_ND @ self._axes_DS
            if not self._keeps_rest:
                return head_NS
            squared_N1, head_squared_N1 = (part.square().sum(dim=1, keepdim=True) for part in (centred_ND, head_NS))
            return torch.cat([head_NS, (squared_N1 - head_squared_N1).clamp_min(0).sqrt()], dim=1)


class _RoughBank:
    """The first entries of a bank, shortened; measured by expanded distances, without a second look at the winners."""

    def __init__(self, entries_MS: Tensor, bank: MemoryBank, origins: Origins) -> None:
        self.entries_MS = entries_MS
        self.source_M = bank.source[: len(entries_MS)]
        self.shared = SharedSources(bank.sources, origins)
        self.norm_M = entries_MS.square().sum(dim=-1)

    def log_distances(self, path: str, query_PS: Tensor, entries: int) -> Tensor | None:
        """Return every patch's log-distance to the first entries of other images; None if there are no such."""
        own_M = entries_of(self.shared.rows(path), self.source_M[:entries])
        if bool(own_M.all()):
            return None
        norm_M = self.norm_M[:entries].masked_fill(own_M, torch.inf)
        with full_float32(query_PS.device):
            nearest_P = expanded_distances(query_PS, self.entries_MS[:entries], norm_M).amin(dim=1)
            return (nearest_P + query_PS.square().sum(dim=1)).clamp_min(EPSILON).log() / 2
