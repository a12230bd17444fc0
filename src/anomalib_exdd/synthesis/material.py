"""The real images that a synthesis starts from: read when they are looked at, never all at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from .base import Defect, Mask, Pixels

Item = TypeVar("Item")


@dataclass(frozen=True)
class Material:
    """Normal images and real defects, by their files.

    How a file is read is given from outside, so that an image is the same here as in training.

    Attributes:
        normals: Files of normal images. Their order is part of what decides which image is drawn.
        defects: Files of real defective images, each with the file of its mask; may be empty.
        read_image: Reads an image, `[H, W, 3]`, RGB, uint8.
        read_mask: Reads a mask, `[H, W]`, bool.
        kinds: Kinds of the defects that are known, by the file of the image.
    """

    normals: Sequence[str]
    defects: Sequence[tuple[str, str]]
    read_image: Callable[[str], Pixels]
    read_mask: Callable[[str], Mask]
    kinds: Mapping[str, str] = field(default_factory=dict)

    def normal_images(self) -> Sequence[Pixels]:
        """Return the normal images as a sequence that reads an image whenever it is looked at."""
        return ReadLater(len(self.normals), lambda position: self.read_image(self.normals[position]))

    def real_defects(self) -> Sequence[Defect]:
        """Return the real defects as a sequence that reads a defect whenever it is looked at."""
        return ReadLater(len(self.defects), self._defect)

    def identity(self) -> dict[str, Any]:
        """Say in a few words which files these are.

        A file is known by its name, the name of its folder and its size: data may be moved as a whole.

        Raises:
            FileNotFoundError: If a file is missing.
        """
        return {
            "normals": len(self.normals),
            "normals_digest": _digest(self.normals),
            "defects": len(self.defects),
            "defects_digest": _digest([path for pair in self.defects for path in pair]),
        }

    def _defect(self, position: int) -> Defect:
        image_path, mask_path = self.defects[position]
        image, mask = self.read_image(image_path), self.read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            msg = (
                f"The mask `{mask_path}` has {mask.shape[1]} x {mask.shape[0]} pixels, but its image `{image_path}` "
                f"has {image.shape[1]} x {image.shape[0]}. Replace one of them."
            )
            raise ValueError(msg)
        return Defect(image, mask, image_path, self.kinds.get(image_path, ""))


class ReadLater(Sequence[Item], Generic[Item]):
    """A sequence whose items are read when they are looked at, and not kept.

    Args:
        length: Number of items.
        read: Reads the item at a position.
    """

    def __init__(self, length: int, read: Callable[[int], Item]) -> None:
        self._positions = range(length)
        self._read = read

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> "ReadLater[Item]": ...

    def __getitem__(self, index: int | slice) -> "Item | ReadLater[Item]":
        """Read one item, or select some without reading them."""
        if isinstance(index, slice):
            positions = self._positions[index]
            return ReadLater(len(positions), lambda position: self._read(positions[position]))
        return self._read(self._positions[index])


def _digest(paths: Sequence[str]) -> str:
    lines = [f"{'/'.join(Path(path).parts[-2:])} {Path(path).stat().st_size}" for path in paths]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]
