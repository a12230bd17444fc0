"""What is wanted of a synthesis, and whether it can be had."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from .base import Synthesizer
from .change_detection import MaskMode
from .material import Material
from .placement import MaskSource
from .run_folder import MAX_COUNT


@dataclass(frozen=True)
class RunSettings:
    """What is wanted, besides the synthesizer's own settings.

    Attributes:
        count: How many images.
        seed: Seed of everything random.
        masks: Where defects are placed: see :data:`.MaskSource`.
        prompts: Defects in words, one is drawn for each image; empty: the synthesizer's own.
        mask_mode: What the mask of a synthetic image shows: see :data:`.MaskMode`.
        min_change: Grey levels by which the image has to change visibly, see :func:`.measure_change`; 0 accepts all.
        retries: How often an image without a visible change is made again, before it is rejected.
    """

    count: int
    seed: int = 0
    masks: MaskSource = "auto"
    prompts: Sequence[str] = ()
    mask_mode: MaskMode = "intersection"
    min_change: float = 8.0
    retries: int = 3

    def __post_init__(self) -> None:
        """Refuse settings without a meaning.

        Raises:
            ValueError: If one has none.
        """
        for name, value, low, high in (
            ("count", self.count, 1, MAX_COUNT),
            ("seed", self.seed, 0, None),
            ("min_change", self.min_change, 0, 255),
            ("retries", self.retries, 0, None),
        ):
            if not low <= value <= (math.inf if high is None else high):
                limits = f"at least {low}" if high is None else f"between {low} and {high}"
                msg = f"Argument `{name}` has to be {limits}, but got {value}."
                raise ValueError(msg)
        for name, word, known in (("masks", self.masks, MaskSource), ("mask_mode", self.mask_mode, MaskMode)):
            if word not in get_args(known):
                msg = f"Argument `{name}` has to be one of {list(get_args(known))}, but got {word!r}."
                raise ValueError(msg)
        if isinstance(self.prompts, str) or not all(prompt.strip() for prompt in self.prompts):
            msg = f"Argument `prompts` has to be a list of texts that are not empty, but got {self.prompts!r}."
            raise ValueError(msg)


def check_material(material: Material, synthesizer: Synthesizer, settings: RunSettings) -> None:
    """Refuse material that cannot lead to an image.

    Raises:
        ValueError: If there are no normal images, or no real defects where they are needed.
    """
    name = type(synthesizer).__name__
    if not material.normals:
        msg = "There are no normal images to draw defects into. Give data with normal training images."
        raise ValueError(msg)
    if synthesizer.needs_defects and settings.masks == "drawn":
        msg = f"{name} works with real defects, which masks of the source 'drawn' have not. Use 'moved' or 'real'."
        raise ValueError(msg)
    if material.defects:
        return
    if synthesizer.needs_defects:
        msg = (
            f"{name} works with real defects, but the training images have no defective one with a mask. Give some, "
            "or use PerlinSynthesizer or DiagSynthesizer, which do without."
        )
        raise ValueError(msg)
    if settings.masks in {"real", "moved"}:
        msg = (
            f"Argument `masks` is {settings.masks!r}, but the training images have no defective one with a mask. Give "
            "some, or use 'drawn'."
        )
        raise ValueError(msg)
