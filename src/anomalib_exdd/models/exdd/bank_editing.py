"""The banks of a trained model: what is in them, why an image scores as it does, teaching a defect, forgetting.

No image is needed when they change. Boundary and calibration are learnt anew from the banks and the patches that the
checkpoint keeps for it, so that weights, probabilities and all thresholds follow the banks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import Resize

from anomalib_exdd.coreset import gaussian_projection, greedy_k_center
from anomalib_exdd.images.masks import DefectMask

from .calibration_set import CalibrationImage, outline_of
from .candidate_selection import CandidateSelection
from .decisions import Decisions
from .explanation import Explanation, explain_image
from .memory_bank import BankContent, MemoryBank
from .patches import defect_patches, patch_centres
from .torch_model import ExDDModel


@dataclass(frozen=True)
class SourceInfo:
    """What a bank holds of one image.

    Attributes:
        bank: "negative" or "positive".
        source: Path of the image.
        entries: Number of its patches in the bank.
        kind: Kind of its defect, such as "scratch"; empty if it is not known, and for a normal image.
    """

    bank: str
    source: str
    entries: int
    kind: str


class BankSurgery:
    """Methods of :class:`anomalib_exdd.models.exdd.ExDD` that look into its banks or change them.

    Attributes:
        history: What was done to the banks after training: action, source, entries and date of each change, and the
            kind of a defect that was taught, if it was given.
    """

    model: ExDDModel
    settings: Any
    pre_processor: Any
    history: list[dict[str, Any]]

    def calibrate(self) -> None:
        """Fit the calibrated score to the banks as they are."""
        raise NotImplementedError

    @property
    def decisions(self) -> Decisions | None:
        """The thresholds of accept, review and reject."""
        raise NotImplementedError

    def info(self) -> list[SourceInfo]:
        """List what is in the banks, image by image, those with the most entries first."""
        found = []
        for name, bank in self._banks().items():
            counts = torch.bincount(bank.source.cpu(), minlength=len(bank.sources)).tolist()
            of_bank = [
                SourceInfo(name, path, count, bank.kinds.get(path, ""))
                for path, count in zip(bank.sources, counts, strict=True)
            ]
            found += sorted(of_bank, key=lambda each: (-each.entries, each.source))
        return found

    def explain(self, image_CHW: Tensor, source: str, count: int = 3) -> Explanation:
        """Explain the score of an image by the training patches that are nearest to its highest patches.

        Args:
            image_CHW: The image, RGB, float32 in 0..1, shape (3, H, W), not yet resized.
            source: Its path, for the explanation's text and picture.
            count: Patches to explain, at most.

        Returns:
            The explanation; ``str()`` of it tells it in words, :func:`.pictures.draw_explanation` draws it, given this
            model too.
        """
        return explain_image(self.model, self._pre_processed(image_CHW)[0], source, count, self.decisions)

    def teach(self, image_CHW: Tensor, mask_HW: Tensor, source: str, kind: str = "") -> int:
        """Add a newly found defect to the positive bank and to the calibration.

        Args:
            image_CHW: The image, RGB, float32 in 0..1, shape (3, H, W), not yet resized.
            mask_HW: Where the defect is, non-zero, shape (H, W).
            source: Path of the image. One that was taught before is replaced.
            kind: Kind of the defect, such as "scratch"; empty if it is not known.

        Returns:
            Number of entries added.

        Raises:
            ValueError: If the mask is empty, of another size or cut off, or the model is not trained.
        """
        self._check_trained()
        if mask_HW.shape != image_CHW.shape[-2:]:
            sizes = f"{tuple(mask_HW.shape)}, but the image is {tuple(image_CHW.shape[-2:])}"
            msg = f"The mask of {source} is {sizes} (height, width). Give a mask of the image's size."
            raise ValueError(msg)
        if not bool((mask_HW != 0).any()):
            msg = f"The mask of {source} is empty: it has to show where the defect is."
            raise ValueError(msg)
        bank, settings = self.model.positive_bank, self.settings
        features_PD, fine_Fhw, grid, size = self._features(image_CHW)
        # Every output pixel sees all the pixels that it stands for: no defect gets lost but by a crop.
        transform = getattr(self.pre_processor, "transform", None) or Resize(size)
        mask = torch.as_tensor(transform(DefectMask((mask_HW != 0).to(torch.uint8))))
        if not bool(mask.any()):
            msg = f"Nothing is left of the defect in {source} after cropping, as the model's pre-processor does."
            raise ValueError(msg)
        defects = defect_patches(mask, grid, settings.min_coverage).flatten().nonzero().flatten()
        rows = defects[self._representative(features_PD[defects], len(bank))]
        bank.remove(source)
        positions = patch_centres(grid, size)[rows]
        own = torch.zeros(len(rows), dtype=torch.int64)
        bank.add(BankContent(features_PD[rows], own, positions, [source], {source: kind}))
        image = CalibrationImage(
            source, features_PD, features_PD[defects], None if fine_Fhw is None else outline_of(fine_Fhw, mask)
        )
        self.model.calibration_set.add([image.keep(CandidateSelection(self.model, settings).high(image))])
        self._finish("teach", source, len(rows), kind)
        return len(rows)

    def forget(self, source: str) -> int:
        """Drop everything that came from an image: entries in both banks, and its part in the calibration.

        Synthetic defects that were made from it go with it.

        Args:
            source: Path of the image, or its file name if no other image has the same.

        Returns:
            Number of entries dropped.

        Raises:
            ValueError: If no image or several images are called so, or nothing would be left of the negative bank.
        """
        self._check_trained()
        path = self._find(source)
        negative = self.model.negative_bank
        if path in negative.sources and bool((negative.source == negative.sources.index(path)).all()):
            msg = f"{path} is the only image in the negative bank: without it, nothing would be left to compare with."
            raise ValueError(msg)
        made_of_it = [name for name, paths in self.model.positive_bank.origins.items() if path in paths]
        dropped = 0
        for each in (path, *made_of_it):
            dropped += sum(bank.remove(each) for bank in self._banks().values())
            self.model.calibration_set.remove(each)
        self._finish("forget", path, dropped)
        return dropped

    def _pre_processed(self, image_CHW: Tensor) -> Tensor:
        """Return the image as the model takes it, a batch of one on the banks' device."""
        with torch.inference_mode():
            batch: Tensor = self.pre_processor(image_CHW[None].to(self.model.negative_bank.features.device))
        return batch

    def _features(self, image_CHW: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int], tuple[int, int]]:
        """Return an image's patch features (P, D) and fine ones on the CPU, the grid of patches, and the input size."""
        batch = self._pre_processed(image_CHW)
        with torch.inference_mode():
            features_1Dhw, fine = self.model.extract(batch)
        grid = (features_1Dhw.shape[-2], features_1Dhw.shape[-1])
        fine_Fhw = None if fine is None else fine[0].cpu().clone()
        return features_1Dhw[0].flatten(1).T.cpu().clone(), fine_Fhw, grid, (batch.shape[-2], batch.shape[-1])

    def _representative(self, features_ND: Tensor, present: int) -> Tensor:
        """Choose as training would: everything while the bank is small, later a share by greedy k-center."""
        settings = self.settings
        room = settings.positive_minimum - present
        count = max(room, round(settings.positive_ratio * len(features_ND)), 1)
        projection = gaussian_projection(features_ND.shape[1], settings.projected_dimension, settings.seed)
        return greedy_k_center(features_ND @ projection, count, seed=settings.seed)

    def _find(self, source: str) -> str:
        known = sorted({path for bank in self._banks().values() for path in bank.sources})
        if source in known:
            return source
        named = [path for path in known if Path(path.replace("\\", "/")).name == source]
        if len(named) == 1:
            return named[0]
        if named:
            msg = f"{len(named)} images are called {source}: {named}. Give the whole path of one of them."
        else:
            msg = f"No image in the banks is called {source}. `anomalib info` lists them all."
        raise ValueError(msg)

    def _finish(self, action: str, source: str, entries: int, kind: str = "") -> None:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        change = {"action": action, "source": source, "entries": entries, "date": when}
        self.history.append(change | ({"kind": kind} if kind else {}))
        self.calibrate()

    def _banks(self) -> dict[str, MemoryBank]:
        return {"negative": self.model.negative_bank, "positive": self.model.positive_bank}

    def _check_trained(self) -> None:
        if len(self.model.negative_bank) == 0:
            msg = "The model is not trained: there are no banks to change. Train it, or load a trained checkpoint."
            raise ValueError(msg)


def summary(info: Sequence[SourceInfo], bank: str) -> str:
    """Say in one line how much a bank holds."""
    ours = [each for each in info if each.bank == bank]
    used = sum(each.entries > 0 for each in ours)
    return f"{sum(each.entries for each in ours)} entries from {used} of {len(ours)} images"


def kinds_summary(info: Sequence[SourceInfo]) -> str:
    """Say in one line how much the banks hold of each kind of defect, the commonest first; empty if none is known."""
    kinds = Counter(sorted(each.kind for each in info if each.kind)).most_common()
    entries = {kind: sum(each.entries for each in info if each.kind == kind) for kind, _ in kinds}
    return "; ".join(f"{kind}: {entries[kind]} entries from {count} images" for kind, count in kinds)
