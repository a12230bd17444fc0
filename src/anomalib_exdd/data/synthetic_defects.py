"""Synthetic defects in the training data of any other data module.

Only training gets them: validation and test images are those of the base, so that thresholds and metrics are measured
on real images. For the same reason an image that was made from a validation or test image is left out. What a LoRA was
trained with is not in the manifest, and not checked.
"""

from __future__ import annotations

import logging
from collections import defaultdict
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
from anomalib_exdd.synthesis.manifest import REVIEW_NAME, SyntheticImage, read_synthetic

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
                does not fit its image; if the folder holds real images of the base.
        """
        tables = self.base.split_samples()
        if self.count == 0:
            return tables
        chosen = self._choose(self._usable(_BaseImages(tables)))
        logger.info("%s: %d synthetic defects of `%s` join the training.", self.name, len(chosen), self.synthetic_root)
        return {**tables, Split.TRAIN: _joined(tables[Split.TRAIN], chosen)}

    def _usable(self, base_images: _BaseImages) -> DataFrame:
        """Return samples of the accepted synthetic images that were made from training images."""
        accepted = DataFrame([_sample(image, base_images) for image in read_synthetic(self.synthetic_root)])
        if accepted.empty:
            raise ValueError(self._too_few(0))
        if copies := [path for path in accepted["image_path"] if base_images.find(path, moved=False)]:
            msg = (
                f"The image `{copies[0]}` in argument `synthetic_root` is already an image of {self.name} (and "
                f"{len(copies) - 1} others are). Name the folder that `anomalib synthesize` wrote."
            )
            raise ValueError(msg)
        if untraced := int(accepted["is_untraced"].sum()):
            logger.warning(
                "%d of %d synthetic images in `%s` were made from images that %s does not have, or it is not recorded "
                "from which. That these are none of the validation or test images cannot be checked.",
                *(untraced, len(accepted), self.synthetic_root, self.name),
            )
        usable = accepted[~accepted["is_leak"]]
        if len(usable) < len(accepted):
            msg = (
                f"{len(accepted) - len(usable)} of {len(accepted)} synthetic images in `{self.synthetic_root}` were "
                f"made from validation or test images of {self.name} and are left out. Synthesize with the settings of "
                f"`base`: `seed` ({self.base.seed}), `val_split_ratio` ({self.base.val_split_ratio:g}) and "
                f"`num_defects` ({self.base.num_defects})."
            )
            if usable.empty:
                raise ValueError(msg)
            logger.warning("%s", msg)
        return usable.drop(columns=["is_leak", "is_untraced"])

    def _choose(self, usable: DataFrame) -> DataFrame:
        """Draw as many as are wanted, and check their masks."""
        count = len(usable) if self.count is None else self.count
        if count > len(usable):
            raise ValueError(self._too_few(len(usable)))
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

    def _too_few(self, usable: int) -> str:
        images = read_synthetic(self.synthetic_root, with_rejected=True)
        wanted = "at least one is needed" if self.count is None else f"argument `count` asks for {self.count}"
        return (
            f"The folder `{self.synthetic_root}` has {usable} usable synthetic images, but {wanted}: the others of "
            f"{len(images)} show no defect, are rejected by the review, or were made from validation or test images. "
            "Synthesize more, or lower `count`."
        )


class _BaseImages:
    """The images of the base, as rows of its tables, found by the paths in the manifest of a synthetic folder."""

    def __init__(self, tables: dict[Split, DataFrame]) -> None:
        self._by_path: dict[Path, Any] = {}
        self._real_by_name: defaultdict[tuple[str, ...], list[Any]] = defaultdict(list)
        for row in pd.concat([with_optional_columns(table) for table in tables.values()]).itertuples():
            self._by_path[Path(row.image_path).resolve()] = row
            if not row.is_synthetic:
                self._real_by_name[_name(row.image_path)].append(row)

    def find(self, path: str, *, moved: bool = True) -> Any:
        """Return the image of a path, or the only one whose file and folder have the same names if it may be moved."""
        if (found := self._by_path.get(Path(path).resolve())) or not moved:
            return found
        namesakes = self._real_by_name[_name(path)]
        return namesakes[0] if len(namesakes) == 1 else None


def _sample(image: SyntheticImage, base_images: _BaseImages) -> dict[str, Any]:
    """Return the sample of a synthetic image, and whether a source is no training image of the base or unknown."""
    record = image.record
    sources = [str(path) for path in (record.source, record.defect) if path] if record else []
    found = [base_images.find(source) for source in sources]
    kinds = [known.kind for known in found if known] + ([str(record.details.get("kind", ""))] if record else [])
    return {
        "image_path": str(image.image_path),
        "mask_path": str(image.mask_path),
        "label_index": int(LabelName.ABNORMAL),
        "split": Split.TRAIN.value,
        "origins": tuple(known.image_path if known else source for known, source in zip(found, sources, strict=True))
        or (str(image.image_path),),  # none would make it a real image
        "kind": next(filter(None, kinds), ""),
        "is_leak": any(known is not None and known.split != Split.TRAIN for known in found),
        "is_untraced": not found or None in found,
    }


def _joined(train: DataFrame, synthetic: DataFrame) -> DataFrame:
    """Append samples of synthetic images to a training table, whose own rows stay first and unchanged."""
    if without := int(((train["label_index"] == LabelName.ABNORMAL) & (train["mask_path"] == "")).sum()):
        logger.warning(
            "%d real defective training images have no masks, but synthetic ones have: batches get an all-black mask "
            "for the real ones. ExDD does not look at those with `--model.positive_patches farthest`.",
            without,
        )
    joined = pd.concat([with_optional_columns(train), with_optional_columns(synthetic)], ignore_index=True)
    joined.attrs["task"] = TaskType.SEGMENTATION.value
    return joined


def _name(path: str) -> tuple[str, ...]:
    """Name of a file and of its folder, from either kind of machine."""
    return tuple(path.replace("\\", "/").split("/")[-2:])
