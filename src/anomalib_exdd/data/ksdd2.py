"""Kolektor Surface-Defect Dataset 2, and any folder in its layout.

Anomalib's ``Kolektor`` is the first data set of this name; this is the second, with defective training images and their
masks::

    root/
    ├── train/
    │   ├── 10000.png
    │   ├── 10000_GT.png        # one mask per image; all black: normal
    │   └── ...
    ├── test/
    │   ├── 20000.png
    │   └── ...
    ├── split_weakly_16.pyb     # optional: published choices of defective training images
    └── sources.csv             # optional: kinds of the defects, in the columns split, id (10000) and kind (or class)

The images are licensed under CC BY-NC-SA 4.0: no commercial use, and what is made from them carries the same licence.

Reference:
    Bozic, Tabernik, Skocaj: Mixed supervision for surface-defect detection: from weakly to fully supervised learning.
    Computers in Industry 129 (2021).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from anomalib.data.utils import LabelName
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.reading import WHITE_LEVEL, InspectedPair, inspect_pair, map_files, warn_of_inverted_masks
from anomalib_exdd.images.sources import contents_of

from .csv_samples import read_kinds
from .defect_datamodule import DefectDataModule
from .download import Archive, fetch_folder
from .kinds import SOURCES_NAME, kinds_of
from .official_splits import OFFICIAL_SPLITS, read_official_split, split_path

logger = logging.getLogger(__name__)

KSDD2_ARCHIVE = Archive(
    name="KSDD2",
    url="https://go.vicos.si/kolektorsdd2",
    hashsum="edcdb486809b24f1d17b785e30c52fafc5999554dd5fe18ddf77b61ceb6f36a8",
    filename="KolektorSDD2.zip",
    md5="1ed0f628122776ace4965afa30dfe316",
    num_bytes=853_126_555,
    licence="CC BY-NC-SA 4.0 (no commercial use)",
)
# Number of normal and defective images.
KSDD2_COUNTS: dict[str, tuple[int, int]] = {"train": (2085, 246), "test": (894, 110)}

_IMAGE_NAME = re.compile(r"^\d{5}\.png$")  # "10301 (copy).png" in the archive is a stray copy
_MASK_NAME = re.compile(r"^\d{5}_GT\.png$")
_OFFICIAL_IDS = {"train": range(10_000, 12_331), "test": range(20_000, 21_004)}
_OFFICIAL_HEIGHTS, _OFFICIAL_WIDTHS = range(597, 666), range(184, 242)
_LOOKALIKE_IMAGES = 500  # an extraction that broke off leaves hundreds of training images; fewer are a sample


class KSDD2(DefectDataModule):
    """Kolektor Surface-Defect Dataset 2, or any folder in its layout.

    The data set (853 MB, licence CC BY-NC-SA 4.0: no commercial use) is downloaded to ``root`` if that folder does not
    exist or is empty. Training images are labelled and may be defective; the label is whether the mask has any pixel
    that is not black. Test images stay as published; validation images, if any, are drawn from the training images.

    Args:
        root: Folder with ``train`` and ``test``, each holding ``NNNNN.png`` and ``NNNNN_GT.png``. Downloaded if absent.
            A file ``sources.csv`` in it, with the columns ``split``, ``id`` (``NNNNN``) and ``kind`` (or ``class``),
            may name the kinds of the defects.
        official_split: 0, 16, 53, 126 or 246: use only the defective training images whose masks the published file
            ``split_weakly_N.pyb`` releases, and leave out the others. Not together with ``num_defects``.
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
        >>> from anomalib_exdd.data import KSDD2
        >>> data = KSDD2(root="./datasets/KSDD2", num_defects=50)
        >>> data.name
        'KSDD2'
    """

    def __init__(
        self,
        root: str | Path = "./datasets/KSDD2",
        official_split: int | None = None,
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
        if official_split is not None and official_split not in OFFICIAL_SPLITS:
            msg = f"Argument `official_split` has to be one of {list(OFFICIAL_SPLITS)}, but got {official_split}."
            raise ValueError(msg)
        if official_split is not None and num_defects is not None:
            msg = (
                f"Arguments `official_split` ({official_split}) and `num_defects` ({num_defects}) both choose the "
                "defective training images. Give one of them."
            )
            raise ValueError(msg)
        super().__init__(
            root,
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
        self.official_split = official_split

    def prepare_data(self) -> None:
        """Download the data set if the root does not exist or is empty (but for the archive)."""
        if _is_vacant(self.root):
            fetch_folder(KSDD2_ARCHIVE, self.root, check=_check_official_counts)

    def read_samples(self) -> DataFrame:
        """Read the folder, find each image's label in its mask, and check that nothing is missing.

        Returns:
            Table with the columns ``image_path``, ``mask_path``, ``label_index``, ``split`` and ``kind``.

        Raises:
            FileNotFoundError: If the root, an image or a mask is missing.
            ValueError: If a file cannot be read, a mask does not fit its image, or images are missing.
        """
        scans = _scan(self.root)
        _check_complete(self.root, scans)
        samples = _table(scans)
        samples["kind"] = _kinds(samples, self.root / SOURCES_NAME)
        return samples if self.official_split is None else self._keep_released(samples, self.official_split)

    def _keep_released(self, samples: DataFrame, number: int) -> DataFrame:
        """Leave out the defective training images whose masks the published split of this number does not release."""
        path = split_path(self.root, number)
        released_ids = read_official_split(path).released_ids
        released = samples["image_path"].map(lambda image_path: Path(image_path).stem in released_ids)
        defective = (samples["split"] == "train") & (samples["label_index"] == LabelName.ABNORMAL)
        count = int((defective & released).sum())
        if count != number:
            msg = (
                f"The file `{path}` releases the masks of {count} of the {int(defective.sum())} defective training "
                f"images in `{self.root}`, but its name says {number}. Extract it and the images again "
                "from the same archive."
            )
            raise ValueError(msg)
        return samples[~defective | released]


@dataclass(frozen=True)
class _Scan:
    """What one of the folders ``train`` and ``test`` holds, in the order of the ids."""

    images: list[Path]
    masks: list[Path]
    inspected: list[InspectedPair]

    @property
    def defective(self) -> list[bool]:
        """Whether each image is defective."""
        return [pair.has_defect for pair in self.inspected]

    @property
    def ids(self) -> set[str]:
        """The five digits that name each image."""
        return {image.stem for image in self.images}

    @property
    def counts(self) -> tuple[int, int]:
        """Number of normal and of defective images."""
        return len(self.images) - sum(self.defective), sum(self.defective)


def _scan(root: Path) -> dict[str, _Scan]:
    _check_layout(root)
    listings = {split: _list_pairs(root / split) for split in KSDD2_COUNTS}
    scans = {split: _read_pairs(split, pairs) for split, pairs in listings.items()}
    pairs = [pair for scan in scans.values() for pair in zip(scan.masks, scan.inspected, strict=True)]
    warn_of_inverted_masks([mask for mask, inspected in pairs if inspected.looks_inverted])
    return scans


def _read_pairs(split: str, pairs: list[tuple[Path, Path]]) -> _Scan:
    return _Scan(
        images=[image for image, _ in pairs],
        masks=[mask for _, mask in pairs],
        inspected=map_files(lambda pair: inspect_pair(*pair), pairs, f"Reading the {split} masks"),
    )


def _list_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """List the images of a folder with their masks."""
    names = sorted(path.name for path in folder.iterdir())
    images = [name for name in names if _IMAGE_NAME.match(name)]
    expected_masks = {f"{Path(name).stem}_GT.png": name for name in images}
    masks = {name for name in names if _MASK_NAME.match(name)}
    if not images:
        msg = (
            f"The folder `{folder}` holds no image named NNNNN.png (five digits): it {contents_of(folder)}. "
            "DefectFolder takes other names and layouts."
        )
        raise FileNotFoundError(msg)
    if without_mask := sorted(set(expected_masks) - masks):
        msg = (
            f"The image `{folder / expected_masks[without_mask[0]]}` has no mask `{without_mask[0]}` "
            f"({len(without_mask)} of {len(images)} images in `{folder}` have none). Every image needs one; that of a "
            "normal image is all black. DefectFolder takes images without masks."
        )
        raise FileNotFoundError(msg)
    if without_image := sorted(masks - set(expected_masks)):
        msg = (
            f"The mask `{folder / without_image[0]}` has no image `{without_image[0].replace('_GT', '')}` "
            f"({len(without_image)} masks in `{folder}` have none). Put the image back, or remove the mask."
        )
        raise FileNotFoundError(msg)
    return [(folder / image, folder / mask) for mask, image in expected_masks.items()]


def _check_layout(root: Path) -> None:
    if all((root / split).is_dir() for split in KSDD2_COUNTS):
        return
    msg = f"`{root}` is not in KSDD2's layout: folders `train` and `test` are expected, but it {contents_of(root)}."
    nested = [path.name for path in _entries(root) if path.is_dir() and (path / "train").is_dir()]
    if nested:
        msg += f" The data seem to lie one level deeper: try `root={root / nested[0]}`."
    else:
        msg += f" Other layouts are for DefectFolder. {KSDD2_ARCHIVE.by_hand(root)}"
    raise FileNotFoundError(msg)


def _check_complete(root: Path, scans: dict[str, _Scan]) -> None:
    """Refuse an incomplete copy of the official data set, and leave other folders in its layout alone.

    Only the official data set has ``split_weakly_N.pyb`` files, and these list all of its images.
    """
    published = sorted(root.glob("split_weakly_*.pyb"))
    if published:
        _check_listed(root, published[0], scans)
        return
    counts = {split: scan.counts for split, scan in scans.items()}
    if counts == KSDD2_COUNTS:
        return
    logger.info("`%s` is not the official KSDD2, but a folder in its layout.", root)
    many = len(scans["train"].images) >= _LOOKALIKE_IMAGES
    if many and all(_looks_official(split, scan) for split, scan in scans.items()):
        logger.warning(
            "The ids and sizes of the images in `%s` are those of KSDD2, but there are %s instead of %s (normal, "
            "defective). If this should be KSDD2, it is incomplete: remove the folder, and it is downloaded anew.",
            root,
            counts,
            KSDD2_COUNTS,
        )


def _check_listed(root: Path, path: Path, scans: dict[str, _Scan]) -> None:
    published = read_official_split(path)
    for split, ids in (("train", published.train_ids), ("test", published.test_ids)):
        listed = {image_id for image_id in ids if _IMAGE_NAME.match(f"{image_id}.png")}  # without the stray copy
        missing = sorted(listed - scans[split].ids)
        if missing:
            msg = (
                f"`{root}` is an incomplete copy of KSDD2: `{path.name}` lists {len(listed)} {split} images, but "
                f"{len(missing)} of them are missing, such as `{split}/{missing[0]}.png`. Remove the folder, and it is "
                f"downloaded anew. {KSDD2_ARCHIVE.by_hand(root)}"
            )
            raise FileNotFoundError(msg)
        is_official = listed == {str(number) for number in _OFFICIAL_IDS[split]}
        if is_official and scans[split].counts != KSDD2_COUNTS[split]:
            raise ValueError(_wrong_counts(root, split, scans[split]))


def _check_official_counts(root: Path) -> None:
    for split, scan in _scan(root).items():
        if scan.counts != KSDD2_COUNTS[split]:
            raise ValueError(_wrong_counts(root, split, scan))


def _wrong_counts(root: Path, split: str, scan: _Scan) -> str:
    return (
        f"KSDD2 has {KSDD2_COUNTS[split]} (normal, defective) {split} images, but `{root}` has {scan.counts}. Remove "
        "the folder, and it is downloaded anew."
    )


def _looks_official(split: str, scan: _Scan) -> bool:
    heights, widths = zip(*(pair.size for pair in scan.inspected), strict=True)
    known_sizes = set(heights) <= set(_OFFICIAL_HEIGHTS) and set(widths) <= set(_OFFICIAL_WIDTHS)
    return known_sizes and {int(image_id) for image_id in scan.ids} <= set(_OFFICIAL_IDS[split])


def _table(scans: dict[str, _Scan]) -> DataFrame:
    return DataFrame(
        [
            {"image_path": str(image), "mask_path": str(mask), "label_index": int(defective), "split": split}
            for split, scan in scans.items()
            for image, mask, defective in zip(scan.images, scan.masks, scan.defective, strict=True)
        ],
    )


def _kinds(samples: DataFrame, path: Path) -> list[str]:
    """Find the kind of each image in the file that names them, if there is one."""
    words = read_kinds(path) if path.is_file() else {}
    rows = zip(samples["split"], samples["image_path"], samples["label_index"], strict=True)
    return kinds_of([words.get((split, Path(image).stem), "") if defective else "" for split, image, defective in rows])


def _is_vacant(root: Path) -> bool:
    return not root.is_file() and all(path.name == KSDD2_ARCHIVE.file_name for path in _entries(root))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
