"""The data module of the made-up sample."""

from __future__ import annotations

from pathlib import Path

from torchvision.transforms.v2 import Transform

from .ksdd2 import KSDD2
from .surfaces import generate_sample


class SurfaceSample(KSDD2):
    """A small made-up data set that needs no download: brushed surfaces with scratches, spots and marks.

    It is generated at ``root`` when it is not there yet (some seconds, about 20 MB): 60 normal and 20 defective
    training images, 24 normal and 24 defective test images, with masks and the kinds of the defects, in KSDD2's layout
    and in sizes like its own.
    It shows that everything works; measure on real images.

    Args:
        root: Folder of the sample. Generated if absent or empty.
        num_defects: Use this many of the 20 defective training images, drawn with ``seed``; a small draw is contained
            in a larger one. Default: all. 0 leaves normal images only.
        val_split_ratio: Share of the training images kept aside as validation images. Default: none, because ExDD finds
            its thresholds on its training images. Give 0.2 for other models, and for ExDD with another ``scoring`` than
            "calibrated": they find threshold and normalisation, and DefectClassifier its best epoch, on validation
            images. If that means fewer than 3 defective images, all of those stay in training.
        seed: Seed of the draws. The images are always the same.
        train_batch_size: Images per training batch.
        eval_batch_size: Images per validation or test batch.
        num_workers: Processes that read images.
        train_augmentations: Transforms applied to training images and their masks.
        val_augmentations: Transforms applied to validation images and their masks.
        test_augmentations: Transforms applied to test images and their masks.
        augmentations: Transforms for every stage that has none of its own.
    """

    def __init__(
        self,
        root: str | Path = "./datasets/exdd_sample",
        num_defects: int | None = None,
        val_split_ratio: float = 0.0,
        seed: int = 0,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 4,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(
            root=root,
            num_defects=num_defects,
            val_split_ratio=val_split_ratio,
            seed=seed,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
        )

    def prepare_data(self) -> None:
        """Generate the sample if the root does not exist or is empty."""
        generate_sample(self.root)
