"""Seeded draws from a set of images that do not depend on where the images lie or how they are listed.

Each image gets a rank from a hash of the seed, the purpose of the draw and its key (its path relative to the data's
root). A draw takes the images of the lowest ranks, so a small draw is contained in every larger one, and an image added
to the folder leaves the others' order alone.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

MIN_VALIDATION_DEFECTS = 3
MIN_TRAINING_NORMALS = 2


def draw(keys: Sequence[str], count: int, *, seed: int, purpose: str) -> list[int]:
    """Draw some of the keys, which are distinct, and return their positions in ascending order.

    Which keys are drawn does not depend on their order. Draws of different purposes are independent of each other.

    Example:
        >>> draw(["a", "b", "c", "d"], 2, seed=0, purpose="validation")
        [0, 3]
    """
    ranks = [hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest() for key in keys]
    return sorted(sorted(range(len(keys)), key=lambda position: (ranks[position], keys[position]))[:count])


def share(count: int, ratio: float) -> int:
    """Round a share of a number to the nearest whole, halves upwards.

    Example:
        >>> share(16, 0.2), share(12, 0.2), share(25, 0.1)
        (3, 2, 3)
    """
    return math.floor(count * ratio + 0.5)


def validation_counts(normal: int, defective: int, ratio: float) -> tuple[int, int]:
    """Decide how many normal and defective training images are kept aside for validation.

    ``ratio`` is the share that is wanted, from 0 (none) to less than 1. A threshold found from one or two defective
    images would be an accident of the draw, and those images are worth more in training: below
    :data:`MIN_VALIDATION_DEFECTS` none is kept aside.

    Raises:
        ValueError: If there are too few normal images.

    Example:
        >>> validation_counts(600, 100, 0.2), validation_counts(600, 10, 0.2), validation_counts(600, 100, 0)
        ((120, 20), (120, 0), (0, 0))
    """
    needed = MIN_TRAINING_NORMALS + (1 if ratio else 0)
    if normal < needed:
        purpose = "validate (`val_split_ratio`)" if ratio else "to set the threshold"
        msg = (
            f"There are {normal} normal training images, besides those held out for testing, but at least {needed} are "
            f"needed to train and {purpose} with. Add normal images."
        )
        raise ValueError(msg)
    if not ratio:
        return 0, 0
    normal_count = min(max(share(normal, ratio), 1), normal - MIN_TRAINING_NORMALS)
    defect_count = min(share(defective, ratio), defective - 1)
    return normal_count, defect_count if defect_count >= MIN_VALIDATION_DEFECTS else 0


def held_out_count(count: int, ratio: float) -> int:
    """Decide how many images of a label are held out for testing: a share, but at least one, and not all.

    Example:
        >>> held_out_count(10, 0.25), held_out_count(2, 0.2), held_out_count(1, 0.2)
        (3, 1, 0)
    """
    return min(max(share(count, ratio), 1), max(count - 1, 0))


def key_of(path: str | Path, root: str | Path) -> str:
    """Name a file independently of where its data set lies: its path relative to the root, with forward slashes."""
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:  # another drive of Windows: there is no way from the root to the file
        return Path(path).as_posix()
