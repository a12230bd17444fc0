"""The banks of a trained model: what is in them, teaching a defect or a good part, forgetting an image.

:class:`.ExDD` has these functions as methods. No other image is needed: boundary and calibration are learnt anew from
the banks and the patches that the checkpoint keeps for it, so that weights, probabilities and thresholds follow.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.transforms.v2 import Resize

from anomalib_exdd.coreset import gaussian_projection, greedy_k_center
from anomalib_exdd.images.masks import DefectMask

from .calibration_set import KeptPatches
from .candidate_selection import CandidateSelection
from .memory_bank import BankContent, MemoryBank
from .patches import Outline, defect_patches, patch_centres
from .scoring import top_count

if TYPE_CHECKING:
    from .lightning_model import ExDD


@dataclass(frozen=True)
class SourceInfo:
    """What a bank holds of one image."""

    bank: str  # "negative" or "positive"
    source: str  # path of the image
    entries: int  # number of its patches in the bank
    kind: str  # of its defect, such as "scratch"; empty if it is not known, and for a normal image


def bank_info(model: "ExDD") -> list[SourceInfo]:
    """List what is in the banks, image by image, those with the most entries first."""
    found = []
    for name, bank in (("negative", model.model.negative_bank), ("positive", model.model.positive_bank)):
        counts = torch.bincount(bank.source.cpu(), minlength=len(bank.sources)).tolist()
        rows = zip(bank.sources, counts, strict=True)
        found += [SourceInfo(name, path, count, bank.kinds.get(path, "")) for path, count in rows]
    return sorted(found, key=lambda each: (each.bank, -each.entries, each.source))


def teach(model: "ExDD", image_CHW: Tensor, mask_HW: Tensor, source: str, kind: str = "") -> int:
    """Add a newly found defect to the positive bank and to the calibration; return the number of new entries.

    Args:
        model: The model.
        image_CHW: The image, RGB, float32 in 0..1, shape (3, H, W), not yet resized.
        mask_HW: Where the defect is, non-zero, shape (H, W).
        source: Path of the image. What either bank has of it is replaced.
        kind: Kind of the defect, such as "scratch"; empty if it is not known.

    Raises:
        ValueError: If the mask is empty, of another size or cut off.
    """
    if mask_HW.shape != image_CHW.shape[-2:]:
        msg = f"The mask of {source} is {tuple(mask_HW.shape)}. Give a mask of the image's size."
        raise ValueError(msg)
    bank, settings = model.model.positive_bank, model.settings
    batch = pre_processed(model, image_CHW)
    with torch.inference_mode():
        features_1Dhw, fine = model.model.extract(batch)
    features_PD = features_1Dhw[0].flatten(1).T.cpu().clone()
    grid, size = features_1Dhw.shape[-2:], batch.shape[-2:]
    # Every output pixel sees all the pixels that it stands for: no defect gets lost but by a crop.
    transform = getattr(model.pre_processor, "transform", None) or Resize(size)
    mask = torch.as_tensor(transform(DefectMask((mask_HW != 0).to(torch.uint8))))
    if not bool(mask.any()):
        msg = f"The mask of {source} is empty, or nothing is left of it after the model's pre-processor has cropped it."
        raise ValueError(msg)
    defects = defect_patches(mask, grid, settings.min_coverage).flatten().nonzero().flatten()
    _remove(model, source)
    # As in training: everything while the bank is small, later a share by greedy k-center.
    count = max(settings.positive_minimum - len(bank), round(settings.positive_ratio * len(defects)), 1)
    projection = gaussian_projection(features_PD.shape[1], settings.projected_dimension, settings.seed)
    rows = defects[greedy_k_center(features_PD[defects] @ projection, count, seed=settings.seed)]
    position, own = patch_centres(grid, size)[rows], torch.zeros(len(rows), dtype=torch.int64)
    bank.add(BankContent(features_PD[rows], own, position, [source], {source: kind}))
    selection = CandidateSelection(model.model, settings.projected_dimension, settings.seed)
    outline = None if fine is None else Outline.of(fine[0].cpu().clone(), mask)
    high = selection.candidates(source, features_PD)
    model.model.calibration_set.add([KeptPatches.of(source, features_PD, high, features_PD[defects], outline)])
    _finish(model, action="teach", source=source, entries=len(rows), **({"kind": kind} if kind else {}))
    return len(rows)


def teach_good(model: "ExDD", image_CHW: Tensor, source: str) -> int:
    """Add a good part that was not accepted to the negative bank and to the calibration; arguments as before.

    The patches that the bank covers least are added. As any normal training image, it is judged without its own entries
    when thresholds and probabilities are fitted anew.
    """
    bank, settings = model.model.negative_bank, model.settings
    batch = pre_processed(model, image_CHW)
    with torch.inference_mode():
        features_Dhw = model.model.embed(batch)[0]
    features_PD = features_Dhw.flatten(1).T.clone()
    _remove(model, source)
    # As in training a share, but at least as many patches as make an image's score.
    least = top_count(len(features_PD), model.model.calibration.top_fraction)
    count = max(settings.negative_minimum - len(bank), round(settings.negative_ratio * len(features_PD)), least)
    rows = _uncovered(features_PD, bank, count).cpu()
    features_PD, own = features_PD.cpu(), torch.zeros(len(rows), dtype=torch.int64)
    position = patch_centres(features_Dhw.shape[-2:], batch.shape[-2:])[rows]
    bank.add(BankContent(features_PD[rows], own, position, [source]))
    high = CandidateSelection(model.model, settings.projected_dimension, settings.seed).candidates(source, features_PD)
    model.model.calibration_set.add([KeptPatches.of(source, features_PD, high, None)])
    _finish(model, action="teach good", source=source, entries=len(rows))
    return len(rows)


def _uncovered(features_PD: Tensor, bank: MemoryBank, count: int) -> Tensor:
    """Choose patches by greedy k-center, with the bank's entries as the centres so far; rows, int64."""
    distance_P = bank.nearest(features_PD).distances[:, 0].clone()
    rows: list[int] = []
    while len(rows) < min(count, len(features_PD)):
        rows.append(int(distance_P.argmax()))
        distance_P = torch.minimum(distance_P, torch.linalg.vector_norm(features_PD - features_PD[rows[-1]], dim=1))
        distance_P[rows[-1]] = -1.0  # of equal patches, none is taken twice
    return torch.tensor(rows, device=features_PD.device)


