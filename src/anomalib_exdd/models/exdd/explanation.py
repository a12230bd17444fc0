"""Why an image scores as it does: its highest patches beside the training patches that are nearest to them."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from anomalib_exdd.models.components.reason import Reason

from .decisions import Decisions
from .memory_bank import MemoryBank
from .reasons import reasons_of
from .torch_model import ExDDModel

_APART = 2  # explained patches are at least so many patches away from each other, in rows or in columns


@dataclass(frozen=True)
class TrainingPatch:
    """A patch in a memory bank: its training image, its centre there in pixels, and the explained patch's distance."""

    source: str
    row: int
    column: int
    distance: float

    def __str__(self) -> str:
        """State it in words."""
        return f"{self.source} (row {self.row}, column {self.column}) at distance {self.distance:.3g}"


@dataclass(frozen=True)
class PatchExplanation:
    """One patch of an image: its centre in pixels of the pre-processed image, its score, and the nearest patches."""

    row: int
    column: int
    score: float
    normal: TrainingPatch
    defect: TrainingPatch | None  # None without a positive bank


@dataclass(frozen=True)
class Explanation:
    """The highest patches of an image.

    The heat map is float32 in 0..1, shape (H, W): with calibrated scoring probabilities, on the same scale for all
    images; with other scorings from the image's lowest to its highest value.
    """

    source: str
    image_size: tuple[int, int]  # height and width of the pre-processed image, which rows and columns refer to
    score: float  # of the image; with calibrated scoring the probability that it is defective
    decision: str | None  # and its reason in words, if the model is calibrated
    patches: list[PatchExplanation]  # highest first
    heat_map: Tensor = field(repr=False)
    reason: Reason | None = None  # why the image is not accepted; None if it is, or without a decision

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the heat map as plain numbers and texts, for JSON."""
        return {
            "source": self.source,
            "image_size": list(self.image_size),
            "score": self.score,
            "decision": self.decision,
            **{name: getattr(self.reason, name, None) for name in Reason._fields},
            "patches": [asdict(patch) for patch in self.patches],
        }

    def __str__(self) -> str:
        """Explain in words, a line for each patch."""
        lines = [f"{self.source}: {self.decision or f'score {self.score:.4g}'}"]
        for number, patch in enumerate(self.patches, start=1):
            line = f"  {number}. row {patch.row}, column {patch.column}, score {patch.score:.3g}: nearest normal"
            lines.append(f"{line} {patch.normal}" + (f"; nearest defect {patch.defect}" if patch.defect else ""))
        return "\n".join(lines)


def explain_image(
    model: ExDDModel, image_CHW: Tensor, source: str, count: int, decisions: Decisions | None
) -> Explanation:
    """Explain the score of one image.

    Args:
        model: Trained model.
        image_CHW: Pre-processed image, float, shape (3, H, W).
        source: Path of the image.
        count: Patches to explain, at most; no two of them are neighbours.
        decisions: Thresholds, if the model is calibrated.
    """
    height, width = image_CHW.shape[-2:]
    with torch.inference_mode():
        scored = model.score_images(image_CHW[None])
        grid, score_P = scored.grid, scored.scores.patches[0]
        chosen = _highest_apart(score_P.reshape(grid), count)
        rows = torch.tensor([row * grid[1] + column for row, column in chosen], device=score_P.device)
        patches_ND = model.embed(image_CHW[None])[0].flatten(1).T[rows]
        normal = _nearest(model.negative_bank, patches_ND)
        defect = _nearest(model.positive_bank, patches_ND) if len(model.positive_bank) else None
    explained = [
        PatchExplanation(
            (2 * row + 1) * height // (2 * grid[0]),
            (2 * column + 1) * width // (2 * grid[1]),
            float(score_P[rows[index]]),
            normal[index],
            None if defect is None else defect[index],
        )
        for index, (row, column) in enumerate(chosen)
    ]
    score = float(scored.scores.images[0])
    reason = None if decisions is None else reasons_of(model, scored, decisions)[0].image
    decision = None if decisions is None else decisions.describe(score, reason)
    heat_map = scored.anomaly_map[0, 0]
    if model.scoring == "calibrated":  # log-odds
        heat_map = torch.sigmoid(heat_map)
    else:
        low, high = heat_map.aminmax()
        heat_map = (heat_map - low) / (high - low).clamp_min(1e-12)
    return Explanation(source, (height, width), score, decision, explained, heat_map.cpu(), reason)


def _highest_apart(scores_hw: Tensor, count: int) -> list[tuple[int, int]]:
    """Return the cells with the highest scores, leaving out the neighbours of those taken before."""
    left = scores_hw.clone()
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count and bool(torch.isfinite(left).any()):
        row, column = divmod(int(left.argmax()), left.shape[1])
        chosen.append((row, column))
        left[max(0, row - _APART) : row + _APART + 1, max(0, column - _APART) : column + _APART + 1] = -torch.inf
    return chosen


def _nearest(bank: MemoryBank, patches_PD: Tensor) -> list[TrainingPatch]:
    found = bank.nearest(patches_PD)
    entries = found.indices[:, 0]
    sources = bank.source[entries].tolist()
    positions = bank.position[entries].tolist()
    distances = found.distances[:, 0].tolist()
    return [
        TrainingPatch(bank.sources[source], row, column, distance)
        for source, (row, column), distance in zip(sources, positions, distances, strict=True)
    ]
