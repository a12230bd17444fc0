"""Users' own images: folders or a CSV file of normal and defective images, with masks for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from .drawn_masks import MarkedImages, draw_masks, separate_annotations
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
        self._check_arguments(mask_suffix)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the data, as given."""
        return self._name

    def read_samples(self) -> DataFrame:
        """List the images, match their masks, check both, and hold out test images where none are named."""
        images = self._read_csv(self.csv) if self.csv else self._read_folders()
        _check_listed_once(images)
        found = inspect_masks([(each.image, each.mask) for each in images])
        images = [
            replace(each, label=_label_of(each, has_defect=info.has_defect))
            for each, info in zip(images, found, strict=True)
        ]
        samples = DataFrame(
            {
                "image_path": [str(each.image) for each in images],
                "mask_path": [str(each.mask or "") for each in images],
                "label_index": [each.label for each in images],
                "split": [(each.split or Split.TRAIN).value for each in images],
                "kind": kinds_of([each.word if each.label == _DEFECTIVE else "" for each in images]),
                "has_boxes": [each.has_boxes for each in images],
            }
        )
        tested = set(samples.loc[samples["split"] == Split.TEST.value, "label_index"])
        return self._hold_out(samples, set() if self.csv and tested else {_NORMAL, _DEFECTIVE} - tested)

    def _check_arguments(self, mask_suffix: str | None) -> None:
        given = [name for name, paths in self.paths.items() if paths is not None]
        if self.csv:
            if given or mask_suffix is not None:
                msg = f"Arguments `csv` and `{(given or ['mask_suffix'])[0]}` exclude each other. Give one of them."
                raise ValueError(msg)
            return
        # Only where they matter: annotations have to be looked for on the disk.
        annotated = {
            masks: masks in given and images not in given and bool(self._annotations(masks)[0])
            for masks, images in (("masks", "defective"), ("masks_test", "defective_test"))
        }
        if "normal" not in given and not annotated["masks"]:
            msg = (
                "Argument `normal` is missing: name the folder of the normal training images, or a CSV file in "
                "argument `csv`, or, without `defective`, annotation files in argument `masks`."
            )
            raise ValueError(msg)
        for masks, images in (("masks", "defective"), ("masks_test", "defective_test")):
            if masks in given and images not in given and not annotated[masks]:
                msg = f"Argument `{masks}` names masks, but argument `{images}` names no images for them."
                raise ValueError(msg)

    def _read_folders(self) -> list[AnnotatedImage]:
        images: list[AnnotatedImage] = []
        for split, ending in ((Split.TRAIN, ""), (Split.TEST, "_test")):
            files, others = self._annotations(f"masks{ending}")
            listed_masks = list_images(f"masks{ending}", others, self.root) if others else []
            normal, defective = self._list(f"normal{ending}"), self._list(f"defective{ending}")
            marked = draw_masks(files, self.root, [*normal, *defective]) if files else MarkedImages({}, [])
            if self.paths[f"defective{ending}"] is None:
                defective = sorted(set(marked.masks) - set(normal))
                if self.paths[f"normal{ending}"] is None:
                    normal = marked.unmarked
            # Masks may lie among the images.
            (normal, normal_masks), (defective, _) = (
                separate_masks(argument, listed, listed_masks, self.mask_suffixes)
                for argument, listed in ((f"normal{ending}", normal), (f"defective{ending}", defective))
            )
            masks = sorted(set(listed_masks) - set(normal_masks) - set(defective))
            drawn = {image: mask.path for image, mask in marked.masks.items()}
            matches = match_masks(defective, masks, self.mask_suffixes) | drawn
            if split == Split.TRAIN:
                self._check_all_matched(defective, masks, files, matches)
            empty_masks = match_masks(normal, normal_masks, self.mask_suffixes) | drawn
            images += [
                AnnotatedImage(image, empty_masks.get(image), _NORMAL, split, f"`normal{ending}`") for image in normal
            ]
            words = words_of_folders(defective, self.paths[f"defective{ending}"], self.root)
            for image, word in zip(defective, words, strict=True):
                mark = marked.masks.get(image)
                kind, has_boxes = (mark.kind or word, mark.has_boxes) if mark else (word, False)
                source, mask = f"`defective{ending}`", matches.get(image)
                images.append(AnnotatedImage(image, mask, _DEFECTIVE, split, source, kind, has_boxes))
        return images

    def _annotations(self, argument: str) -> tuple[list[Path], list[str | Path]]:
        """Return the annotation files that an argument for masks names, and its other entries."""
        return separate_annotations(self.paths[argument], self.root)

    def _list(self, argument: str) -> list[Path]:
        paths = self.paths[argument]
        return list_images(argument, paths, self.root) if paths is not None else []

    def _check_all_matched(
        self, images: list[Path], masks: list[Path], files: list[Path], matches: dict[Path, Path]
    ) -> None:
        without = [image for image in images if image not in matches]
        if not without or not (masks or files):
            return
        problem = (
            f"The defective training image `{without[0]}` has no {{}} ({len(without)} of {len(images)} have none)."
        )
        if not masks:
            msg = (
                f"{problem.format('mark')} Looked in the annotation files of argument `masks`, such as "
                f"`{files[0].name}`. Mark its defect there, or take out the image."
            )
            raise FileNotFoundError(msg)
        expected = ", ".join(f"`{without[0].stem}{suffix}.png`" for suffix in self.mask_suffixes[:4])
        more = ", ..." if len(self.mask_suffixes) > 4 else ""
        msg = (
            f"{problem.format('mask')} Expected is one of {expected}{more}, with any image extension, among the "
            f"{len(masks)} files of argument `masks`, such as `{masks[0].name}`. Add the mask, take out the image, or "
            "set `mask_suffix`."
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
                f"The image `{each.image}` is named by {other.named_by} and by {each.named_by}. Every image has one "
                "label, and is for training or for testing: name folders that do not contain each other, or glob "
                "patterns, or remove a line."
            )
            raise ValueError(msg)


def _label_of(image: AnnotatedImage, *, has_defect: bool | None) -> int:
    """Return the label of an image, given what its mask shows; None if it has none."""
    if has_defect is None:
        return int(image.label or _NORMAL)
    if image.label == _DEFECTIVE and not has_defect:
        msg = (
            f"The image `{image.image}` is named as defective ({image.named_by}), but its mask `{image.mask}` is all "
            "black or transparent. Draw the defect into the mask in white, or name the image as normal."
        )
        raise ValueError(msg)
    if image.label == _NORMAL and has_defect:
        msg = (
            f"The image `{image.image}` is named as normal ({image.named_by}), but its mask `{image.mask}` shows a "
            "defect. Name the image as defective, or remove the mask."
        )
        raise ValueError(msg)
    return _DEFECTIVE if has_defect else _NORMAL
