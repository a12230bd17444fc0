"""Why images are not accepted: they resemble known defects, of a kind, or they are unfamiliar.

A patch resembles known defects if its log-ratio of distances is within :attr:`.Calibration.resemblance`. The patches
that make an image's score decide by majority.

Shape suffixes: B images, P patches of an image.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomalib_exdd.models.components.reason import Reason

from .decisions import Decisions
from .scoring import EPSILON, top_count
from .torch_model import ExDDModel, ScoredImages


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

        Args:
            box: Left, top, width and height in pixels of the map.
        """
        left, top, width, height = box
        rows = _cells(top, height, self.image_size[0], self.grid[0])
        columns = _cells(left, width, self.image_size[1], self.grid[1])
        inside_hw = np.zeros(self.grid, dtype=bool)
        inside_hw[rows, columns] = True
        inside_P = inside_hw.ravel()[self.order]
        return self._majority(self.order[inside_P][: max(1, int(inside_P[: self.top].sum()))])

    def _majority(self, patches: NDArray[np.int64]) -> Reason:
        """Let patches, the one with the highest score first, decide."""
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
    return [
        ImageReasons(order, top, resembles, kinds, scored.grid, size, decisions.name(probability) == "accept")
        for order, resembles, kinds, probability in zip(
            order_BP, resembles_BP, kinds_BP, scores.images.tolist(), strict=True
        )
    ]


def _cells(start: int, length: int, pixels: int, cells: int) -> slice:
    """Return the cells of a grid that a stretch of pixels touches along one axis."""
    return slice(start * cells // pixels, -(-(start + length) * cells // pixels))
