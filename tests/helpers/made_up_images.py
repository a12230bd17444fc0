"""Writing tiny images and masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

SIZE = (12, 8)  # height, width


def save_image(path: Path, size: tuple[int, int] = SIZE, level: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, dtype=np.uint8)).save(path)
    return path


def save_mask(path: Path, *, defect: bool, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, dtype=np.uint8)
    if defect:
        mask[size[0] // 2, 1:3] = 255
    Image.fromarray(mask).save(path)
    return path


def invert(path: Path) -> Path:
    """Swap black and white of a mask."""
    with Image.open(path) as mask:
        inverted = ImageChops.invert(mask)
    inverted.save(path)
    return path


def save_pairs(folder: Path, first_id: int, labels: Sequence[bool]) -> list[str]:
    """Write NNNNN.png and NNNNN_GT.png for every label, and return the ids."""
    ids = [f"{first_id + number:05d}" for number in range(len(labels))]
    for image_id, defect in zip(ids, labels, strict=True):
        save_image(folder / f"{image_id}.png", level=40 + int(image_id) % 100)
        save_mask(folder / f"{image_id}_GT.png", defect=defect)
    return ids


def labels_of(normal: int, defective: int) -> list[bool]:
    """Labels in which the defective images are spread among the normal ones."""
    labels = [True] * defective + [False] * normal
    order = np.random.default_rng(0).permutation(len(labels))
    return [labels[position] for position in order]
