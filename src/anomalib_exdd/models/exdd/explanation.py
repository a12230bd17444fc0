"""Why an image scores as it does, and why it is not accepted.

An explanation shows its highest patches and the training patches that are nearest to them. The reason is that it
resembles known defects, of a kind, or that it is unfamiliar: a patch resembles known defects if its log-ratio of
distances is within :attr:`.Calibration.resemblance`, and the patches that make the image's score decide by majority.

Shape suffixes: B images, P patches of an image, h x w patches, H x W pixels.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_exdd.models.regions import Reason

from .decisions import Decisions
from .memory_bank import MemoryBank
from .patches import patch_centres
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel, ScoredImages

_APART = 2  # explained patches are at least so many patches away from each other, in rows or in columns


@dataclass(frozen=True)
class TrainingPatch:
    """A patch in a memory bank: its training image, its centre there in pixels, and the explained patch's distance."""

    source: str
    row: int
    column: int
    distance: float

    def __str__(self) -> str:
        """Return it in words."""
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
    """Explain the score of a pre-processed image by ``count`` patches at most, no two of them neighbours."""
    height, width = image_CHW.shape[-2:]
    with torch.inference_mode():
        scored = model.score_images(image_CHW[None])
        grid, score_P = scored.grid, scored.scores.patches[0]
        rows = _highest_apart(score_P.reshape(grid), count)
        patches_ND = model.embed(image_CHW[None])[0].flatten(1).T[rows]
        normal, defect = (_nearest(bank, patches_ND) for bank in (model.negative_bank, model.positive_bank))
    centres, scores = patch_centres(grid, (height, width))[rows.cpu()].tolist(), score_P[rows].tolist()
    explained = [
        PatchExplanation(row, column, *rest)
        for (row, column), *rest in zip(centres, scores, normal, defect, strict=True)
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


def _highest_apart(scores_hw: Tensor, count: int) -> Tensor:
    """Return the patches with the highest scores, leaving out the neighbours of those taken before, int64."""
    left = scores_hw.clone()
    chosen: list[int] = []
    while len(chosen) < count and bool(torch.isfinite(left).any()):
        chosen.append(int(left.argmax()))
        row, column = divmod(chosen[-1], left.shape[1])
        left[max(0, row - _APART) : row + _APART + 1, max(0, column - _APART) : column + _APART + 1] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64, device=scores_hw.device)


def _nearest(bank: MemoryBank, patches_PD: Tensor) -> list[TrainingPatch | None]:
    """Find each patch's nearest entry; an empty bank has none."""
    if len(bank) == 0:
        return [None] * len(patches_PD)
    found = bank.nearest(patches_PD)
    entry = found.indices[:, 0]
    columns = bank.source[entry].tolist(), bank.position[entry].tolist(), found.distances[:, 0].tolist()
    return [
        TrainingPatch(bank.sources[source], row, column, distance)
        for source, (row, column), distance in zip(*columns, strict=True)
    ]


@dataclass(frozen=True)
class ImageReasons:
    """The reasons of an image and of the regions in it."""

    order: NDArray[np.int64]  # patches, the one with the highest score first, shape (P,)
    top: int  # how many of them make the image's score
    resembles: NDArray[np.bool_]  # whether each patch resembles known defects, shape (P,)
    kinds: NDArray[np.str_]  # kind of each patch's nearest defect, empty if it is not known, shape (P,)
    grid: tuple[int, int]  # rows and columns of the patches
    image_size: tuple[int, int]  # height and width of the pre-processed image, and of its map
    accepted: bool

    @property
    def image(self) -> Reason | None:
        """Why the image is not accepted; None if it is."""
        return None if self.accepted else self._majority(self.order[: self.top])

    def of_box(self, box: tuple[int, int, int, int]) -> Reason:
        """Return the reason of a region, by those patches in its box that make the image's score, at least one.

        The box is left, top, width and height in pixels of the map.
        """
        left, top, width, height = box
        rows = _cells(top, height, self.image_size[0], self.grid[0])
        columns = _cells(left, width, self.image_size[1], self.grid[1])
        inside_hw = np.zeros(self.grid, dtype=bool)
        inside_hw[rows, columns] = True
        inside_P = inside_hw.ravel()[self.order]
        return self._majority(self.order[inside_P][: max(1, int(inside_P[: self.top].sum()))])

    def _majority(self, patches: NDArray[np.int64]) -> Reason:
        kinds = self.kinds[patches].tolist()
        known = Counter(self.kinds[patches[self.resembles[patches]]].tolist())
        if 2 * known.total() <= len(patches):
            return Reason("unfamiliar")
        kind = known.most_common(1)[0][0]  # of equally common ones that of the higher patch
        return Reason("known", kind, kinds.count(kind) / len(kinds)) if kind else Reason("known")


def reasons_of(model: ExDDModel, scored: ScoredImages, decisions: Decisions) -> list[ImageReasons]:
    """Find the reasons of images that a calibrated model has scored."""
    scores, (batch, patches) = scored.scores, scored.scores.deciding.shape
    resembles_BP, kinds_BP = np.zeros((batch, patches), dtype=bool), np.full((batch, patches), "")
    if scores.positive is not None and scores.positive.entry is not None:
        bank = model.positive_bank
        to_defects, to_normal = (each.nearest.clamp_min(EPSILON).log() for each in (scores.positive, scores.negative))
        resembles_BP = (to_defects - to_normal <= model.calibration.resemblance).cpu().numpy()
        kinds = np.array([bank.kinds.get(path, "") for path in bank.sources])
        kinds_BP = kinds[bank.source[scores.positive.entry].cpu().numpy()]
    order_BP = scores.deciding.argsort(dim=1, descending=True, stable=True).cpu().numpy()
    top = top_count(patches, model.calibration.top_fraction)
    size = (scored.anomaly_map.shape[-2], scored.anomaly_map.shape[-1])
    accepted = [decisions.name(probability) == "accept" for probability in scores.images.tolist()]
    return [
        ImageReasons(order, top, resembles, kinds, scored.grid, size, is_accepted)
        for order, resembles, kinds, is_accepted in zip(order_BP, resembles_BP, kinds_BP, accepted, strict=True)
    ]


def _cells(start: int, length: int, pixels: int, cells: int) -> slice:
    """Return the cells of a grid that a stretch of pixels touches along one axis."""
    return slice(start * cells // pixels, -(-(start + length) * cells // pixels))
