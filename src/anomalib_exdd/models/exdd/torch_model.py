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
from .calibration import Calibration
from .calibration_set import CalibrationSet
from .features import PatchFeatureExtractor
from .memory_bank import BankPrecision, MemoryBank
from .scoring import PatchDistances, ScoringRule, get_scoring

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
        scoring: str = "calibrated",
        image_scoring: str = "calibrated",
        num_neighbors: int = 3,
        sigma: float | None = None,
        search: SearchBackend = "auto",
        bank_precision: BankPrecision = "float32",
        top_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        self.tiler: Tiler | None = None
        self.scoring = scoring
        self.image_scoring = image_scoring
        self.feature_extractor = PatchFeatureExtractor(
            backbone, layers, pre_trained=pre_trained, weights=weights, padded=scoring != "published"
        )
        if {scoring, image_scoring} == {"calibrated"}:
            num_neighbors = 1  # it does not look at neighbourhoods, which take long to find in large banks
        self.negative_bank = MemoryBank(num_neighbors, search, bank_precision)
        self.positive_bank = MemoryBank(num_neighbors, search, bank_precision)
        self.calibration_set = CalibrationSet()
        self.calibration = Calibration(top_fraction)
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
            scores_Bhw = patch_scores.reshape(batch, height, width)
            anomaly_map = self.draw_map(scores_Bhw, images_BCHW.shape[-2:])
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)

    def score(self, patches_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Score patches and images by the chosen rules; see :meth:`rules` for those of a model without defects.

        Args:
            patches_BPD: Patch features, float32, shape (B, P, D).

        Returns:
            Patch scores, shape (B, P), and image scores, shape (B,), float32.
        """
        negative, positive = self.distances(patches_BPD)
        patch_rule, image_rule = self.rules()
        return patch_rule.patch(negative, positive), image_rule.image(negative, positive)

    def draw_map(self, scores_Bhw: Tensor, image_size: Sequence[int]) -> Tensor:
        """Turn patch scores into maps of the images' size, float32, shape (B, 1, H, W)."""
        rule = self.rules()[0]
        return rule.smoothed_values(self.anomaly_map(rule.map_values(scores_Bhw).unsqueeze(1), image_size))

    def rules(self) -> tuple[ScoringRule, ScoringRule]:
        """Return the rules of patches and of images: without a positive bank ``normal`` or ``calibrated``."""
        coefficients = self.calibration.coefficients
        names = (self.scoring, self.image_scoring)
        if len(self.positive_bank) == 0:
            names = tuple(name if name == "calibrated" else "normal" for name in names)  # type: ignore[assignment]
        return get_scoring(names[0], coefficients), get_scoring(names[1], coefficients)

    def distances(self, patches_BPD: Tensor) -> tuple[PatchDistances, PatchDistances | None]:
        """Measure the distances that the rules need, searching each bank once."""
        rules = self.rules()
        ranked = max(rule.num_ranked for rule in rules)
        patch_rule, image_rule = rules
        around = patch_rule.patch_neighborhood or image_rule.image_neighborhood
        negative = self.negative_bank.distances(patches_BPD, neighborhood=around, num_ranked=ranked)
        if len(self.positive_bank) == 0 or not any(rule.needs_positive for rule in rules):
            return negative, None
        around = any(rule.needs_positive and rule.image_neighborhood for rule in rules)
        return negative, self.positive_bank.distances(patches_BPD, neighborhood=around, num_ranked=ranked)

    def calibrate(self, defect_rate: float, synthetic_weight: float = 0.0) -> bool:
        """Fit the calibrated score to the calibration set and the banks as they are.

        Args:
            defect_rate: Share of defective images among those to come, in (0, 1).
            synthetic_weight: How much a synthetic image counts beside a real one, 0 to 1.

        Returns:
            Whether it could be fitted: that takes normal images besides the one whose patches are measured.
        """
        patches = self.calibration_set.measure(self.negative_bank, self.positive_bank)
        if patches is None:
            return False
        self.calibration.fit(patches, defect_rate, synthetic_weight)
        return True
