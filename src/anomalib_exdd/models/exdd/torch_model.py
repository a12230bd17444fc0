"""ExDD as a plain torch module: features, two memory banks, scores.

Shape suffixes: B images, C channels, H x W pixels, h x w patches, P = h w patches of an image, D features.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn

from anomalib_exdd.neighbors import SearchBackend

from .anomaly_map import PublishedMap, SmoothMap
from .features import PatchFeatureExtractor
from .memory_bank import MemoryBank
from .scoring import PatchDistances, get_scoring

logger = logging.getLogger(__name__)

PAPER_SIGMA = 2.0
"""The paper's blur (after equation 23), for its own scoring."""
DEFAULT_SIGMA = 4.0
"""PatchCore's blur, for every other scoring."""


class ExDDModel(nn.Module):
    """Scores images by their patches' distances to a bank of normal and a bank of defective patches.

    Arguments are described by :class:`anomalib_exdd.models.exdd.ExDD`; here ``scoring`` and ``image_scoring`` are
    resolved names of rules.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        scoring: str = "ratio",
        image_scoring: str = "normal",
        num_neighbors: int = 3,
        sigma: float | None = None,
        search: SearchBackend = "auto",
    ) -> None:
        super().__init__()
        self.tiler: Tiler | None = None
        self.scoring = scoring
        self.image_scoring = image_scoring
        self.feature_extractor = PatchFeatureExtractor(
            backbone, layers, pre_trained=pre_trained, weights=weights, padded=scoring != "published"
        )
        self.negative_bank = MemoryBank(num_neighbors, search)
        self.positive_bank = MemoryBank(num_neighbors, search)
        self.anomaly_map: SmoothMap | PublishedMap
        if scoring == "published" and sigma is None:
            self.anomaly_map = PublishedMap()
        else:
            self.anomaly_map = SmoothMap(sigma or (PAPER_SIGMA if scoring == "paper" else DEFAULT_SIGMA))

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Extract patch features, tile by tile if a tiler is set.

        Args:
            images_BCHW: Normalised images, floating point, shape (B, C, H, W).

        Returns:
            Float32, shape (B, D, h, w).
        """
        if self.tiler is None:
            return self.feature_extractor(images_BCHW).float()
        return self.tiler.untile(self.feature_extractor(self.tiler.tile(images_BCHW))).float()

    def forward(self, images_BCHW: Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images_BCHW: Normalised images, floating point, shape (B, C, H, W).

        Returns:
            ``pred_score``, float32, shape (B,), and ``anomaly_map``, float32, shape (B, 1, H, W): the higher, the more
            defective.

        Raises:
            ValueError: If the negative bank is empty, because the model was neither trained nor loaded.
        """
        features_BDhw = self.embed(images_BCHW)
        batch, _, height, width = features_BDhw.shape
        patches_BPD = features_BDhw.flatten(2).transpose(1, 2).contiguous()
        with torch.autocast(device_type=images_BCHW.device.type, enabled=False):
            patch_scores, pred_score = self.score(patches_BPD)
            scores_B1hw = patch_scores.reshape(batch, 1, height, width)
            anomaly_map = self.anomaly_map(scores_B1hw, images_BCHW.shape[-2:])
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)

    def score(self, patches_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Score patches and images by the chosen rules; by ``normal`` while there is no positive bank.

        Args:
            patches_BPD: Patch features, float32, shape (B, P, D).

        Returns:
            Patch scores, shape (B, P), and image scores, shape (B,), float32.
        """
        has_positive = len(self.positive_bank) > 0
        patch_rule = get_scoring(self.scoring if has_positive else "normal")
        image_rule = get_scoring(self.image_scoring if has_positive else "normal")
        neighborhood = patch_rule.patch_neighborhood or image_rule.image_neighborhood
        negative = self.negative_bank.distances(patches_BPD, neighborhood=neighborhood)
        positive: PatchDistances | None = None
        if patch_rule.needs_positive or image_rule.needs_positive:
            neighborhood = any(rule.needs_positive and rule.image_neighborhood for rule in (patch_rule, image_rule))
            positive = self.positive_bank.distances(patches_BPD, neighborhood=neighborhood)
        return patch_rule.patch(negative, positive), image_rule.image(negative, positive)
