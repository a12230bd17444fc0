"""What a LoRA is trained with: settings, by default those of In&Out (arXiv 2406.00501), and examples.

Examples are defects cut out with their surroundings, and normal images with hidden regions. They look as they do when
defects are drawn: a window around a mask, at the working size. The example at a position of the training depends on the
seed and the position alone, so that an interrupted training can go on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mode
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from anomalib_exdd.synthesis.base import Defect, Mask, Pixels, check_mask, check_range
from anomalib_exdd.synthesis.crops import Size, cut, cut_mask, window_around, working_size

ZERO_SHOT_NORMALS, PRIOR_NORMALS = 50, 200  # how many normal images In&Out learns from
ORDER, DRAWING = 0, 1  # what a stream of random numbers is for
MASK_EXTENT = (0.04, 0.30)  # half an axis of a hidden ellipse, as a share of the image's shorter side


@dataclass(frozen=True)
class LoraSettings:
    """Everything that a LoRA depends on besides the base model and the images.

    Attributes:
        instance_prompt: The surface in words; a rare word among them gets its meaning from the training.
        defect_prompts: The surface with a defect in words; images of defects are learned under one of them each time.
        class_prompt: What kind of thing the surface is. Normal images learned under it keep the model from forgetting.
        rank: Rank of the changes to linear layers.
        alpha: Their scale; they count `alpha / rank`.
        conv_rank: Rank of the changes to convolutions; 0 for none.
        conv_alpha: Their scale.
        learning_rate: Greatest step of AdamW.
        max_steps: Steps of the training.
        batch_size: Images per step, half of them of the class.
        min_snr: Limit of the signal-to-noise ratio in the weights of the noise levels (arXiv 2303.09556).
        prior_weight: Weight of the images of the class; 0 for none.
        restarts: How often the learning rate falls along a cosine to zero.
        clip_skip: Layer of the text encoder that is read, counted from the end. SDXL always reads the second.
        working_size: Size at which the model learns and draws; see `working_size`.
        crop_padding: Pixels of surroundings around a defect at least; at most twice as many.
        seed: Seed of the training.
    """

    instance_prompt: str
    defect_prompts: tuple[str, ...]
    class_prompt: str = "background"
    rank: int = 32
    alpha: float = 16
    conv_rank: int = 4
    conv_alpha: float = 1
    learning_rate: float = 1e-5
    max_steps: int = 1000
    batch_size: int = 12
    min_snr: float = 5.0
    prior_weight: float = 1.0
    restarts: int = 3
    clip_skip: int = 2
    working_size: int | tuple[int, int] | None = 512
    crop_padding: int = 32
    seed: int = 1234

    def __post_init__(self) -> None:
        """Check the ranges of the numbers."""
        check_range(1, rank=self.rank, max_steps=self.max_steps, batch_size=self.batch_size)
        check_range(1, restarts=self.restarts, clip_skip=self.clip_skip)
        check_range(0, conv_rank=self.conv_rank, prior_weight=self.prior_weight, seed=self.seed)


class Example(NamedTuple):
    """An image, `[h, w, 3]`, uint8, what is hidden of it, `[h, w]`, bool, its prompt, and the weight of its loss."""

    image: Pixels
    mask: Mask
    prompt: str
    weight: float


class Examples:
    """An endless sequence of examples, all of the commonest working size.

    With defects, every other one is a normal image under the class prompt (DreamBooth's prior preservation, with real
    images in place of generated ones). Without, normal images under the instance prompt are used alone (zero-shot). Of
    the normal images, 50 (zero-shot) or 200 (prior) are used, evenly spread. A ValueError refuses an empty mask.
    """

    def __init__(self, defects: Sequence[Defect], normals: Sequence[Pixels], settings: LoraSettings) -> None:
        wanted = (PRIOR_NORMALS if settings.prior_weight else 0) if defects else ZERO_SHOT_NORMALS
        chosen = np.linspace(0, len(normals) - 1, min(wanted, len(normals))).round().astype(int).tolist()
        self.defects, self.normals = list(defects), [normals[position] for position in chosen]
        self.settings = settings
        for defect in self.defects:
            check_mask(defect.image, defect.mask, f" of defect `{defect.path}`")
        shapes = [image.shape[:2] for image in [defect.image for defect in self.defects] or self.normals]
        self.size: Size = mode(working_size(shape, settings.working_size) for shape in shapes)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the defects with their masks, and of the normal images that are used."""
        defects = [array for defect in self.defects for array in (defect.image, defect.mask)]
        return {"defects": _digest(defects), "normals": _digest(self.normals)}

    def __getitem__(self, position: int) -> Example:
        """Return the example at a position of the training."""
        settings, padding = self.settings, self.settings.crop_padding
        rng = default_rng([settings.seed, DRAWING, position])
        turn = position // 2 if self.defects and self.normals else position
        if self.defects and not (self.normals and position % 2):
            defect = self.defects[self.order(turn, len(self.defects), kind=0)]
            image, mask, weight = defect.image, defect.mask, 1.0
            prompt = settings.defect_prompts[rng.integers(len(settings.defect_prompts))]
        else:
            image = self.normals[self.order(turn, len(self.normals), kind=int(bool(self.defects)))]
            mask = random_mask(rng, image.shape[:2])
            zero_shot, prior = (settings.instance_prompt, 1.0), (settings.class_prompt, settings.prior_weight)
            prompt, weight = prior if self.defects else zero_shot
        window = window_around(mask, int(rng.integers(padding, 2 * padding + 1)), self.size)
        hidden = cut_mask(mask, window, self.size, whole_cells=True)
        return Example(cut(image, window, self.size), hidden, prompt, weight)

    def order(self, number: int, count: int, kind: int) -> int:
        """Return which of `count` images is used at a turn: each once in random order, then each once again."""
        epoch, place = divmod(number, count)
        return int(default_rng([self.settings.seed, ORDER, kind, epoch]).permutation(count)[place])


def _digest(arrays: Sequence[NDArray[Any]]) -> str:
    return hashlib.sha256(b"".join(f"{array.shape}".encode() + array.tobytes() for array in arrays)).hexdigest()


def random_mask(rng: Generator, shape: tuple[int, ...]) -> Mask:
    """Return one to three tilted ellipses, some of them as thin as scratches; `[H, W]`, bool, never empty."""
    canvas = np.zeros(shape[:2], dtype=np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        axis = max(1, round(min(shape[:2]) * rng.uniform(*MASK_EXTENT)))
        thickness = max(1, round(axis * rng.uniform(0.1, 1.0)))
        centre = int(rng.integers(shape[1])), int(rng.integers(shape[0]))
        cv2.ellipse(canvas, centre, (axis, thickness), rng.uniform(0, 180), 0, 360, 1, cv2.FILLED)
    return canvas > 0
