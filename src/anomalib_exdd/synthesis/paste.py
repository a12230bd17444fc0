"""A real defect, cut out, turned, scaled and blended into a normal image: NSA (arXiv 2109.15222) with real defects."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import cv2
import numpy as np

from .base import Defect, Levels, Mask, Pixels, Request, Synthesis, Synthesizer, bounding_box, check_range
from .foreground import foreground
from .placement import Motion, best_positions, draw_motion, extent, move, paste_mask

Blend = Literal["poisson", "contrast"]
"""`poisson`: Poisson editing. `contrast`: the defect, as much brighter or darker as it is than its surroundings."""

LEAST_SIDE = 16  # pixels of an image that a defect can be pasted into
LEAST_MARGIN = 4  # pixels: OpenCV's Poisson editing leaves out the outermost three of its region
WINDOW = 24  # pixels around the defect, in which the surroundings are compared
LOST = 0.4  # of the expected contrast: with less, Poisson editing has removed the defect


class PasteSynthesizer(Synthesizer):
    """Paste the request's real defect where the request's mask is.

    The defect is turned, mirrored and scaled at random (normal scale with mean 1 and deviation .5, clipped) and put at
    the centre of the request's mask, or as near to it as the part allows. Its contrast with its surroundings is kept.
    The returned mask is that of the moved defect. Pixels change within `margin` around it; all others stay the same.

    Poisson editing is replaced by ``contrast``, and the manifest says so, where the defect touches the border of its
    own image or of the new one, or where nothing visible would remain. ``contrast`` is more robust on rough textures:
    it compares averages of the surroundings, where Poisson editing trusts the pixels of one outline.

    Args:
        blend: ``poisson`` or ``contrast``.
        scales: Least and greatest scale.
        margin: Width of the blended border around the defect, in pixels, at least 4.
    """

    needs_defects: ClassVar[bool] = True

    def __init__(self, blend: Blend = "poisson", scales: tuple[float, float] = (0.7, 1.3), margin: int = 6) -> None:
        check_range(LEAST_MARGIN, margin=margin)
        low, high = scales
        if not 0.1 <= low <= high <= 1.5:
            msg = f"Argument `scales` has to be two ascending numbers from 0.1 to 1.5, but got {tuple(scales)}."
            raise ValueError(msg)
        self.blend = blend
        self.scales = (float(low), float(high))
        self.margin = margin

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Paste a defect into each image; see `Synthesizer.synthesize`."""
        return [self._synthesize(request) for request in requests]

    def _synthesize(self, request: Request) -> Synthesis:
        image, defect = request.image, request.defect
        if defect is None:
            msg = f"Request {request.index} has no real defect, which is needed. Take masks `real` or `moved`."
            raise ValueError(msg)
        rng = np.random.default_rng(request.seed)
        part = foreground(image)
        inner = self._without_border(part)
        motion = draw_motion(defect.mask, extent(inner), lambda: np.clip(rng.normal(1, 0.5), *self.scales), rng)
        mask, matrix = _place(defect, motion, inner, request.mask)
        result, blend = self._blended(image, defect, mask, matrix, part)
        details = {"pasted": defect.path, "motion": motion.description, "blend": blend}
        return Synthesis(result, mask & part if (mask & part).any() else mask, details)

    def _without_border(self, part: Mask) -> Mask:
        """The part without the image's border, which has no surroundings; if that is too small, the part or all."""
        inner = np.zeros_like(part)
        border = self.margin + 2
        inner[border:-border, border:-border] = part[border:-border, border:-border]
        rooms = (room for room in (inner, part) if room.any() and min(extent(room)) >= LEAST_SIDE)
        return next(rooms, np.ones_like(part))

    def _blended(self, image: Pixels, defect: Defect, mask: Mask, matrix: Levels, part: Mask) -> tuple[Pixels, str]:
        """Put the defect into the image; the result and how it was blended."""
        rows, columns = bounding_box(mask, WINDOW)
        target = image[rows, columns].astype(np.float32)
        inside = mask[rows, columns]
        source, seen = _warped(defect, matrix, rows, columns)
        distance = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # Beyond its own image's border, nothing is known of the defect's surroundings.
        alpha = np.clip(1 - distance / (self.margin + 1), 0, 1) * (seen | inside) * part[rows, columns]
        pasted = source + _brightness_shift(target - source, np.asarray(seen & (distance > 2)))
        how = "contrast"
        if self.blend == "poisson":
            region = np.asarray(distance <= self.margin)
            if region[[0, -1]].any() or region[:, [0, -1]].any():
                how = "contrast, as the defect touches the image's border"
            elif (region & ~seen).any():
                how = "contrast, as the defect touches the border of its own image"
            else:
                cloned = _poisson(source, target, region)
                changes = [float(np.abs(levels - target)[inside].mean()) for levels in (cloned, pasted)]
                if changes[0] < LOST * changes[1]:
                    how = "contrast, as Poisson editing left nothing visible"
                else:
                    pasted, how = cloned, "poisson"
        result = image.copy()
        blended = target + alpha[..., None] * (pasted - target)
        result[rows, columns] = np.clip(np.rint(blended), 0, 255).astype(np.uint8)
        return result, how


