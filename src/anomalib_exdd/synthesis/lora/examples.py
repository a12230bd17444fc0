"""What a LoRA learns from: defects cut out with their surroundings, and normal images with places hidden at random.

Examples look as they will when defects are drawn: a window around a mask, at the working size. Which one comes at which
position of the training depends on the seed and the position alone, so that a training can go on where it broke off.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from anomalib_exdd.synthesis.base import Defect, Mask, Pixels, Request, check
from anomalib_exdd.synthesis.crops import Size, cut, cut_mask, window_around, working_size

from .settings import PRIOR_NORMALS, ZERO_SHOT_NORMALS, LoraSettings

_ORDER, _DRAWING = 0, 1  # what a stream of random numbers is for
_MASK_EXTENT = (0.04, 0.30)  # of the image's shorter side, half an axis of what is hidden


class Example(NamedTuple):
    """One image to learn from.

    Attributes:
        image: `[h, w, 3]`, uint8.
        mask: What is hidden and has to be filled in, `[h, w]`, bool.
        prompt: What is there.
        weight: Weight of its loss.
    """

    image: Pixels
    mask: Mask
    prompt: str
    weight: float


class Examples:
    """An endless list of examples, all of one size.

    With defects, every other one is a normal image under the class prompt (DreamBooth's prior preservation, with real
    images in place of generated ones). Without, normal images under the instance prompt are all there is (zero-shot).

    Args:
        defects: Real defects.
        normals: Normal images, of which 50 (zero-shot) or 200 (prior) are used, evenly spread.
        settings: Settings of the training.

    Attributes:
        size: Size of all examples: the commonest working size.

    Raises:
        ValueError: If there is nothing to learn from, or an image or a mask is not usable.
    """

    def __init__(self, defects: Sequence[Defect], normals: Sequence[Pixels], settings: LoraSettings) -> None:
        if not defects and not normals:
            msg = "There is nothing to learn from: give defects, or normal images for zero-shot training."
            raise ValueError(msg)
        if defects and settings.prior_weight and not normals:
            msg = "Argument `prior_weight` needs normal images, but there are none. Give some, or set it to 0."
            raise ValueError(msg)
        wanted = PRIOR_NORMALS if defects else ZERO_SHOT_NORMALS
        if defects and not settings.prior_weight:
            wanted = 0
        chosen = np.linspace(0, len(normals) - 1, min(wanted, len(normals))).round().astype(int).tolist()
        self.defects, self.normals = list(defects), [normals[position] for position in chosen]
        self.settings = settings
        for defect in self.defects:
            _check(f"The defect `{defect.path}`", defect.image, defect.mask)
        for position, normal in zip(chosen, self.normals, strict=False):
            _check(f"Normal image {position}", normal, np.ones(normal.shape[:2], dtype=bool))
        shapes = [defect.mask.shape for defect in self.defects] or [normal.shape for normal in self.normals]
        sizes = Counter(working_size((shape[0], shape[1]), settings.working_size) for shape in shapes)
        self.size: Size = sizes.most_common(1)[0][0]

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the defects with their masks, and of the normal images that are used."""
        defects, normals = hashlib.sha256(), hashlib.sha256()
        for defect in self.defects:
            for array in (defect.image, defect.mask):
                defects.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        for normal in self.normals:
            normals.update(f"{normal.shape}".encode() + np.ascontiguousarray(normal).tobytes())
        return {"defects": defects.hexdigest(), "normals": normals.hexdigest()}

    def __getitem__(self, position: int) -> Example:
        """Return the example at a position of the training."""
        settings = self.settings
        rng = default_rng([settings.seed, _DRAWING, position])
        if not self.defects:
            image = self.normals[self._shuffled(position, len(self.normals), kind=0)]
            return self._window(rng, image, random_mask(rng, image.shape[:2]), settings.instance_prompt, 1.0)
        if self.normals and position % 2:
            image = self.normals[self._shuffled(position // 2, len(self.normals), kind=1)]
            mask = random_mask(rng, image.shape[:2])
            return self._window(rng, image, mask, settings.class_prompt, settings.prior_weight)
        number = position // 2 if self.normals else position
        defect = self.defects[self._shuffled(number, len(self.defects), kind=0)]
        prompt = settings.defect_prompts[rng.integers(len(settings.defect_prompts))]
        return self._window(rng, defect.image, defect.mask, prompt, 1.0)

    def _shuffled(self, number: int, count: int, kind: int) -> int:
        """Return which of some images comes when: each once, in random order, then each once again."""
        round_, place = divmod(number, count)
        return int(default_rng([self.settings.seed, _ORDER, kind, round_]).permutation(count)[place])

    def _window(self, rng: Generator, image: Pixels, mask: Mask, prompt: str, weight: float) -> Example:
        padding = self.settings.crop_padding
        window = window_around(mask, int(rng.integers(padding, 2 * padding + 1)), self.size)
        hidden = cut_mask(mask, window, self.size, whole_cells=True)
        return Example(cut(image, window, self.size), hidden, prompt, weight)


def random_mask(rng: Generator, shape: tuple[int, ...]) -> Mask:
    """Return one to three tilted ellipses, some of them as thin as scratches; `[H, W]`, bool, never empty."""
    canvas = np.zeros(shape[:2], dtype=np.uint8)
    shorter = min(shape[:2])
    for _ in range(int(rng.integers(1, 4))):
        axis = max(1, round(shorter * rng.uniform(*_MASK_EXTENT)))
        thickness = max(1, round(axis * rng.uniform(0.1, 1.0)))
        centre = int(rng.integers(shape[1])), int(rng.integers(shape[0]))
        cv2.ellipse(canvas, centre, (axis, thickness), rng.uniform(0, 180), 0, 360, 1, cv2.FILLED)
    return canvas > 0


def _check(name: str, image: Pixels, mask: Mask) -> None:
    try:
        check(Request(0, 0, image, mask))
    except ValueError as error:
        msg = f"{name} cannot be learned from. {error}"
        raise ValueError(msg) from error
