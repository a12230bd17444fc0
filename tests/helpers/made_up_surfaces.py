"""Tiny surfaces with dark spots, in KSDD2's layout."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (96, 64)  # height, width


def make_surfaces(
    folder: Path, train: tuple[int, int] = (12, 6), test: tuple[int, int] = (4, 4), seed: int = 0
) -> Path:
    """Write so many normal and defective training and test images, with masks."""
    for split, first, (normal, defective) in (("train", 10000, train), ("test", 20000, test)):
        (folder / split).mkdir(parents=True)
        for number in range(normal + defective):
            rng = np.random.default_rng((seed, first, number))
            image = np.clip(rng.normal(120, 8, (*SIZE, 3)), 0, 255).astype(np.uint8)
            mask = np.zeros(SIZE, dtype=np.uint8)
            if number >= normal:
                mask[40:52, 20 : 30 + number % 8] = 255
                image[mask > 0] = 30
            Image.fromarray(image).save(folder / split / f"{first + number}.png")
            Image.fromarray(mask).save(folder / split / f"{first + number}_GT.png")
    return folder
