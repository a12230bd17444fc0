"""Builds the banks and the calibration set from training images that stream by.

The way of the data: image -> patch features -> normal and defect patches -> projection -> coreset -> bank.

Shape suffixes: B images, P patches of an image, D features, h x w patches, H x W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from statistics import median_low
from typing import Any, Literal, cast

import torch
from anomalib.data import ImageBatch
from torch import Tensor
from tqdm import tqdm

from anomalib_exdd.utils.distributed import gather_objects, rank

from .calibration_set import KeptPatches, choose_images, others_distances
from .candidate_selection import CandidateSelection
from .memory_bank import Origins
from .patch_collector import PatchCollector, of_all_processes
from .patches import (
    CROP_SIZE,
    BoxedImage,
    Outline,
    defect_crops,
    defect_patches,
    farthest_patches,
    outstanding_patches,
    patch_centres,
)
from .torch_model import ExDDModel
from .training_stores import TrainingStores

PositivePatches = Literal["mask", "crop", "farthest"]

MOST_FARTHEST = 0.02  # with weak labels, the largest share of a defective image's patches that is taken for its defect
_PROGRESS_DELAY = 2.0  # seconds before a progress bar appears


@dataclass(frozen=True)
class BankSettings:
    """Arguments of :class:`anomalib_exdd.models.exdd.ExDD` that banks, boundary and calibration set are built by."""

    negative_ratio: float
    positive_ratio: float
    negative_minimum: int
    positive_minimum: int
    positive_patches: str
    min_coverage: float
    projected_dimension: int
    synthetic_weight: float
    seed: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "BankSettings":
        """Take them from the model's arguments."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})


