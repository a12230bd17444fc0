"""The data module of the generated sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anomalib_exdd.images.reading import WHITE_LEVEL

from .ksdd2 import KSDD2
from .sample import generate_sample


class SurfaceSample(KSDD2):
    """A small generated data set that needs no download: brushed surfaces with scratches, spots and marks.

    It is generated at ``root`` when it is not there yet (some seconds, about 20 MB): 60 normal and 20 defective
    training images, 24 normal and 24 defective test images, with masks and the kinds of the defects, in KSDD2's layout
    and in sizes like its own.
    It shows that everything works; measure on real images.

    Args:
        root: Folder of the sample. Generated if absent or empty.
        **kwargs: Further arguments of :class:`.DefectDataModule`: ``num_defects``, ``val_split_ratio``, ``seed`` (the
            images are always the same), and those of the loaders.
    """

    def __init__(self, root: str | Path = "./datasets/exdd_sample", **kwargs: Any) -> None:
        super().__init__(root, official_split=None, white_level=WHITE_LEVEL, **kwargs)

    def prepare_data(self) -> None:
        """Generate the sample if the root does not exist or is empty."""
        generate_sample(self.root)