def _place(defect: Defect, motion: Motion, inner: Mask, wanted: Mask) -> tuple[Mask, Levels]:
    """Put the moved mask on the part, near to another one: `[H, W]`, and where its pixels are now, `[2, 3]`."""
    patch, matrix = move(defect.mask, motion)
    centre = np.array([(box.start + box.stop - 1) / 2 for box in bounding_box(wanted)])
    positions = best_positions(patch, inner)
    distances = ((positions - (centre - (np.array(patch.shape) - 1) / 2)) ** 2).sum(axis=1)
    position = positions[np.argmin(distances)]
    mask = paste_mask(patch, position, np.ones_like(inner))
    return mask, (matrix + np.c_[np.zeros((2, 2)), position]).astype(np.float32)


def _warped(defect: Defect, matrix: Levels, rows: slice, columns: slice) -> tuple[Levels, Mask]:
    """The defect's image in a window of the new image, float32, and which of its pixels its own image shows."""
    shifted = matrix - np.array([[0, 0, rows.start], [0, 0, columns.start]])
    affine = shifted[::-1][:, [1, 0, 2]]  # OpenCV counts (column, row)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    # No mirroring at the border: OpenCV 5 crashes on it where an image is less than four pixels wide.
    cubic = cv2.warpAffine(
        defect.image.astype(np.float32), affine, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    whole = np.ones(defect.mask.shape, dtype=np.float32)
    seen = cv2.warpAffine(whole, affine, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(np.clip(cubic, 0, 255), dtype=np.float32), np.asarray(seen > 0.99)


def _brightness_shift(difference: Levels, around: Mask) -> Levels:
    """How much brighter the new surroundings are than the old ones, `[H, W, 3]`: a local average, carried inwards."""
    if not around.any():
        return np.zeros_like(difference)
    thickness = cv2.distanceTransform((~around).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).max()
    width = max(6.0, 0.7 * float(thickness))  # the average at the defect's centre has to reach its surroundings
    weight = around.astype(np.float32)[..., None]
    total = cv2.GaussianBlur(weight, (0, 0), width)[..., None]
    average = cv2.GaussianBlur(difference * weight, (0, 0), width) / np.maximum(total, 1e-6)
    return np.asarray(average, dtype=np.float32)


def _poisson(source: Levels, target: Levels, region: Mask) -> Levels:
    """Poisson editing (Perez, Gangnet, Blake 2003): the source's gradients in the region, the target around it."""
    left, top, width, height = cv2.boundingRect(region.astype(np.uint8))
    centre = (left + width // 2, top + height // 2)  # where OpenCV puts the region's own centre
    patch, canvas = (np.rint(levels).astype(np.uint8) for levels in (source, target))
    cloned = cv2.seamlessClone(patch, canvas, region.astype(np.uint8) * 255, centre, cv2.NORMAL_CLONE)
    return np.asarray(cloned, dtype=np.float32)
