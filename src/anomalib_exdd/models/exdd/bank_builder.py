"""Builds the banks and the calibration set from training images that stream by.

The way of the data: image -> patch features -> normal and defect patches -> projection -> coreset -> bank. What the
calibration needs is kept beside it.
"""

import logging
from typing import Any

import torch
from anomalib.data import ImageBatch
from torch import Tensor
from tqdm import tqdm

from anomalib_exdd.precision import full_float32
from anomalib_exdd.sampling import gaussian_projection

from .calibration_set import CalibrationImage, drawn, high_patches, others_distances
from .patch_collector import PatchCollector
from .patches import CROP_SIZE, defect_crops, defect_patches, farthest_patches, patch_centres
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel

logger = logging.getLogger(__name__)

MOST_FARTHEST = 0.02
"""With weak labels, the largest share of a defective image's patches that is taken for its defect."""
_ROUGH_STAGES = ((512, 8), (4096, 2))
"""The rough ranking's stages: entries of each bank to compare with (greedy selection puts a coarse coreset first), and
how many times as many patches are kept as make an image's score."""
_PROGRESS_DELAY = 2.0  # seconds before a progress bar appears


class BankBuilder:
    """Collects the patches of training images, then fills a model's banks and its calibration set.

    Args:
        model: The model to fill.
        settings: The arguments of :class:`anomalib_exdd.models.exdd.ExDD` as attributes.
    """

    def __init__(self, model: ExDDModel, settings: Any) -> None:
        self.model = model
        self.settings = settings
        dimension, seed = settings.projected_dimension, settings.seed
        self.negative = PatchCollector(dimension, seed)
        self.positive = PatchCollector(dimension, seed)
        self.defective = PatchCollector(dimension, seed)  # whole defective images

    @property
    def num_images(self) -> int:
        """Number of images collected."""
        return self.negative.num_images + self.defective.num_images

    def add_normal(self, path: str, image_CHW: Tensor, features_Dhw: Tensor) -> None:
        """Take the patches of a normal image."""
        self.negative.add(path, features_Dhw.flatten(1).T, _centres(image_CHW, features_Dhw))

    def add_defective(self, path: str, image_CHW: Tensor, features_Dhw: Tensor, mask_HW: Tensor | None) -> None:
        """Take the patches of a defective image.

        Args:
            path: Path of the image.
            image_CHW: Pre-processed image, float, shape (C, H, W).
            features_Dhw: Its features, float32, shape (D, h, w).
            mask_HW: Its mask, non-zero on defects, shape (H, W); not needed with ``positive_patches: farthest``.
        """
        positions = _centres(image_CHW, features_Dhw)
        features_PD = features_Dhw.flatten(1).T
        self.defective.add(path, features_PD, positions)
        if self.settings.positive_patches == "farthest" or mask_HW is None:
            return  # chosen when the negative bank is there
        if self.settings.positive_patches == "crop":
            self.positive.add(path, *self._crop_patches(image_CHW, mask_HW))
            return
        grid = (features_Dhw.shape[-2], features_Dhw.shape[-1])
        belongs_P = defect_patches(mask_HW, grid, self.settings.min_coverage).flatten()
        self.positive.add(path, features_PD[belongs_P.to(features_PD.device)], positions[belongs_P])

    def _crop_patches(self, image_CHW: Tensor, mask_HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of all patches of all defect crops, and their positions in the whole image."""
        crops, boxes = defect_crops(image_CHW, mask_HW)
        features_NDhw = self.model.feature_extractor(crops).float()
        centre = patch_centres((features_NDhw.shape[-2], features_NDhw.shape[-1]), CROP_SIZE)
        size = torch.tensor(CROP_SIZE)
        positions = [torch.tensor([y, x]) + centre * torch.tensor([h, w]) // size for y, x, h, w in boxes]
        return features_NDhw.flatten(2).transpose(1, 2).flatten(0, 1), torch.cat(positions)

    def build(self) -> None:
        """Select the coresets, fill the banks, and calibrate.

        Raises:
            ValueError: If no normal image was seen.
        """
        if self.negative.num_images == 0:
            msg = "ExDD needs normal training images for its negative bank, but the training data has none."
            raise ValueError(msg)
        self.build_negative_bank()
        self.build_positive_bank()
        for name, bank, collector in (
            ("Negative", self.model.negative_bank, self.negative),
            ("Positive", self.model.positive_bank, self.positive),
        ):
            counts = (len(bank), collector.num_patches, collector.num_images)
            logger.info("%s bank: %d of %d patches from %d images.", name, *counts)
        self.fill_calibration_set()

    def build_negative_bank(self) -> None:
        """Fill the negative bank with a coreset of the normal images' patches."""
        ratio, minimum = self.settings.negative_ratio, self.settings.negative_minimum
        self.model.negative_bank.fill(self.negative.select(ratio, minimum, "Negative bank"))

    def build_positive_bank(self) -> None:
        """Fill the positive bank with a coreset of the defect patches; weak labels need the negative bank before."""
        if self.settings.positive_patches == "farthest":
            self._choose_farthest()
        if self.positive.num_images:
            ratio, minimum = self.settings.positive_ratio, self.settings.positive_minimum
            self.model.positive_bank.fill(self.positive.select(ratio, minimum, "Positive bank"))

    def _choose_farthest(self) -> None:
        """Fill the positive collector with the patches of defective images that are least like normal ones."""
        bank = self.model.negative_bank
        device = bank.features.device
        row = {path: index for index, path in enumerate(bank.sources)}
        farthest = []
        for path in drawn(self.negative.paths):
            features = self.negative.features_of(path).to(device)
            own = torch.full((len(features),), row[path], device=device)
            if bool((bank.source != row[path]).any()):
                farthest.append(others_distances(features, own, bank.features, bank.source, 1).max())
        usual = float(torch.stack(farthest).median()) if farthest else 0.0
        for path in tqdm(self.defective.paths, "Choosing defect patches", delay=_PROGRESS_DELAY):
            features = self.defective.features_of(path)
            distance_P = bank.nearest(features.to(device)).distances[:, 0]
            taken_P = farthest_patches(distance_P, usual, MOST_FARTHEST).cpu()
            self.positive.add(path, features[taken_P], self.defective.positions_of(path)[taken_P])

    def fill_calibration_set(self) -> None:
        """Keep the patches that calibration needs."""
        ranking = RoughRanking(self.model, self.settings)
        self.model.calibration_set.clear()
        images = [(path, False) for path in drawn(self.negative.paths)]
        images += [(path, True) for path in drawn(self.defective.paths)]
        kept = []
        for path, defective in tqdm(images, "Calibration", delay=_PROGRESS_DELAY):
            collector = self.defective if defective else self.negative
            image = CalibrationImage(path, collector.features_of(path), defective)
            kept.append((image, ranking.high(image)))
        self.model.calibration_set.add(kept)


def mask_of(batch: ImageBatch, index: int, name: str) -> Tensor:
    """Return the mask of a defective training image.

    Raises:
        ValueError: If it has none, or an empty one.
    """
    if batch.gt_mask is None:
        msg = (
            f"The defective training image {name} has no mask, but ExDD takes the patches of defects by mask. Give the "
            "masks of defective training images to the data module (with DefectFolder: `--data.masks`), do without "
            "them (`--model.positive_patches farthest`), or leave the defective images out of training "
            "(`--data.num_defects 0`): ExDD then works with normal images alone."
        )
        raise ValueError(msg)
    mask_HW: Tensor = batch.gt_mask[index]
    if not bool((mask_HW != 0).any()):
        msg = (
            f"The mask of the defective training image {name} is empty after pre-processing. The image's label says "
            "that it is defective: correct the label or the mask, or leave the image out."
        )
        raise ValueError(msg)
    return mask_HW


class RoughRanking:
    """Ranks the patches of images by their distances in the coreset's projection, without those of the same image.

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
            _RoughBank(self._project(bank.features[: _ROUGH_STAGES[-1][0]]), bank.source, bank.sources)
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

    def __init__(self, entries_MS: Tensor, source: Tensor, sources: list[str]) -> None:
        self.entries_MS = entries_MS
        self.source_M = source[: len(entries_MS)]
        self.row = {path: index for index, path in enumerate(sources)}
        self.norm_M = entries_MS.square().sum(dim=-1)

    def log_distances(self, path: str, query_PS: Tensor, entries: int) -> Tensor | None:
        """Return every patch's log-distance to the first entries of other images; None if there are no such."""
        own_M = self.source_M[:entries] == self.row.get(path, -1)
        if bool(own_M.all()):
            return None
        norm_M = self.norm_M[:entries].masked_fill(own_M, torch.inf)
        with full_float32(query_PS.device):
            nearest_P = torch.addmm(norm_M, query_PS, self.entries_MS[:entries].T, alpha=-2).amin(dim=1)
            return (nearest_P + query_PS.square().sum(dim=1)).clamp_min(EPSILON).log() / 2


def _centres(image_CHW: Tensor, features_Dhw: Tensor) -> Tensor:
    """Return the patches' centres in pixels of the image, int64, shape (P, 2)."""
    return patch_centres((features_Dhw.shape[-2], features_Dhw.shape[-1]), (image_CHW.shape[-2], image_CHW.shape[-1]))
