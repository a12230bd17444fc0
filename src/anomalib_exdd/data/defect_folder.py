"""Users' own images: folders or a CSV file of normal and defective images, with masks for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from anomalib.data.utils import LabelName, Split
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.reading import (
    WHITE_LEVEL,
    InspectedPair,
    inspect_image,
    inspect_pair,
    map_files,
    warn_of_inverted_masks,
)
from anomalib_exdd.images.sources import (
    Source,
    expected_mask_names,
    list_images,
    mask_suffixes,
    match_masks,
    separate_masks,
)

from .csv_samples import read_csv_samples
from .defect_datamodule import DefectDataModule, take
from .kinds import kinds_of, words_of_folders
from .splits import check_ratio, held_out_counts

_NORMAL, _DEFECTIVE = int(LabelName.NORMAL), int(LabelName.ABNORMAL)


class DefectFolder(DefectDataModule):
    """Your own images: normal ones, defective ones, and masks that show where the defects are.

    Images may have different sizes; grey, RGB, RGBA and 16-bit grey are understood. Images and masks are named as
    folders, files or glob patterns, or a CSV file lists them. Validation images, if any, are drawn from the training
    images.

    Args:
        name: Name of your data, used for the folder of the results.
        root: Folder that all other paths start from. Default: the folder of ``csv``, else the working directory.
        normal: Normal images for training: a folder (with all folders in it), a file, a glob pattern such as
            ``parts/*_ok.png``, or a list of these.
        defective: Defective images for training, given like ``normal``. Of several folders (``[scratch, dent]``) each
            holds the kind of defect that it is named after; of a single one, the folders in it do.
        masks: Masks of the defective training images, given like ``normal``: one for each of them, of its size, black
            where there is no defect, named like its image or with a suffix (``a17.jpg`` and ``a17_mask.png``,
            ``a17_GT.png`` or ``a17.png``). They may lie in the folder of the images if they have a suffix. Without
            them only image labels are known, and ExDD needs ``--model.positive_patches farthest``.
        normal_test: Normal images for testing, given like ``normal``. Default: a share of ``normal`` is held out.
        defective_test: Defective images for testing, given like ``normal``. Default: a share of ``defective`` is held
            out, with its masks.
        masks_test: Masks of ``defective_test``. Without them the metrics of pixels are left out.
        mask_suffix: What follows the image's name in the name of its mask, such as ``_anno``; empty for the same name.
            Default: the same name or one of the usual suffixes.
        csv: CSV file instead of the seven arguments above, with a header line and the columns ``image``, ``mask`` (may
            be empty), ``label`` (``normal`` or ``defective``, ``good`` or ``bad``, 0 or 1; without it an image is
            defective if its mask has any pixel that is not black), ``split`` (``train`` or ``test``; without it, or
            without any ``test``, a share is held out for testing) and ``kind`` of the defect (or ``defect_type`` or
            ``class``; may be left out). Paths start from ``root`` or from the folder of the file.
        test_split_ratio: Share of the images held out for testing where no test images are named.
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

    Example:
        >>> from anomalib_exdd.data import DefectFolder
        >>> data = DefectFolder("bolts", root="./photos", normal="good", defective="bad", masks="bad_masks")
        >>> data.name
        'bolts'
    """

    def __init__(
        self,
        name: str,
        root: str | Path | None = None,
        normal: Source | None = None,
        defective: Source | None = None,
        masks: Source | None = None,
        normal_test: Source | None = None,
        defective_test: Source | None = None,
        masks_test: Source | None = None,
        mask_suffix: str | None = None,
        csv: str | Path | None = None,
        test_split_ratio: float = 0.2,
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
        if not name or Path(name).name != name:
            msg = f"Argument `name` has to be usable as the name of a folder, but got `{name}`."
            raise ValueError(msg)
        check_ratio("test_split_ratio", test_split_ratio)
        self._name = name
        self.csv = Path(csv) if csv is not None else None
        self._has_root = root is not None
        super().__init__(
            root if root is not None else (self.csv.parent if self.csv else "."),
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
            white_level=white_level,
        )
        self.test_split_ratio = test_split_ratio
        self.sources: dict[str, Source | None] = {
            "normal": normal,
            "defective": defective,
            "masks": masks,
            "normal_test": normal_test,
            "defective_test": defective_test,
            "masks_test": masks_test,
        }
        self.suffixes = mask_suffixes(mask_suffix)
        self._check_arguments(mask_suffix)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the data, as given."""
        return self._name

    def read_samples(self) -> DataFrame:
        """List the images, match their masks, check both, and hold out test images where none are named.

        Returns:
            Table with the columns ``image_path``, ``mask_path``, ``label_index``, ``split`` and ``kind``.

        Raises:
            FileNotFoundError: If a file or folder does not exist, or a defective training image has no mask while
                others have one.
            ValueError: If names are ambiguous, a mask contradicts the label or the image, or a file cannot be read.
        """
        rows = _checked(self._read_csv(self.csv) if self.csv else self._read_folders())
        samples = DataFrame(
            [
                {
                    "image_path": str(row.image),
                    "mask_path": str(row.mask) if row.mask else "",
                    "label_index": row.label,
                    "split": row.split.value,
                }
                for row in rows
            ],
        )
        samples["kind"] = kinds_of([row.word if row.label == _DEFECTIVE else "" for row in rows])
        if self.csv:
            labels = {_NORMAL, _DEFECTIVE} if (samples["split"] == Split.TRAIN.value).all() else set()
        else:
            given = {_NORMAL: self.sources["normal_test"], _DEFECTIVE: self.sources["defective_test"]}
            labels = {label for label, source in given.items() if source is None}
        return self._hold_out(samples, labels)

    def _check_arguments(self, mask_suffix: str | None) -> None:
        given = [name for name, source in self.sources.items() if source is not None]
        if self.csv:
            if given or mask_suffix is not None:
                msg = f"Arguments `csv` and `{(given or ['mask_suffix'])[0]}` exclude each other. Give one of them."
                raise ValueError(msg)
            return
        if "normal" not in given:
            msg = (
                "Argument `normal` is missing: name the folder of the normal training images, or a CSV file in "
                "argument `csv`."
            )
            raise ValueError(msg)
        for masks, images in (("masks", "defective"), ("masks_test", "defective_test")):
            if masks in given and images not in given:
                msg = f"Argument `{masks}` names masks, but argument `{images}` names no images for them."
                raise ValueError(msg)

    def _read_folders(self) -> list[_Row]:
        rows: list[_Row] = []
        for split, ending in ((Split.TRAIN, ""), (Split.TEST, "_test")):
            listed_masks = self._list(f"masks{ending}")
            normal, normal_masks = self._list_apart(f"normal{ending}", listed_masks)
            defective, _ = self._list_apart(f"defective{ending}", listed_masks)
            masks = sorted(set(listed_masks) - set(normal_masks) - set(defective))
            matches = match_masks(defective, masks, self.suffixes)
            if masks and split == Split.TRAIN:
                self._check_all_matched(defective, masks, matches)
            empty_masks = match_masks(normal, normal_masks, self.suffixes)
            rows += [_Row(image, empty_masks.get(image), _NORMAL, split, f"normal{ending}") for image in normal]
            words = words_of_folders(defective, self.sources[f"defective{ending}"], self.root)
            rows += [
                _Row(image, matches.get(image), _DEFECTIVE, split, f"defective{ending}", word)
                for image, word in zip(defective, words, strict=True)
            ]
        _check_listed_once(rows)
        return rows

    def _list(self, argument: str) -> list[Path]:
        source = self.sources[argument]
        return list_images(argument, source, self.root) if source is not None else []

    def _list_apart(self, argument: str, masks: list[Path]) -> tuple[list[Path], list[Path]]:
        """List the images that an argument names, and apart from them the masks that lie among them."""
        return separate_masks(argument, self._list(argument), masks, self.suffixes)

    def _check_all_matched(self, images: list[Path], masks: list[Path], matches: dict[Path, Path]) -> None:
        without = [image for image in images if image not in matches]
        if without:
            msg = (
                f"The defective training image `{without[0]}` has no mask ({len(without)} of {len(images)} have none). "
                f"Expected is one of {expected_mask_names(without[0], self.suffixes)}, with any image extension, among "
                f"the {len(masks)} files of argument `masks`, such as `{masks[0].name}`. Add the mask, take out the "
                "image, or set `mask_suffix`."
            )
            raise FileNotFoundError(msg)

    def _read_csv(self, path: Path) -> list[_Row]:
        roots = [self.root, path.parent] if self._has_root else [path.parent]
        rows = [
            _Row(each.image, each.mask, each.label, Split(each.split or "train"), f"line {each.line}", each.kind)
            for each in read_csv_samples(path, roots)
        ]
        train = [row for row in rows if row.label == _DEFECTIVE and row.split == Split.TRAIN]
        without = [row for row in train if row.mask is None]
        if without and (len(without) < len(train) or any(row.label is None for row in rows)):
            msg = (
                f"The defective training image `{without[0].image}` ({without[0].source} of `{path}`) has no mask, "
                "while others have one. Give every defective training image a mask, or none."
            )
            raise FileNotFoundError(msg)
        return rows

    def _hold_out(self, samples: DataFrame, labels: set[int]) -> DataFrame:
        """Move a share of the training images with these labels to the test split."""
        is_train = samples["split"] == Split.TRAIN.value
        train, test = samples[is_train], samples[~is_train]
        normal = int((train["label_index"] == _NORMAL).sum())
        counts = held_out_counts(
            normal, len(train) - normal, self.test_split_ratio, labels, val_ratio=self.val_split_ratio
        )
        train, held_out = take(
            train,
            counts,
            root=self.root,
            seed=int(self.seed or 0),
            purpose="test",
            split=Split.TEST,
        )
        return pd.concat([train, test, held_out], ignore_index=True)


@dataclass(frozen=True)
class _Row:
    """One image; the label is None if its mask decides, the source is what named it, for messages.

    The word is what file or folder say about the kind of its defect.
    """

    image: Path
    mask: Path | None
    label: int | None
    split: Split
    source: str
    word: str = ""


def _check_listed_once(rows: Sequence[_Row]) -> None:
    seen: dict[Path, _Row] = {}
    for row in rows:
        other = seen.setdefault(row.image.resolve(), row)
        if other is not row:
            msg = (
                f"The image `{row.image}` is named by `{other.source}` and by `{row.source}`. Every image has one "
                "label, and is for training or for testing: name folders that do not contain each other, or glob "
                "patterns."
            )
            raise ValueError(msg)


def _checked(rows: Sequence[_Row]) -> list[_Row]:
    """Read all masks, fill in the labels that they decide, and refuse masks that contradict a label."""
    pairs = list(zip(rows, map_files(_inspect, rows, "Reading the masks"), strict=True))
    warn_of_inverted_masks([row.mask for row, pair in pairs if row.mask and pair and pair.looks_inverted])
    return [replace(row, label=_label_of(row, has_defect=pair and pair.has_defect)) for row, pair in pairs]


def _inspect(row: _Row) -> InspectedPair | None:
    if row.mask is not None:
        return inspect_pair(row.image, row.mask)
    inspect_image(row.image)
    return None


def _label_of(row: _Row, *, has_defect: bool | None) -> int:
    """Return the label of an image, given what its mask shows; None if it has none."""
    if has_defect is None:
        return int(row.label or _NORMAL)
    if row.label == _DEFECTIVE and not has_defect:
        msg = (
            f"The image `{row.image}` is named as defective (`{row.source}`), but its mask `{row.mask}` is all black "
            "or transparent. Draw the defect into the mask in white, or name the image as normal."
        )
        raise ValueError(msg)
    if row.label == _NORMAL and has_defect:
        msg = (
            f"The image `{row.image}` is named as normal (`{row.source}`), but its mask `{row.mask}` shows a defect. "
            "Name the image as defective, or remove the mask."
        )
        raise ValueError(msg)
    return _DEFECTIVE if has_defect else _NORMAL
