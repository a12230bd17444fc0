"""Synthetic defects in the training data of any other data module.

Only training gets them: validation and test images are those of the base, so that thresholds and metrics are measured
on real images. For the same reason an image that was made from a validation or test image is left out. What a LoRA has
learnt from is not in the manifest, and not looked at.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
from anomalib import TaskType
from anomalib.data import get_datamodule
from anomalib.data.utils import LabelName, Split
from omegaconf import DictConfig
from pandas import DataFrame
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.reading import inspect_pair, map_files, warn_of_inverted_masks
from anomalib_exdd.synthesis.manifest import REVIEW_NAME, SyntheticImage, read_synthetic

from .dataset import completed
from .defect_datamodule import DefectDataModule
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
            msg = (
                "Argument `base` has to be a data module of anomalib-exdd, such as KSDD2 or DefectFolder, but got "
                f"{type(base).__name__}."
            )
            raise TypeError(msg)
        if count is not None and count < 0:
            msg = f"Argument `count` has to be at least 0, but got {count}."
            raise ValueError(msg)
        given = {
            "train_batch_size": train_batch_size,
            "eval_batch_size": eval_batch_size,
            "num_workers": num_workers,
            "train_augmentations": train_augmentations or augmentations,
            "val_augmentations": val_augmentations or augmentations,
            "test_augmentations": test_augmentations or augmentations,
        }
        for name, value in given.items():
            if value is not None:
                setattr(base, name, value)
        super().__init__(
            base.root,
            num_defects=base.num_defects,
            val_split_ratio=base.val_split_ratio,
            seed=seed,
            **{name: getattr(base, name) for name in given},
            augmentations=None,
            white_level=base.white_level,
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
        """Split the real images as the base does, and add the synthetic ones to the training images.

        Returns:
            The base's tables; the training table has rows with ``origins`` besides, see :func:`.completed`.

        Raises:
            FileNotFoundError: If the synthetic folder or one of its files is missing.
            ValueError: If there are fewer usable synthetic images than ``count``, or none; if a mask is all black or
                does not fit its image; if the folder holds real images of the base.
        """
        tables = self.base.split_samples()
        if self.count == 0:
            return tables
        drawn = self._draw(self._usable(_RealImages(tables)))
        logger.info("%s: %d synthetic defects of `%s` join the training.", self.name, len(drawn), self.synthetic_root)
        return {**tables, Split.TRAIN: _joined(tables[Split.TRAIN], drawn)}

    def train_dataloader(self) -> DataLoader[Any]:
        """Load training images, real and synthetic ones."""
        if self.external_collate_fn is not None:  # a tiled ensemble builds batches of its own
            logger.warning("Batches are not built by this data module: models take synthetic defects for real ones.")
        return super().train_dataloader()

    def _usable(self, real: _RealImages) -> list[_Synthetic]:
        """List the accepted synthetic images that were made from training images."""
        accepted = [_traced(image, real) for image in read_synthetic(self.synthetic_root)]
        if copies := [image.path for image in accepted if real.find(image.path, moved=False)]:
            msg = (
                f"The image `{copies[0]}` in argument `synthetic_root` is already an image of {self.name} (and "
                f"{len(copies) - 1} others are). Name the folder that `anomalib synthesize` wrote."
            )
            raise ValueError(msg)
        if strangers := sum(image.is_stranger for image in accepted):
            logger.warning(
                "%d of %d synthetic images in `%s` were made from images that %s does not have, or nobody wrote down "
                "from which. That these are none of the validation or test images cannot be checked.",
                strangers,
                len(accepted),
                self.synthetic_root,
                self.name,
            )
        usable = [image for image in accepted if not image.leaks]
        if len(usable) < len(accepted):
            self._report_leaks(accepted, len(usable))
        return usable

    def _report_leaks(self, accepted: list[_Synthetic], usable: int) -> None:
        msg = (
            f"{len(accepted) - usable} of {len(accepted)} synthetic images in `{self.synthetic_root}` were made from "
            f"validation or test images of {self.name} and are left out. Synthesize with the settings of `base` that "
            f"you train with: `seed` ({self.base.seed}), `val_split_ratio` ({self.base.val_split_ratio:g}) and "
            f"`num_defects` ({self.base.num_defects})."
        )
        if not usable:
            raise ValueError(msg)
        logger.warning("%s", msg)

    def _draw(self, usable: list[_Synthetic]) -> list[_Synthetic]:
        """Draw as many as are wanted, and check their masks."""
        count = len(usable) if self.count is None else self.count
        if count > len(usable) or not usable:
            raise ValueError(self._too_few(len(usable)))
        keys = [key_of(image.path, self.synthetic_root) for image in usable]
        drawn = [usable[position] for position in draw(keys, count, seed=int(self.seed or 0), purpose="synthetic")]
        inspected = map_files(lambda image: inspect_pair(image.path, image.mask), drawn, "Reading the synthetic masks")
        pairs = list(zip(drawn, inspected, strict=True))
        warn_of_inverted_masks([image.mask for image, pair in pairs if pair.looks_inverted])
        for image, pair in pairs:
            if not pair.has_defect:
                msg = (
                    f"The mask `{image.mask}` of a synthetic defect is all black or transparent. Correct it, "
                    f"or reject the image in `{self.synthetic_root / REVIEW_NAME}`."
                )
                raise ValueError(msg)
        return drawn

    def _too_few(self, usable: int) -> str:
        images = read_synthetic(self.synthetic_root, with_rejected=True)
        accepted = sum(image.accepted for image in images)
        reviewed = sum(image.decision == "reject" for image in images)
        wanted = "at least one is needed" if self.count is None else f"argument `count` asks for {self.count}"
        return (
            f"The folder `{self.synthetic_root}` has {usable} usable synthetic images, but {wanted}. Of {len(images)} "
            f"images, {len(images) - accepted - reviewed} show no defect, {reviewed} are rejected by the review, and "
            f"{accepted - usable} were made from validation or test images. Synthesize more, or lower `count`."
        )


@dataclass(frozen=True)
class _Synthetic:
    """A synthetic image.

    Attributes:
        path: The image.
        mask: Its mask.
        origins: Paths of the images that it was made from, as the base's tables write them; its own if nobody knows.
        leaks: Whether one of them is a validation or test image.
        is_stranger: Whether one of them is unknown.
        kind: Kind of the real defect among them, from the base or else from the manifest; empty if neither tells.
    """

    path: str
    mask: str
    origins: tuple[str, ...]
    leaks: bool
    is_stranger: bool
    kind: str


class _RealImages:
    """The real images of the base, found by the paths that the manifest of a synthetic folder gives."""

    def __init__(self, tables: dict[Split, DataFrame]) -> None:
        tables = {split: completed(table) for split, table in tables.items()}
        self._split = {path: split for split, table in tables.items() for path in table["image_path"]}
        self._kinds: dict[str, str] = {}
        self._path = {Path(path).resolve(): path for path in self._split}
        self._paths_of_name: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for table in tables.values():
            self._kinds.update(zip(table["image_path"], table["kind"], strict=True))
            for path in table["image_path"][~table["is_synthetic"]]:
                self._paths_of_name[_name(path)].append(path)

    def find(self, path: str, *, moved: bool = True) -> str | None:
        """Return an image's path as the table has it; None if it is no image of the base.

        Args:
            path: Path of the image.
            moved: Look also for an image whose name and folder have the same names: data are moved, or synthesized
                from on another machine.
        """
        if (found := self._path.get(Path(path).resolve())) or not moved:
            return found
        namesakes = self._paths_of_name[_name(path)]
        return namesakes[0] if len(namesakes) == 1 else None

    def kind(self, path: str | None) -> str:
        """Return the kind of the defect in an image that :meth:`find` has found; empty if it is not known."""
        return self._kinds.get(path, "") if path else ""

    def is_for_training(self, path: str) -> bool:
        """Tell whether an image that :meth:`find` has found is a training image."""
        return self._split[path] == Split.TRAIN


def _traced(image: SyntheticImage, real: _RealImages) -> _Synthetic:
    """Find the real images that a synthetic one was made from."""
    record = image.record
    sources = [] if record is None else [str(path) for path in (record.source, record.defect) if path]
    found = [real.find(source) for source in sources]
    told = "" if record is None else str(record.details.get("kind", ""))
    # One of unknown descent has itself: no real image would have any.
    origins = [path or source for path, source in zip(found, sources, strict=True)] or [str(image.image_path)]
    return _Synthetic(
        path=str(image.image_path),
        mask=str(image.mask_path),
        origins=tuple(origins),
        leaks=any(path is not None and not real.is_for_training(path) for path in found),
        is_stranger=not found or None in found,
        kind=next(filter(None, map(real.kind, found)), told),
    )


def _joined(train: DataFrame, synthetic: Sequence[_Synthetic]) -> DataFrame:
    """Append rows of synthetic images to a training table; those of real images stay first and as they are."""
    without = int(((train["label_index"] == LabelName.ABNORMAL) & (train["mask_path"] == "")).sum())
    if without:
        logger.warning(
            "%d real defective training images have no masks, but synthetic ones have: batches get an all-black mask "
            "for the real ones. ExDD does not look at those with `--model.positive_patches farthest`.",
            without,
        )
    rows = DataFrame(
        [
            {
                "image_path": image.path,
                "mask_path": image.mask,
                "label_index": int(LabelName.ABNORMAL),
                "split": Split.TRAIN.value,
                "origins": image.origins,
                "kind": image.kind,
            }
            for image in synthetic
        ],
    )
    joined = pd.concat([completed(train), completed(rows)], ignore_index=True)
    joined.attrs["task"] = TaskType.SEGMENTATION.value
    return joined


def _name(path: str) -> tuple[str, ...]:
    """Name of a file and of its folder, from either kind of machine."""
    return tuple(path.replace("\\", "/").split("/")[-2:])
