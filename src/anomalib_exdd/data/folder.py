"""Users' own images: folders or a CSV file of normal and defective images, with masks for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data.utils import LabelName, Split
from pandas import DataFrame

from anomalib_exdd.images.file_discovery import (
    COMMON_MASK_SUFFIXES,
    PathSpec,
    entries_of,
    list_images,
    match_masks,
    separate_masks,
)

from .annotations import AnnotatedImage, read_image_table, table_of, words_of_folders
from .base import DefectDataModule, count_labels
from .drawn_masks import DrawnMask, draw_masks, separate_annotations
from .splits import held_out_count


class DefectFolder(DefectDataModule):
    """Your own images: normal ones, defective ones, and masks that show where the defects are.

    Images may have different sizes; grey, RGB, RGBA and 16-bit grey are understood. Images and masks are named as
    folders, files or glob patterns, or a CSV file lists them. Validation images, if any, are drawn from the training
    images.

    Args:
        name: Name of your data, used for the folder of the results. Default: that of the root's folder.
        root: Folder that all other paths start from. Default: the folder of ``csv``, else the working directory.
        normal: Normal images for training: a folder (with all folders in it), a file, a glob pattern such as
            ``parts/*_ok.png``, or a list of these. Default, with annotation files and without ``defective``: images
            that these list or that lie beside the marked ones, and have no mark.
        defective: Defective images for training, given like ``normal``. Of several folders (``[scratch, dent]``) each
            holds the kind of defect that it is named after; of a single one, the folders in it do. Default, with
            annotation files: the images that these mark.
        masks: Masks of the defective training images, given like ``normal``: one for each of them, of its size, black
            where there is no defect, named like its image or with a suffix (``a17.jpg`` and ``a17_mask.png``,
            ``a17_GT.png`` or ``a17.png``). They may lie in the folder of the images if they have a suffix. Without
            them only image labels are known, and ExDD needs ``--model.positive_patches farthest``. Or files of
            annotation tools, which name their images themselves: COCO (one ``.json`` file), LabelMe (``.json``), YOLO
            (``.txt``) or Pascal VOC (``.xml``), with polygons or boxes; their classes are kinds of defects.
        normal_test: Normal images for testing, given like ``normal``. Default: a share of ``normal`` is held out.
        defective_test: Defective images for testing, given like ``normal``. Default: a share of ``defective`` is held
            out, with its masks.
        masks_test: Masks of ``defective_test``, given like ``masks``. Without them the metrics of pixels are left out.
        mask_suffix: What follows the image's name in the name of its mask, such as ``_anno``; empty for the same name.
            Default: the same name or one of the usual suffixes.
        csv: CSV file instead of the seven arguments above, with a header line and the columns ``image``, ``mask`` (may
            be empty), ``label`` (``normal`` or ``defective``, ``good`` or ``bad``, 0 or 1; without it an image is
            defective if its mask has any pixel that is not black), ``split`` (``train`` or ``test``; without it, or
            without any ``test``, a share is held out for testing) and ``kind`` of the defect (or ``defect_type`` or
            ``class``; may be left out). Paths start from ``root`` or from the folder of the file.
        test_split_ratio: Share of the images held out for testing where no test images are named.
        **kwargs: Further arguments of :class:`.DefectDataModule`: ``num_defects``, ``val_split_ratio``, ``seed``,
            ``white_level``, and those of the loaders.

    Example:
        >>> from anomalib_exdd.data import DefectFolder
        >>> data = DefectFolder("bolts", root="./photos", normal="good", defective="bad", masks="bad_masks")
        >>> data.name
        'bolts'
    """

    def __init__(
        self,
        name: str | None = None,
        root: str | Path | None = None,
        normal: PathSpec | None = None,
        defective: PathSpec | None = None,
        masks: PathSpec | None = None,
        normal_test: PathSpec | None = None,
        defective_test: PathSpec | None = None,
        masks_test: PathSpec | None = None,
        mask_suffix: str | None = None,
        csv: str | Path | None = None,
        test_split_ratio: float = 0.2,
        **kwargs: Any,
    ) -> None:
        self.csv = Path(csv) if csv is not None else None
        if root is None:
            root = self.csv.parent if self.csv else Path()
        self._name = Path(root).resolve().name if name is None else name
        if not self._name or Path(self._name).name != self._name:
            msg = f"Argument `name` has to be usable as the name of a folder, but got `{self._name}`."
            raise ValueError(msg)
        if not 0 < test_split_ratio < 1:
            msg = f"Argument `test_split_ratio` has to lie between 0 and 1, without either, but got {test_split_ratio}."
            raise ValueError(msg)
        super().__init__(root, **kwargs)
        self.test_split_ratio = test_split_ratio
        self.paths = {
            "normal": entries_of(normal),
            "defective": entries_of(defective),
            "masks": entries_of(masks),
            "normal_test": entries_of(normal_test),
            "defective_test": entries_of(defective_test),
            "masks_test": entries_of(masks_test),
        }
        self.mask_suffixes = ("", *COMMON_MASK_SUFFIXES) if mask_suffix is None else (mask_suffix.lower(),)
        given = [name for name, value in [*self.paths.items(), ("mask_suffix", mask_suffix)] if value]
        if self.csv and given:
            msg = f"Arguments `csv` and `{given[0]}` exclude each other. Give one of them."
            raise ValueError(msg)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the data, as given."""
        return self._name

    def read_samples(self) -> DataFrame:
        """List the images, match their masks, check both, and hold out test images where none are named."""
        if self.csv:
            images = read_image_table(self.csv, list(dict.fromkeys((self.root, self.csv.parent))))
        else:
            images = self._read_folders(Split.TRAIN, "normal", "defective", "masks")
            images += self._read_folders(Split.TEST, "normal_test", "defective_test", "masks_test")
        self._check_masks(images)
        samples = table_of(images)
        is_train = samples["split"] == Split.TRAIN.value
        train, test = samples[is_train], samples[~is_train]
        tested = set(test["label_index"])
        if self.csv and tested:
            tested = {0, 1}  # the file names all test images
        counts = [
            0 if label in tested else held_out_count(count, self.test_split_ratio)
            for label, count in enumerate(count_labels(train))
        ]
        train, held_out = self.move_images(train, counts, "test", Split.TEST)
        return pd.concat([train, test, held_out], ignore_index=True)

    def _read_folders(
        self, split: Split, normal_argument: str, defective_argument: str, masks_argument: str
    ) -> list[AnnotatedImage]:
        """List what three arguments name. Masks may lie among the images, and annotation files name images."""
        files, others = separate_annotations(self.paths[masks_argument], self.root)
        names_defects = bool(self.paths[defective_argument])
        finds_defects = bool(files) and not names_defects
        if split == Split.TRAIN and not self.paths[normal_argument] and not finds_defects:
            msg = (
                "Argument `normal` is missing: name normal images, or a file in `csv`, or annotation files in `masks`."
            )
            raise ValueError(msg)
        if others and not names_defects and not finds_defects:
            msg = f"Argument `{masks_argument}` names masks, but `{defective_argument}` names no images for them."
            raise ValueError(msg)
        normal = list_images(normal_argument, self.paths[normal_argument], self.root)
        defective = list_images(defective_argument, self.paths[defective_argument], self.root)
        listed_masks = list_images(masks_argument, others, self.root)
        marked, unmarked = draw_masks(files, self.root, [*normal, *defective]) if files else ({}, [])
        if finds_defects:
            defective = sorted(set(marked) - set(normal))
            normal = normal or unmarked
        normal, normal_masks = separate_masks(normal_argument, normal, listed_masks, self.mask_suffixes)
        defective, _ = separate_masks(defective_argument, defective, listed_masks, self.mask_suffixes)
        masks = sorted(set(listed_masks) - set(normal_masks) - set(defective))
        images = []
        for argument, label, listed, fitting in (
            (normal_argument, int(LabelName.NORMAL), normal, normal_masks),
            (defective_argument, int(LabelName.ABNORMAL), defective, masks),
        ):
            matched = match_masks(listed, fitting, self.mask_suffixes)
            for image, word in zip(listed, words_of_folders(listed, self.paths[argument], self.root), strict=True):
                mask, kind, has_boxes = marked.get(image) or DrawnMask(matched.get(image))
                images.append(AnnotatedImage(image, mask, label, split, f"`{argument}`", kind or word, has_boxes))
        return images

    def _check_masks(self, images: Sequence[AnnotatedImage]) -> None:
        """Check that each defective training image has a mask, or none of them, where no masks are named."""
        train = [each for each in images if each.split == Split.TRAIN and each.label != LabelName.NORMAL]
        without = [each for each in train if each.mask is None]
        if without and (self.paths["masks"] or len(without) < len(train)):
            expected = ", ".join(f"`{without[0].image.stem}{suffix}.png`" for suffix in self.mask_suffixes[:4])
            msg = (
                f"The defective training image `{without[0].image}` ({without[0].named_by}) has no mask "
                f"({len(without)} of {len(train)} have none): no file of argument `masks` marks it or is named like "
                f"{expected}. Give every one a mask or mark, or set `mask_suffix`, or give none of them a mask."
            )
            raise FileNotFoundError(msg)
