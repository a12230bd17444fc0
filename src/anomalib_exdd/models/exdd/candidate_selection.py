"""Finds the patches of training images that may be among their highest, cheaply, for the calibration.

Shape suffixes: N patches, P patches of an image, D features, S numbers of a short vector, M bank entries.
"""

import torch
from torch import Tensor

from anomalib_exdd.coreset import gaussian_projection, principal_axes
from anomalib_exdd.utils.distances import expanded_distances
from anomalib_exdd.utils.precision import full_float32

from .boundary import Folds
from .calibration_set import entries_of
from .memory_bank import SharedSources
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel

_STAGES = ((512, 24), (4096, 2))
"""Entries of each bank to compare with (greedy selection puts a coarse coreset first), and how many times as many
patches are kept as make an image's score."""
_LARGEST_REST = 0.2  # share of the variance that short vectors keep as one number only


class CandidateSelection:
    """Ranks the patches of images by distances in few dimensions to entries of other images, and by the boundary.

    Dimensions are principal axes or, where features vary in all directions alike, a random projection. ``folds`` are
    those of the images, if the networks of the boundary were trained on them.
    """

    def __init__(self, model: ExDDModel, projected_dimension: int, seed: int, folds: Folds | None = None) -> None:
        self._top_fraction, self._boundary, self._folds = model.calibration.top_fraction, model.boundary, folds
        vectors_MD = model.negative_bank.vectors
        self._centre_D = vectors_MD.mean(dim=0)
        axes_DS = principal_axes(vectors_MD - self._centre_D, _LARGEST_REST)
        self._keeps_rest = axes_DS is not None
        if axes_DS is None:
            axes_DS = gaussian_projection(vectors_MD.shape[1], projected_dimension, seed)
        self._axes_DS = axes_DS.to(vectors_MD)
        self._banks = []
        for bank in (model.negative_bank, model.positive_bank):
            entries_MS = self._short(bank.features[: _STAGES[-1][0]].float())
            shared = SharedSources(bank.sources, model.positive_bank.origins)
            self._banks.append((entries_MS, entries_MS.square().sum(dim=-1), bank.source[: len(entries_MS)], shared))

    def candidates(self, path: str, features_PD: Tensor) -> Tensor:
        """Choose the patches of an image that are among the highest by one of three rankings; rows, on the CPU."""
        features_PD = features_PD.to(self._axes_DS.device)
        query_PS = self._short(features_PD)
        rows = torch.arange(len(query_PS), device=query_PS.device)
        wanted = top_count(len(query_PS), self._top_fraction)
        for entries, spare in _STAGES:
            negative, positive = self._log_distances(path, query_PS[rows], entries)
            if negative is not None:  # else a single normal image: no distance can be measured without it
                rows = rows[highest_rows(negative, positive, spare * wanted)]
        if self._boundary.is_fitted:
            count = min(len(features_PD), _STAGES[-1][1] * wanted)
            if self._folds is None:
                log_odds_P = self._boundary(features_PD)
            else:
                log_odds_P = self._boundary.of_fold(features_PD, self._folds.of(path))
            rows = torch.cat([rows, log_odds_P.topk(count).indices]).unique()
        return rows.cpu()

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

    def _log_distances(self, path: str, query_PS: Tensor, entries: int) -> list[Tensor | None]:
        """Return every patch's log-distance to the first entries of each bank that are of other images, if any are."""
        found: list[Tensor | None] = []
        for entries_MS, norm_M, source_M, shared in self._banks:
            own_M = entries_of(shared.rows(path), source_M[:entries])
            if bool(own_M.all()):
                found.append(None)
                continue
            with full_float32(query_PS.device):
                norms = norm_M[:entries].masked_fill(own_M, torch.inf)
                nearest_P = expanded_distances(query_PS, entries_MS[:entries], norms).amin(dim=1)
                found.append((nearest_P + query_PS.square().sum(dim=1)).clamp_min(EPSILON).log() / 2)
        return found


def highest_rows(log_negative_P: Tensor, log_positive_P: Tensor | None, count: int) -> Tensor:
    """Choose the ``count`` patches farthest from normal, and as many with the highest log-ratio of distances."""
    count = min(len(log_negative_P), count)
    rows = [log_negative_P.topk(count).indices]
    if log_positive_P is not None:
        rows.append((log_negative_P - log_positive_P).topk(count).indices)
    return torch.cat(rows).unique()
