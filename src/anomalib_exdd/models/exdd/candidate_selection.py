"""Finds the patches of training images that may be among their highest, cheaply, for the calibration.

Missed ones would make good training images look better than new ones, and thresholds too low. Distances of short
vectors leave some patches, which those of whole vectors rank. Both are measured to all entries of a bank: to a part of
them even usual patches can be far.

Shape suffixes: N patches, P patches of an image, D features, S numbers of a short vector, M bank entries.
"""

import torch
from torch import Tensor

from anomalib_exdd.coreset import gaussian_projection
from anomalib_exdd.search.torch_index import TorchIndex
from anomalib_exdd.utils.precision import full_float32

from .boundary import Folds
from .calibration_set import entries_of
from .memory_bank import SharedSources
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel

_SHORT_SPARE, _SPARE = 16, 2  # times as many patches as make an image's score: kept by short vectors, and in the end


class CandidateSelection:
    """Ranks patches by distances to entries of other images, first in few dimensions, and by the boundary.

    Few dimensions are a random projection. ``folds`` are those of the images, if the networks of the boundary were
    trained on them.
    """

    def __init__(self, model: ExDDModel, projected_dimension: int, seed: int, folds: Folds | None = None) -> None:
        self._top_fraction, self._boundary, self._folds = model.calibration.top_fraction, model.boundary, folds
        vectors_MD = model.negative_bank.vectors
        self._centre_D = vectors_MD.mean(dim=0)
        self._matrix_DS = gaussian_projection(vectors_MD.shape[1], projected_dimension, seed).to(vectors_MD)
        banks = [bank for bank in (model.negative_bank, model.positive_bank) if len(bank)]
        self._short = [TorchIndex(self._shortened(bank.vectors)) for bank in banks]
        self._whole = [TorchIndex(bank.vectors) for bank in banks]
        self._sources = [(bank.source, SharedSources(bank.sources, model.positive_bank.origins)) for bank in banks]

    def candidates(self, path: str, features_PD: Tensor) -> Tensor:
        """Choose the patches of an image that are among the highest by one of three rankings; rows, on the CPU."""
        features_PD = features_PD.to(self._matrix_DS.device)
        wanted = top_count(len(features_PD), self._top_fraction)
        own = [entries_of(shared.rows(path), source_M) for source_M, shared in self._sources]
        rows = torch.arange(len(features_PD), device=features_PD.device)
        if not bool(own[0].all()):  # else this is the only normal image
            rows = self._highest(self._short, self._shortened(features_PD), own, _SHORT_SPARE * wanted)
            rows = rows[self._highest(self._whole, features_PD[rows], own, _SPARE * wanted)]
        if self._boundary.is_fitted:
            count = min(len(features_PD), _SPARE * wanted)
            if self._folds is None:
                log_odds_P = self._boundary(features_PD)
            else:
                log_odds_P = self._boundary.of_fold(features_PD, self._folds.of(path))
            rows = torch.cat([rows, log_odds_P.topk(count).indices]).unique()
        return rows.cpu()

    def _shortened(self, features_ND: Tensor) -> Tensor:
        """Project centred features at random, float32, shape (N, S)."""
        with full_float32(features_ND.device):
            return (features_ND - self._centre_D) @ self._matrix_DS

    @staticmethod
    def _highest(indices: list[TorchIndex], query_PD: Tensor, own: list[Tensor], count: int) -> Tensor:
        """Choose patches by their distances to the entries of each bank that are no own ones, if there are others."""
        log_distances = [
            index.approximate_distances(query_PD, own_M).clamp_min(EPSILON).log()
            for index, own_M in zip(indices, own, strict=True)
            if not bool(own_M.all())
        ]
        return highest_rows(log_distances[0], log_distances[1] if len(log_distances) > 1 else None, count)


def highest_rows(log_negative_P: Tensor, log_positive_P: Tensor | None, count: int) -> Tensor:
    """Choose the ``count`` patches farthest from normal, and as many with the highest log-ratio of distances."""
    count = min(len(log_negative_P), count)
    rows = [log_negative_P.topk(count).indices]
    if log_positive_P is not None:
        rows.append((log_negative_P - log_positive_P).topk(count).indices)
    return torch.cat(rows).unique()