def forget(model: "ExDD", source: str) -> int:
    """Drop all that came from an image, with synthetic defects made from it; return the number of entries.

    Args:
        model: The model.
        source: Path of the image, or its file name if no other image has the same.

    Raises:
        ValueError: If no image or several images are called so, or nothing would be left of the negative bank.
    """
    banks = (model.model.negative_bank, model.model.positive_bank)
    path = _find(source, sorted({path for bank in banks for path in bank.sources}))
    made_of_it = [name for name, paths in model.model.positive_bank.origins.items() if path in paths]
    dropped = sum(_remove(model, each) for each in (path, *made_of_it))
    _finish(model, action="forget", source=path, entries=dropped)
    return dropped


def _remove(model: "ExDD", source: str) -> int:
    """Drop an image from both banks and from the calibration set; return the number of entries."""
    negative = model.model.negative_bank
    if source in negative.sources and bool((negative.source == negative.sources.index(source)).all()):
        msg = f"{source} is the only image in the negative bank: without it, nothing would be left to compare with."
        raise ValueError(msg)
    model.model.calibration_set.remove(source)
    return negative.remove(source) + model.model.positive_bank.remove(source)


def pre_processed(model: "ExDD", image_CHW: Tensor) -> Tensor:
    """Return an image as the torch model takes it, a batch of one on the banks' device."""
    with torch.inference_mode():
        batch: Tensor = model.pre_processor(image_CHW[None].to(model.model.negative_bank.features.device))
    return batch


def _find(source: str, known: Sequence[str]) -> str:
    """Return the path of an image that is given by its path or its file name."""
    if source in known:
        return source
    named = [path for path in known if Path(path.replace("\\", "/")).name == source]
    if len(named) != 1:
        found = f"{len(named)} images in the banks are" if named else "No image in the banks is"
        msg = f"{found} called {source}: give the path of one that `anomalib info` lists."
        raise ValueError(msg)
    return named[0]


def _finish(model: "ExDD", **change: str | int) -> None:
    """Write a change down, and calibrate the model anew."""
    model.history.append({**change, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")})
    model.calibrate()


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
