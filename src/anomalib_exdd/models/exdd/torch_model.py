"""ExDD as a plain torch module: features, two memory banks, scores.

Shape suffixes: B images, C channels, H x W pixels, h x w patches, P = h w patches of an image, D features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.search import SearchBackend

from .anomaly_map import PublishedMap, SmoothMap
from .boundary import Folds, LearntBoundary, boundary_data
from .calibration import Calibration, ImagePatches
from .calibration_set import CalibrationSet
from .decisions import Thresholds
from .features import PatchFeatureExtractor
from .memory_bank import BankPrecision, MemoryBank
from .scoring import PatchDistances, ScoringRule, get_scoring
from .tiling import Tiling, mapped

A = TypeVar("A")
B = TypeVar("B")

PAPER_SIGMA = 2.0  # the paper's blur (after equation 23), for its own scoring
DEFAULT_SIGMA = 4.0  # PatchCore's blur, for every other scoring
REFINED_SIGMA = 2.0  # of a refined map, whose cells are half as large
REFINED_FLOOR = 0.3  # share of its probability that a cell keeps at least, where it looks like no inside of a defect
_CPU_IMAGES = 4  # that a processor works on at a time
_REFINEMENTS = 2  # networks that refine the map, averaged


class PatchScores(NamedTuple):
    """Scores of patches and images, and the distances that they come from."""

    patches: Tensor  # by the rule of the map, float32, shape (B, P)
    images: Tensor  # float32, shape (B,)
    deciding: Tensor  # of patches by the rule of the images, float32, shape (B, P): the highest make an image's score
    negative: PatchDistances
    positive: PatchDistances | None  # None where no rule needs them


class Measured(NamedTuple):
    """What patches are scored by; None where no rule needs it."""

    negative: PatchDistances
    positive: PatchDistances | None
    boundary: Tensor | None  # log-odds of the learnt boundary, float32, shape (B, P)


class ScoredImages(NamedTuple):
    """Scores of images and their patches, the anomaly map, float32, shape (B, 1, H, W), and rows h and columns w."""

    scores: PatchScores
    anomaly_map: Tensor
    grid: tuple[int, int]


class ExDDModel(nn.Module):
    """Scores images by their patches' distances to a bank of normal and a bank of defective patches.

    Arguments are those of :class:`anomalib_exdd.models.exdd.ExDD`.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        scoring: str = "calibrated",
        image_scoring: str = "auto",
        num_neighbors: int = 3,
        sigma: float | None = None,
        search: SearchBackend = "auto",
        bank_precision: BankPrecision = "float32",
        top_fraction: float = 0.01,
        tile_size: int | None = None,
        tile_overlap: int = 256,
    ) -> None:
        super().__init__()
        if image_scoring == "auto":  # for "ratio" the best one in benchmarks/results/scorings_magnetic_tile.md
            image_scoring = "normal" if scoring == "ratio" else scoring
        self.scoring = scoring
        self.image_scoring = image_scoring
        self.feature_extractor = PatchFeatureExtractor(
            backbone, layers, pre_trained=pre_trained, weights=weights, padded=scoring != "published"
        )
        self.tiling = None if tile_size is None else Tiling(self.feature_extractor, tile_size, tile_overlap)
        if {scoring, image_scoring} == {"calibrated"}:
            num_neighbors = 1  # it does not look at neighbourhoods, which take long to find in large banks
        self.negative_bank = MemoryBank(num_neighbors, search, bank_precision)
        self.positive_bank = MemoryBank(num_neighbors, search, bank_precision)
        self.boundary = LearntBoundary()
        self.refinement = LearntBoundary()
        self.calibration_set = CalibrationSet()
        self.calibration = Calibration(top_fraction)
        self.anomaly_map: SmoothMap | PublishedMap
        if scoring == "published" and sigma is None:
            self.anomaly_map = PublishedMap()
        else:
            self.anomaly_map = SmoothMap(sigma or (PAPER_SIGMA if scoring == "paper" else DEFAULT_SIGMA))
        self.refined_map = SmoothMap(sigma or REFINED_SIGMA)

    @property
    def tiler(self) -> None:
        """What Anomalib's ``TilerConfigurationCallback`` sets, whose tiles would not be in the checkpoint."""
        return

    @tiler.setter
    def tiler(self, tiler: Tiler) -> None:
        given = f"`--model.tile_size {tiler.tile_size_h} --model.tile_overlap {tiler.tile_size_h - tiler.stride_h}`"
        msg = f"ExDD does not work with Anomalib's `TilerConfigurationCallback`. Remove it, and give the model {given}."
        raise ValueError(msg)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Extract patch features; see :meth:`extract`."""
        return self.extract(images_BCHW)[0]

    def extract(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Extract patch features, float32, shape (B, D, h, w), and the fine ones that refine the map.

        Fine features are float32, shape (B, F, 2 h, 2 w), or None with a backbone that has none.
        """
        features_BhwD, fine_BhwF = self._by_tiles(
            images_BCHW, lambda features, fine: (_rows(features), None if fine is None else _rows(fine))
        )
        return features_BhwD.permute(0, 3, 1, 2), None if fine_BhwF is None else fine_BhwF.permute(0, 3, 1, 2)

    def _by_tiles(self, images_BCHW: Tensor, work: Callable[[Tensor, Tensor | None], tuple[A, B]]) -> tuple[A, B]:
        extract = self.feature_extractor.extract
        if self.tiling is not None:
            return self.tiling.apply(extract, images_BCHW, work)
        if images_BCHW.device.type != "cpu" or torch.compiler.is_compiling():
            return work(*extract(images_BCHW))
        # What is held for a few images stays near a processor's cache, and memory is bounded.
        coarse, fine = zip(*(work(*extract(images)) for images in images_BCHW.split(_CPU_IMAGES)), strict=True)
        return tuple(mapped(lambda *parts: torch.cat(parts), *found) for found in (coarse, fine))

    def forward(self, images_BCHW: Tensor) -> InferenceBatch:
        """Score normalised images, floating point, shape (B, C, H, W): the higher, the more defective.

        Returns:
            ``pred_score``, float32, shape (B,), and ``anomaly_map``, float32, shape (B, 1, H, W).

        Raises:
            ValueError: If the model was neither trained nor loaded.
        """
        scored = self.score_images(images_BCHW)
        return InferenceBatch(pred_score=scored.scores.images, anomaly_map=scored.anomaly_map)

    def score_images(self, images_BCHW: Tensor) -> ScoredImages:
        """Score images as :meth:`forward` does, and return what :mod:`.explanation` needs as well."""
        measured, inside = self._by_tiles(images_BCHW, self._measure_maps)
        batch, height, width = measured.negative.nearest.shape
        with torch.autocast(device_type=images_BCHW.device.type, enabled=False):
            scores = self._scores(mapped(lambda values: values.flatten(1, 2), measured))
            scores_Bhw = scores.patches.reshape(batch, height, width)
            anomaly_map = self.draw_map(scores_Bhw, images_BCHW.shape[-2:], inside)
        return ScoredImages(scores, anomaly_map, (height, width))

    def _measure_maps(self, features_BDhw: Tensor, fine_BFhw: Tensor | None) -> tuple[Measured, Tensor | None]:
        with torch.autocast(device_type=features_BDhw.device.type, enabled=False):
            return self._measure(_rows(features_BDhw).contiguous()), self.inside(fine_BFhw)

    def score(self, patches_BPD: Tensor) -> PatchScores:
        """Score patches, float32, and images by the rules of :meth:`rules`."""
        return self._scores(self._measure(patches_BPD))

    def _measure(self, patches_BPD: Tensor) -> Measured:
        """Measure what the rules need, searching each bank once."""
        patch_rule, image_rule = rules = self.rules()
        ranked = max(rule.num_ranked for rule in rules)
        around = patch_rule.patch_neighborhood or image_rule.image_neighborhood
        negative = self.negative_bank.distances(patches_BPD, neighborhood=around, num_ranked=ranked)
        positive = None
        if len(self.positive_bank) and any(rule.needs_positive for rule in rules):
            around = any(rule.needs_positive and rule.image_neighborhood for rule in rules)
            positive = self.positive_bank.distances(patches_BPD, neighborhood=around, num_ranked=ranked)
        uses_boundary = self.boundary.is_fitted and "calibrated" in {self.scoring, self.image_scoring}
        return Measured(negative, positive, self.boundary(patches_BPD) if uses_boundary else None)

    def _scores(self, measured: Measured) -> PatchScores:
        negative, positive, boundary_BP = measured
        patch_rule, image_rule = self.rules(boundary_BP)
        patches = patch_rule.patch(negative, positive)
        deciding = patches if self.scoring == self.image_scoring else image_rule.patch(negative, positive)
        return PatchScores(patches, image_rule.image(negative, positive), deciding, negative, positive)

    def inside(self, fine_BFhw: Tensor | None) -> Tensor | None:
        """Return the probability that a cell of the fine grid lies inside a defect, not beside it, (B, 2 h, 2 w).

        None where the map does not follow the outline of defects, because none was learnt or the scoring has no use.
        """
        if fine_BFhw is None or self.scoring != "calibrated" or not self.refinement.is_fitted:
            return None
        return torch.sigmoid(self.refinement(_rows(fine_BFhw)))

    def draw_map(self, scores_Bhw: Tensor, image_size: Sequence[int], inside_Bhw: Tensor | None = None) -> Tensor:
        """Turn patch scores into maps of the images' size (height, width), float32, shape (B, 1, H, W).

        With what :meth:`inside` returns, the calibrated map follows the outline of defects.
        """
        rule = self.rules()[0]
        values_B1hw = rule.map_values(scores_Bhw).unsqueeze(1)
        if inside_Bhw is None:
            return rule.smoothed_values(self.anomaly_map(values_B1hw, image_size))
        inside_B1hw = inside_Bhw.unsqueeze(1)
        values_B1hw = F.interpolate(values_B1hw, size=inside_B1hw.shape[-2:], mode="bilinear")
        values_B1hw = values_B1hw * (REFINED_FLOOR + (1 - REFINED_FLOOR) * inside_B1hw)
        return rule.smoothed_values(self.refined_map(values_B1hw, image_size))

    def rules(self, boundary_BP: Tensor | None = None) -> tuple[ScoringRule, ScoringRule]:
        """Return the rules of patches and of images: without a positive bank "normal" or "calibrated".

        The learnt boundary's log-odds are those of the patches to score, if there is one.
        """
        coefficients = self.calibration.coefficients
        patch, image = (
            name if name == "calibrated" or len(self.positive_bank) else "normal"
            for name in (self.scoring, self.image_scoring)
        )
        return get_scoring(patch, coefficients, boundary_BP), get_scoring(image, coefficients, boundary_BP)

    def folds(self, synthetic_weight: float) -> Folds:
        """Assign the training images to the networks of the boundary."""
        bank = self.positive_bank
        return Folds(self.negative_bank.sources, bank.sources, bank.origins, synthetic_count=synthetic_weight == 1)

    def learn_boundary(self, synthetic_weight: float = 0.0, seed: int = 0) -> None:
        """Learn the boundary from both banks and the samples of the calibration set, if there are two defects.

        A synthetic image counts ``synthetic_weight`` beside a real one, 0 to 1.
        """
        self.boundary.clear()
        self.refinement.clear()
        folds = self.folds(synthetic_weight)
        if folds.count < 2:
            return
        parts = []
        for bank, defective in ((self.negative_bank, False), (self.positive_bank, True)):
            parts.append((bank.vectors, [bank.sources[source] for source in bank.source.tolist()], defective))
            parts.append((*self.calibration_set.sample_of(defective=defective), defective))
        weights = dict.fromkeys(self.positive_bank.origins, synthetic_weight)
        data = boundary_data([part for part in parts if part[1]], folds, weights)
        if data.is_complete:
            self.boundary.fit(data, seed)
        # A share of what tells defects from their surroundings on the fine grid; no fold is held out, because the map's
        # cells are not compared with those of the training images.
        outline = self.calibration_set.outline_data(weights, _REFINEMENTS)
        if outline.is_complete:
            self.refinement.fit(outline, seed)

    def calibrate(self, defect_rate: float, unknown_rate: float, synthetic_weight: float = 0.0) -> Thresholds | None:
        """Fit the calibrated score to the calibration set, the banks and the boundary; see :meth:`.Calibration.fit`.

        Returns:
            What Anomalib's post-processor needs; None if there are too few normal images.
        """
        patches = self.measure_training(synthetic_weight)
        if patches is None:
            self.calibration.clear()
            return None
        return self.calibration.fit(patches, defect_rate, unknown_rate, synthetic_weight)

    def measure_training(self, synthetic_weight: float) -> ImagePatches | None:
        """Measure the training patches out of fold; see :meth:`.CalibrationSet.measure`."""
        folds = self.folds(synthetic_weight)
        return self.calibration_set.measure(self.negative_bank, self.positive_bank, self.boundary, folds)


def _rows(features_BDhw: Tensor) -> Tensor:
    """View a feature map as rows of features, float32, shape (B, h, w, D)."""
    return features_BDhw.float().permute(0, 2, 3, 1)
