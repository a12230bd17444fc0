"""What all synthesizers have in common: a normal image, a place and words go in; an image with a defect comes out.

Images are `[H, W, 3]`, RGB, uint8; masks are `[H, W]`, bool, True on the defect.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Defect:
    """A real defect to learn from.

    Attributes:
        image: The defective image, `[H, W, 3]`.
        mask: Its mask, `[H, W]`.
        path: Where the image comes from.
        kind: Kind of the defect, such as "scratch"; empty if it is not known.
    """

    image: Pixels
    mask: Mask
    path: str
    kind: str = ""


@dataclass(frozen=True)
class Request:
    """One image that is wanted. It decides its result alone: nothing depends on the requests beside it.

    Attributes:
        index: Number of the image among all that are wanted.
        seed: Seed of everything that is random about it.
        image: The normal image, `[H, W, 3]`.
        mask: Where the defect is to be, `[H, W]`.
        prompt: The defect in words; synthesizers that do not read ignore it.
        defect: The real defect that the mask was made from, None if it was made up.
    """

    index: int
    seed: int
    image: Pixels
    mask: Mask
    prompt: str = ""
    defect: Defect | None = None


@dataclass(frozen=True)
class Synthesis:
    """What came out.

    Attributes:
        image: The image with a defect, of the size of the request's, `[H, W, 3]`.
        mask: Where the synthesizer may have changed it, `[H, W]`: the request's mask, or that of a synthesizer that
            places its defects itself.
        details: What the manifest has to say about this image besides.
    """

    image: Pixels
    mask: Mask
    details: dict[str, Any] = field(default_factory=dict)


class Synthesizer(ABC):
    """Draws defects into normal images.

    Constructors take plain settings and are quick; models are loaded when the first image is wanted.
    """

    needs_defects: ClassVar[bool] = False
    """Whether it can do nothing without real defects."""

    device: str = "cpu"
    """Where models run: set before the first image is wanted."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the images depend on besides the requests, as plain values: kept in the manifest."""

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        """Learn from real defects and normal images, before the first request; most synthesizers learn nothing."""
        del defects, normals

    @abstractmethod
    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Draw a defect into each image.

        Args:
            requests: What is wanted. They are worked on together where that is faster; results are those of one by one.

        Returns:
            One result for each of them.

        Raises:
            ValueError: If a request is not usable: an empty mask, a mask of another size, an image too small.
        """


def check(request: Request) -> None:
    """Refuse a request that would silently lead to nothing.

    Raises:
        ValueError: If image or mask have the wrong shape or type, or if the mask is empty.
    """
    image, mask = request.image, request.mask
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        msg = f"An image has to be [H, W, 3] of uint8, but got {list(image.shape)} of {image.dtype}."
        raise ValueError(msg)
    if mask.dtype != np.bool_ or mask.shape != image.shape[:2]:
        msg = f"A mask has to be {list(image.shape[:2])} of bool, but got {list(mask.shape)} of {mask.dtype}."
        raise ValueError(msg)
    if not mask.any():
        msg = "The mask is empty: there is no place for a defect."
        raise ValueError(msg)
