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
    list_images,
    match_masks,
    separate_masks,
)
from anomalib_exdd.images.masks import inspect_masks

from .annotations import AnnotatedImage, kinds_of, read_image_table, words_of_folders
from .base import DefectDataModule, count_labels
from .drawn_masks import DrawnMask, MarkedImages, draw_masks, separate_annotations
from .splits import held_out_counts

_NORMAL, _DEFECTIVE = int(LabelName.NORMAL), int(LabelName.ABNORMAL)


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
        if name is None:
            name = Path(root if root is not None else Path(csv or "x").parent).resolve().name
        if not name or Path(name).name != name:
            msg = f"Argument `name` has to be usable as the name of a folder, but got `{name}`."
            raise ValueError(msg)
        if not 0 < test_split_ratio < 1:
            msg = f"Argument `test_split_ratio` has to lie between 0 and 1, without either, but got {test_split_ratio}."
            raise ValueError(msg)
        self._name = name
        self.csv = Path(csv) if csv is not None else None
        self._has_root = root is not None
        super().__init__(root if root is not None else (self.csv.parent if self.csv else "."), **kwargs)
        self.test_split_ratio = test_split_ratio
        self.paths: dict[str, PathSpec | None] = {
            "normal": normal,
            "defective": defective,
            "masks": masks,
            "normal_test": normal_test,
            "defective_test": defective_test,
            "masks_test": masks_test,
        }
        self.mask_suffixes = ("", *COMMON_MASK_SUFFIXES) if mask_suffix is None else (mask_suffix.lower(),)
        for argument, value in ({**self.paths, "mask_suffix": mask_suffix} if self.csv else {}).items():
            if value is not None:
                msg = f"Arguments `csv` and `{argument}` exclude each other. Give one of them."
                raise ValueError(msg)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the data, as given."""
        return self._name

    def read_samples(self) -> DataFrame:
        """List the images, match their masks, check both, and hold out test images where none are named."""
        if self.csv:
            images = self._read_csv(self.csv)
        else:
            images = self._read_folders(Split.TRAIN, "normal", "defective", "masks")
            images += self._read_folders(Split.TEST, "normal_test", "defective_test", "masks_test")
        _check_listed_once(images)
        found = inspect_masks([(each.image, each.mask) for each in images])
        labels = [_label_of(each, has_defect=has_defect) for each, has_defect in zip(images, found, strict=True)]
        words = [each.word if label == _DEFECTIVE else "" for each, label in zip(images, labels, strict=True)]
        samples = DataFrame(
            {
                "image_path": [str(each.image) for each in images],
                "mask_path": [str(each.mask or "") for each in images],
                "label_index": labels,
                "split": [(each.split or Split.TRAIN).value for each in images],
                "kind": kinds_of(words),
                "has_boxes": [each.has_boxes for each in images],
            }
        )
        tested = set(samples.loc[samples["split"] == Split.TEST.value, "label_index"])
        return self._hold_out(samples, set() if self.csv and tested else {_NORMAL, _DEFECTIVE} - tested)

    def _read_folders(
        self, split: Split, normal_argument: str, defective_argument: str, masks_argument: str
    ) -> list[AnnotatedImage]:
        """List what three arguments name. Masks may lie among the images, and annotation files name images."""
        files, others = separate_annotations(self.paths[masks_argument], self.root)
        finds_defects = self.paths[defective_argument] is None and bool(files)
        if split == Split.TRAIN and self.paths[normal_argument] is None and not finds_defects:
            msg = (
                "Argument `normal` is missing: name the folder of the normal training images, or a CSV file in "
                "argument `csv`, or, without `defective`, annotation files in argument `masks`."
            )
            raise ValueError(msg)
        if self.paths[defective_argument] is None and others and not finds_defects:
            msg = f"Argument `{masks_argument}` names masks, but `{defective_argument}` names no images for them."
            raise ValueError(msg)
        normal, defective = self._list(normal_argument), self._list(defective_argument)
        listed_masks = list_images(masks_argument, others, self.root) if others else []
        marked = draw_masks(files, self.root, [*normal, *defective]) if files else MarkedImages({}, [])
        if finds_defects:
            defective = sorted(set(marked.masks) - set(normal))
            if self.paths[normal_argument] is None:
                normal = marked.unmarked
        normal, normal_masks = separate_masks(normal_argument, normal, listed_masks, self.mask_suffixes)
        defective, _ = separate_masks(defective_argument, defective, listed_masks, self.mask_suffixes)
        masks = sorted(set(listed_masks) - set(normal_masks) - set(defective))
        images = []
        for argument, label, listed, fitting in (
            (normal_argument, _NORMAL, normal, normal_masks),
            (defective_argument, _DEFECTIVE, defective, masks),
        ):
            matched = match_masks(listed, fitting, self.mask_suffixes)
            for image, word in zip(listed, words_of_folders(listed, self.paths[argument], self.root), strict=True):
                mark = marked.masks.get(image) or DrawnMask(matched.get(image))
                images.append(
                    AnnotatedImage(image, mark.path, label, split, f"`{argument}`", mark.kind or word, mark.has_boxes)
                )
        if split == Split.TRAIN and (masks or files):
            self._check_all_matched([each for each in images if each.label == _DEFECTIVE], [*masks, *files])
        return images

    def _list(self, argument: str) -> list[Path]:
        paths = self.paths[argument]
        return list_images(argument, paths, self.root) if paths is not None else []

    def _check_all_matched(self, images: Sequence[AnnotatedImage], files: Sequence[Path]) -> None:
        if without := [each.image for each in images if each.mask is None]:
            expected = ", ".join(f"`{without[0].stem}{suffix}.png`" for suffix in self.mask_suffixes[:4])
            msg = (
                f"The defective training image `{without[0]}` has no mask ({len(without)} of {len(images)} have none): "
                f"none of the {len(files)} files of argument `masks`, such as `{files[0].name}`, marks it or is named "
                f"like {expected}. Add the mask or mark, take out the image, or set `mask_suffix`."
            )
            raise FileNotFoundError(msg)

    def _read_csv(self, path: Path) -> list[AnnotatedImage]:
        images = read_image_table(path, [self.root, path.parent] if self._has_root else [path.parent])
        train = [each for each in images if each.label == _DEFECTIVE and each.split != Split.TEST]
        without = [each for each in train if each.mask is None]
        if without and (len(without) < len(train) or any(each.label is None for each in images)):
            msg = (
                f"The defective training image `{without[0].image}` ({without[0].named_by}) has no mask, while others "
                "have one. Give every defective training image a mask, or none."
            )
            raise FileNotFoundError(msg)
        return images

    def _hold_out(self, samples: DataFrame, labels: set[int]) -> DataFrame:
        """Move a share of the training images with these labels to the test split."""
        is_train = samples["split"] == Split.TRAIN.value
        train, test = samples[is_train], samples[~is_train]
        counts = held_out_counts(*count_labels(train), self.test_split_ratio, labels, val_ratio=self.val_split_ratio)
        train, held_out = self.move_images(train, counts, "test", Split.TEST)
        return pd.concat([train, test, held_out], ignore_index=True)


def _check_listed_once(images: Sequence[AnnotatedImage]) -> None:
    seen: dict[Path, AnnotatedImage] = {}
    for each in images:
        other = seen.setdefault(each.image.resolve(), each)
        if other is not each:
            msg = (
                f"The image `{each.image}` is named by {other.named_by} and by {each.named_by}, but has one label and "
                "one purpose. Name folders that do not contain each other, or patterns, or remove a line."
            )
            raise ValueError(msg)


def _label_of(image: AnnotatedImage, *, has_defect: bool | None) -> int:
    """Return the label of an image, given what its mask shows; None if it has none."""
    if has_defect is None:
        return int(image.label or _NORMAL)
    if image.label == (_NORMAL if has_defect else _DEFECTIVE):
        named, found = ("normal", "shows a defect") if has_defect else ("defective", "is all black or transparent")
        msg = (
            f"The image `{image.image}` is named as {named} ({image.named_by}), but its mask `{image.mask}` {found}. "
            "Correct the mask, or name the image otherwise."
        )
        raise ValueError(msg)
    return _DEFECTIVE if has_defect else _NORMAL