class BankBuilder:
    """Collects the patches of training images, then fills a model's banks and its calibration set.

    Patches wait in ``stores``, by default in memory. With several processes, each of them collects the images that it
    sees; all of them build together, and get the same.
    """

    def __init__(self, model: ExDDModel, settings: BankSettings, stores: TrainingStores | None = None) -> None:
        self.model = model
        self.settings = settings
        self.stores = TrainingStores("memory") if stores is None else stores
        # Of defective images the whole, too: the calibration looks at all of their patches.
        self.negative, self.positive, self.defective = (
            PatchCollector(settings.projected_dimension, settings.seed, self.stores, kind)
            for kind in ("normal", "defect", "defective")
        )
        self.outlines: dict[str, Outline] = {}
        self.boxes: dict[str, BoxedImage] = {}
        self.origins: Origins = {}
        self.kinds: dict[str, str] = {}

    def add_batch(self, batch: ImageBatch) -> None:
        """Take the patches of a batch: of normal images for the negative, of defects for the positive bank.

        Raises:
            ValueError: If a defective image has no mask to find its defect patches by.
        """
        images_BCHW = cast("Tensor", batch.image)
        count = len(self.negative.paths) + len(self.defective.paths)
        names = batch.image_path or [f"image {count + index}" for index in range(len(images_BCHW))]
        # What only this package's data sets give.
        origins, kinds, has_boxes = (
            getattr(batch, column, None) or [None] * len(names) for column in ("origins", "kinds", "has_boxes")
        )
        self.origins |= {name: paths for name, paths in zip(names, origins, strict=True) if paths}
        self.kinds |= {name: kind for name, kind in zip(names, kinds, strict=True) if kind}
        new = [index for index, name in enumerate(names) if not self._has(name)]
        if not new:
            return
        features_BDhw, fine = self.model.extract(images_BCHW[new])
        for row, (index, features_Dhw) in enumerate(zip(new, features_BDhw, strict=True)):
            name, image_CHW = names[index], images_BCHW[index]
            fine_Fhw = None if fine is None else fine[row]
            if batch.gt_label is None or not bool(batch.gt_label[index]):
                self.add_normal(name, image_CHW, features_Dhw)
            elif self.settings.positive_patches == "farthest" and name not in self.origins:
                self.add_defective(name, image_CHW, features_Dhw, None)
            else:
                mask_HW = _mask_of(batch, index, name)
                self.add_defective(name, image_CHW, features_Dhw, mask_HW, fine_Fhw, has_boxes=bool(has_boxes[index]))

    def _has(self, path: str) -> bool:
        """Tell whether an image's patches are there, as they may be when an interrupted training is resumed."""
        if path in self.negative or path in self.boxes:
            return True
        if self.settings.positive_patches == "farthest":
            return path in self.defective
        outlined = path in self.outlines or self.model.feature_extractor.fine_layer is None  # never on disk
        return path in self.defective and path in self.positive and outlined

    def add_normal(self, path: str, image_CHW: Tensor, features_Dhw: Tensor) -> None:
        """Take the patches of a normal image."""
        positions = patch_centres(features_Dhw.shape[-2:], image_CHW.shape[-2:])
        self.negative.add(path, features_Dhw.flatten(1).T, positions)

    def add_defective(
        self,
        path: str,
        image_CHW: Tensor,
        features_Dhw: Tensor,
        mask_HW: Tensor | None,
        fine_Fhw: Tensor | None = None,
        *,
        has_boxes: bool = False,
    ) -> None:
        """Take the patches of a defective image.

        Args:
            path: Path of the image.
            image_CHW: Pre-processed image, float.
            features_Dhw: Its features, float32.
            mask_HW: Its mask, non-zero on defects; None with ``positive_patches: farthest``.
            fine_Fhw: Its fine features, float32, on a grid twice as fine, if the backbone has any.
            has_boxes: Whether the mask has boxes around defects instead of their outlines.
        """
        grid, features_PD = features_Dhw.shape[-2:], features_Dhw.flatten(1).T
        positions = patch_centres(grid, image_CHW.shape[-2:])
        self.defective.add(path, features_PD, positions)
        if mask_HW is None:
            return  # chosen when the negative bank is there
        if fine_Fhw is not None and not has_boxes:
            self.outlines[path] = Outline.of(fine_Fhw, mask_HW)
        if self.settings.positive_patches == "crop":
            crops, boxes = defect_crops(image_CHW, mask_HW)
            crop_features_NDhw = self.model.feature_extractor(crops).float()
            features_PD = crop_features_NDhw.flatten(2).transpose(1, 2).flatten(0, 1)
            centre, size = patch_centres(crop_features_NDhw.shape[-2:], CROP_SIZE), torch.tensor(CROP_SIZE)
            scaled = [torch.tensor([y, x]) + centre * torch.tensor([h, w]) // size for y, x, h, w in boxes]
            self.positive.add(path, features_PD, torch.cat(scaled))
        elif has_boxes:
            self.boxes[path] = BoxedImage.of(mask_HW, grid, self.settings.min_coverage, fine_Fhw)
        else:
            belongs_P = defect_patches(mask_HW, grid, self.settings.min_coverage).flatten()
            self.positive.add(path, features_PD[belongs_P.to(features_PD.device)], positions[belongs_P])

    def build(self) -> None:
        """Select the coresets, fill the banks and the calibration set, and remove the stores.

        Raises:
            ValueError: If no normal image was seen.
        """
        self.negative.share()
        self.defective.share()
        self.origins, self.kinds = of_all_processes(self.origins), of_all_processes(self.kinds)
        if not self.negative.paths:
            msg = "ExDD needs normal training images for its negative bank, but the training data has none."
            raise ValueError(msg)
        self.build_negative_bank()
        self.build_positive_bank()
        self.fill_calibration_set()
        self.stores.remove()

    def build_negative_bank(self) -> None:
        """Fill the negative bank with a coreset of the normal images' patches."""
        ratio, minimum = self.settings.negative_ratio, self.settings.negative_minimum
        state = self.stores.state("negative_bank")
        self.model.negative_bank.fill(self.negative.select(ratio, minimum, "Negative bank", state))

    def build_positive_bank(self) -> None:
        """Fill the positive bank with a coreset of the defect patches; weak labels and boxes need the negative bank.

        Real and synthetic defects have a coreset each, so that many synthetic ones do not crowd the real ones out.
        """
        if self.settings.positive_patches == "farthest" or any(gather_objects(bool(self.boxes))):
            self._choose_by_distance()
        self.positive.share()
        bank = self.model.positive_bank
        ratio, minimum = self.settings.positive_ratio, self.settings.positive_minimum
        for title, synthetic in (("Positive bank", False), ("Positive bank, synthetic", True)):
            paths = [path for path in self.positive.paths if (path in self.origins) == synthetic]
            if paths:
                bank.add(self.positive.select(ratio, minimum, title, paths=paths))
        bank.origins = {path: self.origins[path] for path in bank.sources if path in self.origins}
        bank.kinds = {path: self.kinds[path] for path in bank.sources if path in self.kinds}

    def _choose_by_distance(self) -> None:
        """Fill the positive collector with patches that are least like normal ones: of images, or within boxes."""
        bank, usual = self.model.negative_bank, self._usual_distance()
        weak = [path for path in self.defective.paths if path not in self.origins]
        paths = weak if self.settings.positive_patches == "farthest" else sorted(self.boxes)
        own_paths = list(filter(self.defective.is_own, paths))
        for path in tqdm(own_paths, "Choosing defect patches", delay=_PROGRESS_DELAY, disable=rank() > 0):
            features = self.defective.store.features(path)
            distance_P = bank.nearest(features.to(bank.features.device)).distances[:, 0].cpu()
            if boxed := self.boxes.get(path):
                taken_P = outstanding_patches(distance_P, boxed.patches, usual)
                if outline := boxed.outline(taken_P):
                    self.outlines[path] = outline
            else:
                taken_P = farthest_patches(distance_P, usual, MOST_FARTHEST)
            self.positive.add(path, features[taken_P], self.defective.store.positions(path)[taken_P])

    def _usual_distance(self) -> float:
        """Return how far the farthest patch of a normal image usually is from the entries of others; 0 without any."""
        bank = self.model.negative_bank
        vectors, device = bank.vectors, bank.features.device
        row = {path: index for index, path in enumerate(bank.sources)}
        farthest = []
        for path in filter(self.negative.is_own, choose_images(self.negative.paths)):
            features = self.negative.store.features(path).to(device)
            own = torch.zeros(len(features), dtype=torch.int64, device=device)
            if bool((bank.source != row[path]).any()):
                distances = others_distances(features, own, [[row[path]]], vectors, bank.source, 1)
                farthest.append(float(distances.max()))
        everywhere = [distance for part in gather_objects(farthest) for distance in part]
        return median_low(everywhere) if everywhere else 0.0

    def fill_calibration_set(self) -> None:
        """Keep the patches that calibration needs, and learn the boundary, by which some of them are chosen."""
        images = [(path, self.negative) for path in choose_images(self.negative.paths)]
        for synthetic in (False, True):
            paths = [path for path in self.defective.paths if (path in self.origins) == synthetic]
            images += [(path, self.defective) for path in choose_images(paths)]
        settings = self.settings
        self._keep(images, "Calibration: samples", lambda *_: torch.empty(0, dtype=torch.int64))
        self.model.learn_boundary(settings.synthetic_weight, settings.seed)
        folds = self.model.folds(settings.synthetic_weight)
        selection = CandidateSelection(self.model, settings.projected_dimension, settings.seed, folds)
        self._keep(images, "Calibration", selection.candidates)

    def _keep(
        self, images: list[tuple[str, PatchCollector]], title: str, candidates: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Fill the calibration set with samples of the images and the candidates for their highest patches."""
        kept = {}
        own = [(path, collector) for path, collector in images if collector.is_own(path)]
        for path, collector in tqdm(own, title, delay=_PROGRESS_DELAY, disable=rank() > 0):
            defects = self.positive.store.features(path) if collector is self.defective else None
            features = collector.store.features(path)
            kept[path] = KeptPatches.of(path, features, candidates(path, features), defects, self.outlines.get(path))
        everywhere = of_all_processes(kept)
        self.model.calibration_set.clear()
        self.model.calibration_set.add([everywhere[path] for path, _ in images])


def _mask_of(batch: ImageBatch, index: int, name: str) -> Tensor:
    """Return the mask of a defective training image; refuse one that has none, or an empty one."""
    if batch.gt_mask is None:
        msg = (
            f"The defective training image {name} has no mask. Give masks (`--data.masks`), or do without them "
            "(`--model.positive_patches farthest`) or without defects (`--data.num_defects 0`)."
        )
        raise ValueError(msg)
    mask_HW: Tensor = batch.gt_mask[index]
    if not bool((mask_HW != 0).any()):
        msg = f"The mask of the defective training image {name} is empty: correct mask or label, or leave it out."
        raise ValueError(msg)
    return mask_HW
