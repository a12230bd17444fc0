"""Synthetic defects in the training data of any other data module.

Only training gets them, so that thresholds and metrics are measured on real images. What a LoRA was trained with is not
in the manifest, and not checked.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pandas as pd
from anomalib import TaskType
from anomalib.data import get_datamodule
from anomalib.data.utils import LabelName, Split
from omegaconf import DictConfig
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.masks import inspect_masks
from anomalib_exdd.synthesis.manifest import REVIEW_NAME, read_synthetic

from .base import DefectDataModule
from .dataset import with_optional_columns
from .splits import draw, key_of

logger = logging.getLogger(__name__)


class SyntheticDefects(DefectDataModule):
    """Synthetic defects added to the training images of another data module.

    Validation and test images are those of ``base``, without a synthetic one. Synthetic images that were made from a
    validation or test image are left out, with a warning. Models can tell synthetic images from real ones: ExDD trusts
    them less (``--model.synthetic_weight``). They are of the kind of the real defect that they were made from.

    Args:
        base: Data module of the real images, such as ``KSDD2`` or ``DefectFolder``.
        synthetic_root: Folder written by ``anomalib synthesize``, with your review in it, or any other folder with
            images ``train/NNNNN.png`` and masks ``train/NNNNN_GT.png``.
        count: Use this many of the synthetic images, drawn with ``seed``; a small draw is contained in a larger one.
            Default: all that are accepted. 0 leaves the real images only.
        seed: Seed of this draw; that of the validation images is given to ``base``.
        train_batch_size: Images per training batch. Default of this and of all that follow: the setting of ``base``.
        eval_batch_size: Images per validation or test batch.
        num_workers: Processes that read images.
        train_augmentations: Transforms of training images.
        val_augmentations: Transforms of validation images.
        test_augmentations: Transforms of test images.
        augmentations: Transforms of all images for which none of the three above is given.

    Example:
        >>> from anomalib_exdd.data import KSDD2
        >>> from anomalib_exdd.data.synthetic_defects import SyntheticDefects
        >>> data = SyntheticDefects(KSDD2("./datasets/KSDD2", num_defects=5), "./synthetic", count=100)
        >>> data.name
        'KSDD2'
    """

    def __init__(
        self,
        base: DefectDataModule,
        synthetic_root: str | Path,
        count: int | None = None,
        seed: int = 0,
        train_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
    ) -> None:
        described: Any = base
        if isinstance(described, Mapping):  # from `anomalib benchmark`, which resolves the outermost class only
            base = cast("DefectDataModule", get_datamodule(DictConfig(described)))
        if not isinstance(base, DefectDataModule):
            msg = f"Argument `base` has to be a data module of anomalib-exdd like KSDD2, but got {type(base).__name__}."
            raise TypeError(msg)
        if count is not None and count < 0:
            msg = f"Argument `count` has to be at least 0, but got {count}."
            raise ValueError(msg)
        of_loaders = {
            "train_batch_size": train_batch_size,
            "eval_batch_size": eval_batch_size,
            "num_workers": num_workers,
            "train_augmentations": train_augmentations or augmentations,
            "val_augmentations": val_augmentations or augmentations,
            "test_augmentations": test_augmentations or augmentations,
        }
        for name, value in of_loaders.items():
            if value is not None:
                setattr(base, name, value)
        super().__init__(
            base.root,
            num_defects=base.num_defects,
            val_split_ratio=base.val_split_ratio,
            seed=seed,
            white_level=base.white_level,
            **{name: getattr(base, name) for name in of_loaders},
        )
        self.category = base.category
        self.base = base
        self.synthetic_root = Path(synthetic_root)
        self.count = count

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the base: results of the same data lie side by side."""
        return str(self.base.name)

    def prepare_data(self) -> None:
        """Download or generate the base's images where they are missing."""
        self.base.prepare_data()

    def read_samples(self) -> DataFrame:
        """Read the table of the real images, as the base does."""
        return self.base.read_samples()

    def split_samples(self) -> dict[Split, DataFrame]:
        """Split the real images as the base does, and add rows of synthetic ones to the training table.

        Raises:
            FileNotFoundError: If the synthetic folder or one of its files is missing.
            ValueError: If there are fewer usable synthetic images than ``count``, or none; if a mask is all black or
                does not fit its image; if an image is the base's already.
        """
        tables = self.base.split_samples()
        if self.count == 0:
            return tables
        chosen = self._choose(self._usable(_by_path(tables)))
        logger.info("%s: %d synthetic defects of `%s` join the training.", self.name, len(chosen), self.synthetic_root)
        train = tables[Split.TRAIN]
        if without := int(((train["label_index"] == LabelName.ABNORMAL) & (train["mask_path"] == "")).sum()):
            logger.warning(
                "%d real defective training images have no masks, and get all-black ones because synthetic ones have "
                "some. ExDD does not look at them with `--model.positive_patches farthest`.",
                without,
            )
        # The real images stay first and unchanged.
        joined = pd.concat([with_optional_columns(train), with_optional_columns(chosen)], ignore_index=True)
        joined.attrs["task"] = TaskType.SEGMENTATION.value
        return {**tables, Split.TRAIN: joined}

    def _usable(self, rows: Mapping[str, Any]) -> DataFrame:
        """Return samples of the accepted synthetic images that were made from training images (by rows of the base)."""
        samples: list[dict[str, Any]] = []
        leaks = untraced = 0
        accepted = read_synthetic(self.synthetic_root)
        for image in accepted:
            if str(image.image_path.resolve()) in rows:
                msg = f"`{image.image_path}` in argument `synthetic_root` is already an image of {self.name}."
                raise ValueError(msg)
            record = image.record
            sources = [str(source) for source in (record.source, record.defect) if source] if record else []
            found = [rows.get(str(Path(source).resolve())) or rows.get(_name(source)) for source in sources]
            kinds = [known.kind for known in found if known] + ([record.details.get("kind", "")] if record else [])
            untraced += not found or None in found
            if any(known and known.split != Split.TRAIN for known in found):
                leaks += 1
                continue
            origins = [known.image_path if known else source for known, source in zip(found, sources, strict=True)]
            samples.append(
                {
                    "image_path": str(image.image_path),
                    "mask_path": str(image.mask_path),
                    "label_index": int(LabelName.ABNORMAL),
                    "split": Split.TRAIN.value,
                    "origins": tuple(origins) or (str(image.image_path),),  # none would make it a real image
                    "kind": next((str(kind) for kind in kinds if kind), ""),
                }
            )
        if untraced:
            logger.warning(
                "%d of %d synthetic images in `%s` were made from images that %s does not have, or it is not recorded "
                "from which. That these are none of the validation or test images cannot be checked.",
                *(untraced, len(accepted), self.synthetic_root, self.name),
            )
        if leaks:
            logger.warning(
                "%d of %d synthetic images in `%s` were made from validation or test images of %s and are left out. "
                "Synthesize with the settings of `base`: `seed` (%d), `val_split_ratio` (%g) and `num_defects` (%s).",
                *(leaks, len(accepted), self.synthetic_root, self.name),
                *(self.base.seed, self.base.val_split_ratio, self.base.num_defects),
            )
        return DataFrame(samples)

    def _choose(self, usable: DataFrame) -> DataFrame:
        """Draw as many as are wanted, and check their masks."""
        count = len(usable) if self.count is None else self.count
        if count > len(usable) or usable.empty:
            images = read_synthetic(self.synthetic_root, with_rejected=True)
            wanted = "at least one is needed" if self.count is None else f"argument `count` asks for {self.count}"
            msg = (
                f"The folder `{self.synthetic_root}` has {len(usable)} usable synthetic images, but {wanted}: the "
                f"others of {len(images)} show no defect, are rejected by the review, or were made from validation or "
                "test images. Synthesize more, or lower `count`."
            )
            raise ValueError(msg)
        keys = [key_of(path, self.synthetic_root) for path in usable["image_path"]]
        chosen = usable.iloc[draw(keys, count, seed=int(self.seed or 0), purpose="synthetic")]
        found = inspect_masks(list(zip(chosen["image_path"], chosen["mask_path"], strict=True)))
        if black := [mask for mask, has_defect in zip(chosen["mask_path"], found, strict=True) if not has_defect]:
            msg = (
                f"The mask `{black[0]}` of a synthetic defect is all black or transparent. Correct it, or reject the "
                f"image in `{self.synthetic_root / REVIEW_NAME}`."
            )
            raise ValueError(msg)
        return chosen


def _by_path(tables: Mapping[Split, DataFrame]) -> dict[str, Any]:
    """Find rows of tables by the resolved path of their image, and by its :func:`_name` if no other real one has it."""
    rows = list(pd.concat([with_optional_columns(table) for table in tables.values()]).itertuples())
    real = [(_name(row.image_path), row) for row in rows if not row.is_synthetic]
    names = Counter(name for name, _ in real)
    by_name = {name: row for name, row in real if names[name] == 1}
    return by_name | {str(Path(row.image_path).resolve()): row for row in rows}


def _name(path: str) -> str:
    """Name of a file and of its folder, from either kind of machine: the data may have moved since."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])
