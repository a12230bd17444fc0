"""Finds the patches of training images that may be among their highest, cheaply, for the calibration.

Missed ones would make good training images look better than new ones, and thresholds too low: what short vectors leave
is ranked by exact distances to the whole banks.

Shape suffixes: N patches, P patches of an image, D features, S numbers of a short vector, M bank entries.
"""

import torch
from torch import Tensor

from anomalib_exdd.coreset import gaussian_projection
from anomalib_exdd.search.torch_index import TorchIndex
from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.precision import full_float32

from .boundary import Folds
from .calibration_set import entries_of
from .memory_bank import SharedSources
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel

_COARSE_ENTRIES = 4096  # of each bank, to compare short vectors with; greedy selection puts a coarse coreset first
_COARSE_SPARE, _SPARE = 16, 2  # times as many patches as make an image's score: kept by short vectors, and in the end


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
        self._banks = [
            (
                self._short(bank.features[:_COARSE_ENTRIES].float()),
                TorchIndex(bank.vectors) if len(bank) else None,
                bank.source,
                SharedSources(bank.sources, model.positive_bank.origins),
            )
            for bank in (model.negative_bank, model.positive_bank)
        ]

    def candidates(self, path: str, features_PD: Tensor) -> Tensor:
        """Choose the patches of an image that are among the highest by one of three rankings; rows, on the CPU."""
        features_PD = features_PD.to(self._matrix_DS.device)
        wanted = top_count(len(features_PD), self._top_fraction)
        rows = torch.arange(len(features_PD), device=features_PD.device)
        negative_P, positive_P = self._coarse_distances(path, self._short(features_PD))
        if negative_P is not None:  # else its first entries are all of this image
            rows = highest_rows(negative_P, positive_P, _COARSE_SPARE * wanted)
        negative_P, positive_P = self._distances(path, features_PD[rows])
        if negative_P is not None:  # else this is the only normal image
            rows = rows[highest_rows(negative_P, positive_P, _SPARE * wanted)]
        if self._boundary.is_fitted:
            count = min(len(features_PD), _SPARE * wanted)
            if self._folds is None:
                log_odds_P = self._boundary(features_PD)
            else:
                log_odds_P = self._boundary.of_fold(features_PD, self._folds.of(path))
            rows = torch.cat([rows, log_odds_P.topk(count).indices]).unique()
        return rows.cpu()

    def _short(self, features_ND: Tensor) -> Tensor:
        """Project centred features at random, float32, shape (N, S)."""
        if len(features_ND) == 0:
            return features_ND
        with full_float32(features_ND.device):
            return (features_ND - self._centre_D) @ self._matrix_DS

    def _coarse_distances(self, path: str, query_PS: Tensor) -> list[Tensor | None]:
        """Return short vectors' log-distances to the first entries of each bank, those of other images, if any are."""
        found: list[Tensor | None] = []
        for entries_MS, _, source_M, shared in self._banks:
            own_M = entries_of(shared.rows(path), source_M[: len(entries_MS)])
            if bool(own_M.all()):
                found.append(None)
                continue
            with full_float32(query_PS.device):
                norms = entries_MS.square().sum(dim=-1).masked_fill(own_M, torch.inf)
                nearest_P = expanded_distances(query_PS, entries_MS, norms).amin(dim=1)
                found.append((nearest_P + query_PS.square().sum(dim=1)).clamp_min(EPSILON).log() / 2)
        return found

    def _distances(self, path: str, query_QD: Tensor) -> list[Tensor | None]:
        """Return log-distances to the nearest entry of each bank that is of another image, if any is."""
        found: list[Tensor | None] = []
        for _, index, source_M, shared in self._banks:
            own_M = entries_of(shared.rows(path), source_M)
            if index is None or bool(own_M.all()):
                found.append(None)
            else:
                nearest = index.search(query_QD, 1, own_M.expand(len(query_QD), -1))
                found.append(nearest.distances[:, 0].clamp_min(EPSILON).log())
        return found


def highest_rows(log_negative_P: Tensor, log_positive_P: Tensor | None, count: int) -> Tensor:
    """Choose the ``count`` patches farthest from normal, and as many with the highest log-ratio of distances."""
    count = min(len(log_negative_P), count)
    rows = [log_negative_P.topk(count).indices]
    if log_positive_P is not None:
        rows.append((log_negative_P - log_positive_P).topk(count).indices)
    return torch.cat(rows).unique()
