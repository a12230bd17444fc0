"""The shared base of the data modules: one table of samples becomes training, validation and test data.

Unlike in Anomalib's base class, the test data stay as they are, and validation images, where any are wanted, are drawn
from the training images, normal and defective ones separately.
"""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from anomalib.utils.attrs import get_nested_attr
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from pandas import DataFrame
from torch import distributed
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.reading import WHITE_LEVEL, warn_of_unused_range

from .dataset import DefectDataset, task_of
from .splits import MIN_VALIDATION_DEFECTS, draw, key_of, validation_counts

logger = logging.getLogger(__name__)


class DefectDataModule(AnomalibDataModule):  # type: ignore[misc]
    """Data module whose training images may be defective, with masks.

    A subclass reads its files into one table (:meth:`read_samples`); everything after that is decided here, by seeded
    draws that depend on neither the place of the root nor the order of its listing.

    Args:
        root: Folder of the data set.
        num_defects: Use this many of the defective training images, drawn with ``seed``; a small draw is contained in
            a larger one. Default: all. 0 leaves normal images only.
        val_split_ratio: Share of the training images kept aside as validation images. Default: none, because ExDD finds
            its thresholds on its training images. Give 0.2 for other models, and for ExDD with another ``scoring`` than
            "calibrated": they find threshold and normalisation, and DefectClassifier its best epoch, on validation
            images. If that means fewer than 3 defective images, all of those stay in training.
        seed: Seed of the draws.
        train_batch_size: Images per training batch.
        eval_batch_size: Images per validation or test batch.
        num_workers: Processes that read images.
        train_augmentations: Transforms applied to training images and their masks.
        val_augmentations: Transforms applied to validation images and their masks.
        test_augmentations: Transforms applied to test images and their masks.
        augmentations: Transforms for every stage that has none of its own.
        white_level: The number that is white in images of more than 8 bits: 4095 for a camera of 12 bits whose images
            are files of 16. Checkpoints keep it, so that `predict` reads alike.
    """

    def __init__(
        self,
        root: str | Path,
        *,
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
        white_level: int = WHITE_LEVEL,
    ) -> None:
        for argument, value, is_valid, needed in (
            ("val_split_ratio", val_split_ratio, 0 <= val_split_ratio < 1, "at least 0 (none) and less than 1"),
            ("white_level", white_level, white_level >= 1, "positive (4095 for 12 bits)"),
            ("num_defects", num_defects, num_defects is None or num_defects >= 0, "at least 0"),
        ):
            if not is_valid:
                msg = f"Argument `{argument}` has to be {needed}, but got {value}."
                raise ValueError(msg)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=ValSplitMode.FROM_TRAIN if val_split_ratio else ValSplitMode.NONE,
            test_split_mode=TestSplitMode.FROM_DIR,
            seed=seed,
        )
        self.val_split_ratio = val_split_ratio  # the base would take 0 for a half
        self.root = Path(root)
        self.num_defects = num_defects
        self.white_level = white_level
        self._tables: dict[Split, DataFrame] | None = None

    @abstractmethod
    def read_samples(self) -> DataFrame:
        """Read the files of the data set.

        Returns:
            Table with the columns ``image_path``, ``mask_path`` (empty where there is none), ``label_index`` (0 normal,
            1 defective), ``split`` (``train`` or ``test``) and, where they are known, ``kind`` (of the defect).
        """

    def split_samples(self) -> dict[Split, DataFrame]:
        """Read the files and decide what each image is for.

        Returns:
            Table of the training, of the validation and of the test images, with the columns of :meth:`read_samples`
            and the task in ``attrs["task"]``.
        """
        samples = self.read_samples().reset_index(drop=True)
        train = samples[samples["split"] == Split.TRAIN.value]
        normal, defective = count_labels(train)
        if self.num_defects is not None:
            if self.num_defects > defective:
                msg = f"`num_defects` is {self.num_defects}, but there are only {defective} defective training images."
                raise ValueError(msg)
            _, drawn = self.move_images(train, (0, self.num_defects), "defects", Split.TRAIN)
            train = pd.concat([train[train["label_index"] == LabelName.NORMAL], drawn])
            defective = self.num_defects
        counts = validation_counts(normal, defective, self.val_split_ratio)
        if self.val_split_ratio and counts[1] == 0:
            logger.warning(
                "Validation gets normal images only, and the threshold comes from these alone: a share of %g of %d "
                "defective training images is less than %d. All stay in training.",
                *(self.val_split_ratio, defective, MIN_VALIDATION_DEFECTS),
            )
        train, val = self.move_images(train, counts, "validation", Split.VAL)
        task = task_of(pd.concat([train, val]))  # both alike, also where validation has no defective image
        train.attrs["task"] = val.attrs["task"] = task
        test = samples[samples["split"] == Split.TEST.value].copy()
        test.attrs["task"] = task_of(test)
        return {Split.TRAIN: train, Split.VAL: val, Split.TEST: test}

    def move_images(
        self, samples: DataFrame, counts: Sequence[int], purpose: str, split: Split
    ) -> tuple[DataFrame, DataFrame]:
        """Draw some normal and some defective images and move them to another split.

        Args:
            samples: Table to draw from; its index names every row once.
            counts: How many normal and how many defective images to draw.
            purpose: What the draw is for, see :func:`.draw`.
            split: Split of the drawn images.

        Returns:
            The table without the drawn images, and the drawn images.
        """
        drawn: list[Any] = []
        for label, count in zip((LabelName.NORMAL, LabelName.ABNORMAL), counts, strict=True):
            group = samples[samples["label_index"] == label]
            keys = [key_of(path, self.root) for path in group["image_path"]]
            positions = draw(keys, count, seed=int(self.seed or 0), purpose=f"{purpose} {label.name}")
            drawn += list(group.index[positions])
        return samples.drop(index=drawn), samples.loc[drawn].assign(split=split.value)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Load validation images, each of them once; an empty list where there are none."""
        if len(self.val_data):
            return without_repeats(super().val_dataloader())
        if get_nested_attr(self, "trainer.state.fn") == TrainerFn.VALIDATING:
            logger.warning(
                "%s: nothing is validated, because `val_split_ratio` is 0. Test instead, or give "
                "`--data.val_split_ratio 0.2`.",
                self.name,
            )
        # Lightning's way to skip validation, of which it warns all the same.
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader[Any]:
        """Load test images, each of them once."""
        return without_repeats(super().test_dataloader())

    def _setup(self, stage: str | None = None) -> None:
        if self._tables is None:  # files are read and images drawn once, not for every stage
            self._tables = self.split_samples()
            self._log_counts(self._tables)
            if stage == TrainerFn.FITTING and self._tables[Split.VAL].empty:
                logger.info(
                    "%s: no validation images (`val_split_ratio` 0). ExDD finds its thresholds on the training images; "
                    "other models then have none: for them, give `--data.val_split_ratio 0.2`.",
                    self.name,
                )
            warn_of_unused_range(list(pd.concat(self._tables.values())["image_path"]), self.white_level)
        self.train_data, self.val_data, self.test_data = (
            DefectDataset(self._tables[split], self.name, white_level=self.white_level)
            for split in (Split.TRAIN, Split.VAL, Split.TEST)
        )

    def _create_test_split(self) -> None:
        """Leave the test images as they are."""

    def _create_val_split(self) -> None:
        """Leave the validation images as they were drawn in :meth:`_setup`."""

    def _log_counts(self, tables: dict[Split, DataFrame]) -> None:
        parts = []
        for split, table in tables.items():
            normal, defective = count_labels(table)
            if split != Split.VAL or len(table):
                kinds = Counter(sorted(filter(None, table.get("kind", ())))).most_common()
                named = f" ({', '.join(f'{count} {kind}' for kind, count in kinds)})" if kinds else ""
                parts.append(f"{split.value} {normal} normal + {defective} defective{named}")
            if split == Split.TEST and not (normal and defective):
                missing = "defective" if normal else "normal"
                logger.warning("The test data have no %s images: AUROC and the like mean nothing.", missing)
        logger.info("%s: %s.", self.name, ", ".join(parts))
        if tables[Split.TEST].attrs["task"] != "segmentation":
            logger.info("%s: not every defective test image has a mask, so pixel metrics do not apply.", self.name)


def count_labels(samples: DataFrame) -> tuple[int, int]:
    """Count the normal and the defective images of a table."""
    normal = int((samples["label_index"] == LabelName.NORMAL).sum())
    return normal, len(samples) - normal


def without_repeats(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Split a loader's images between processes; Lightning repeats some, which then count twice in the metrics."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=UnrepeatedDistributedSampler(loader.dataset, shuffle=False),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
