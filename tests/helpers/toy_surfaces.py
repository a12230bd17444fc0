"""A folder in KSDD2's layout that a small network learns in seconds: bright squares on noise."""

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 64, 48
TOY = {"backbone": "test_resnet", "pre_trained": False, "image_size": (HEIGHT, WIDTH), "preset": "diag"}
"""Arguments of a classifier for it; more are needed to learn it well."""


def write_toy(root: Path, train: tuple[int, int] = (20, 16), test: tuple[int, int] = (8, 8)) -> Path:
    """Write so many normal and defective images; square and place differ from image to image."""
    for split, first, (normal, defective) in (("train", 10000, train), ("test", 20000, test)):
        (root / split).mkdir(parents=True)
        for number in range(normal + defective):
            rng = np.random.default_rng((first, number))
            image = rng.normal(100, 10, (HEIGHT, WIDTH))
            mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            if number >= normal:
                top, left, side = rng.integers(4, 44), rng.integers(4, 28), rng.integers(10, 16)
                mask[top : top + side, left : left + side] = 255
                image[mask > 0] += 90
            shown = np.clip(image, 0, 255).astype(np.uint8)
            Image.fromarray(np.stack([shown] * 3, axis=-1)).save(root / split / f"{first + number}.png")
            Image.fromarray(mask).save(root / split / f"{first + number}_GT.png")
    return root
