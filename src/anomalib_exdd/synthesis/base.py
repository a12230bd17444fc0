"""What all synthesizers have in common: a normal image, a mask and a prompt go in; an image with a defect comes out.

Images are `[H, W, 3]`, RGB, uint8; masks are `[H, W]`, bool, True on the defect.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Levels = NDArray[np.float32]


@dataclass(frozen=True)
class Defect:
    """A real defect: image, `[H, W, 3]`, mask, `[H, W]`, file of the image, and kind; empty if not known."""

    image: Pixels
    mask: Mask
    path: str
    kind: str = ""


@dataclass(frozen=True)
class Request:
    """One image to make. Its result depends on nothing else, not on the requests beside it."""

    index: int  # number of the image in the run
    seed: int  # of everything random about it
    image: Pixels  # the normal image, `[H, W, 3]`
    mask: Mask  # where to draw the defect, `[H, W]`
    prompt: str = ""  # the defect in words, for synthesizers that read a prompt
    defect: Defect | None = None  # the real defect that the mask was made from, if any
    source: str = ""  # file of the normal image
    placement: str = ""  # where the mask comes from, in words


@dataclass(frozen=True)
class Synthesis:
    """The result of a request."""

    image: Pixels  # the image with a defect, `[H, W, 3]`
    mask: Mask  # where it may have changed, `[H, W]`: that of the request, unless the synthesizer places its defects
    details: dict[str, Any] = field(default_factory=dict)  # further entries for the manifest


class Synthesizer(ABC):
    """Draws defects into normal images.

    Constructors keep each argument in an attribute of the same name; models are loaded with the first request.
    """

    needs_defects: ClassVar[bool] = False  # whether real defects are required
    device: str = "cpu"  # where models run: to be set before the first request

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the images depend on besides the requests, as plain values: kept in the manifest."""
        return dict(as_plain({name: getattr(self, name) for name in signature(type(self)).parameters}))

    def prepare(self, defects: Sequence[Defect], normals: Sequence[Pixels]) -> None:
        """Learn from real defects and normal images, before the first request. Does nothing by default."""
        del defects, normals

    @abstractmethod
    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Draw a defect into the image of each request; there is one result for each.

        Raises:
            ValueError: If a request is not usable: an empty mask, a mask of another size, an image too small.
        """


def check_mask(image: Pixels, mask: Mask, which: str = "") -> None:
    """Raise a ValueError unless an image is `[H, W, 3]`, uint8, and its mask `[H, W]`, bool, and not empty."""
    if image.dtype != np.uint8 or mask.dtype != np.bool_ or image.shape != (*mask.shape, 3):
        found = f"{list(image.shape)} of {image.dtype} and {list(mask.shape)} of {mask.dtype}"
        msg = f"Image and mask{which} have to be [H, W, 3] of uint8 and [H, W] of bool, but are {found}."
        raise ValueError(msg)
    if not mask.any():
        msg = f"The mask{which} is empty: there is no place for a defect. Leave it out."
        raise ValueError(msg)


def check_range(low: float, high: float = math.inf, **arguments: float) -> None:
    """Raise a ValueError unless all arguments lie between two numbers."""
    for name, value in arguments.items():
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            msg = f"Argument `{name}` has to be {limits}, but got {value}."
            raise ValueError(msg)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise a ValueError if prompts are one text, whose letters would be taken for prompts, or one of them is empty."""
    if isinstance(prompts, str) or not all(prompt.strip() for prompt in prompts):
        msg = f"Argument `prompts` has to be a list of descriptions, none of them empty, but got {prompts!r}."
        raise ValueError(msg)


def bounding_box(mask: Mask, margin: int = 0) -> tuple[slice, slice]:
    """Return rows and columns of the smallest box around a mask that is not empty, and of a margin within the image."""
    spans = zip(find_objects(mask.view(np.uint8))[0], mask.shape, strict=True)
    rows, columns = (slice(max(span.start - margin, 0), min(span.stop + margin, size)) for span, size in spans)
    return rows, columns


def as_plain(value: Any) -> Any:
    """Return a nested value as JSON gives it back: tuples become lists, numbers that are not finite become None.

    Synthesizers become their name and their settings.
    """

    def builtin(entry: Any) -> Any:
        if isinstance(entry, Synthesizer):
            return {"synthesizer": type(entry).__name__, **entry.settings}
        return entry.as_posix() if isinstance(entry, Path) else entry.tolist()  # of NumPy

    return json.loads(json.dumps(value, default=builtin), parse_constant=lambda _: None)
