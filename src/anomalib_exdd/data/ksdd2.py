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

import io
import logging
import pickle
import re
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data.utils import LabelName
from pandas import DataFrame

from anomalib_exdd.images.file_discovery import contents_of
from anomalib_exdd.images.masks import inspect_masks

from .annotations import KINDS_FILE, kinds_of, read_kind_table
from .base import DefectDataModule, count_labels
from .download import Archive, fetch_folder

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
OFFICIAL_SPLITS: tuple[int, ...] = (0, 16, 53, 126, 246)
OFFICIAL_HEIGHTS, OFFICIAL_WIDTHS = range(597, 666), range(184, 242)
LOOKALIKE_IMAGES = 500  # an extraction that broke off leaves hundreds of training images; fewer are a sample

_OFFICIAL_IDS = {"train": range(10_000, 12_331), "test": range(20_000, 21_004)}
_IMAGE_NAME = re.compile(r"^\d{5}\.png$")  # "10301 (copy).png" in the archive is a stray copy
_MASK_NAME = re.compile(r"^\d{5}_GT\.png$")
_MAX_ID = 99_999
_MAX_SPLIT_BYTES = 16_000_000  # the published files hold some 3,300 pairs


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
        **kwargs: Further arguments of :class:`.DefectDataModule`: ``num_defects``, ``val_split_ratio``, ``seed``,
            ``white_level``, and those of the loaders.

    Example:
        >>> from anomalib_exdd.data import KSDD2
        >>> data = KSDD2(root="./datasets/KSDD2", num_defects=50)
        >>> data.name
        'KSDD2'
    """

    def __init__(self, root: str | Path = "./datasets/KSDD2", official_split: int | None = None, **kwargs: Any) -> None:
        if official_split is not None and official_split not in OFFICIAL_SPLITS:
            msg = f"Argument `official_split` has to be one of {list(OFFICIAL_SPLITS)}, but got {official_split}."
            raise ValueError(msg)
        super().__init__(root, **kwargs)
        if official_split is not None and self.num_defects is not None:
            msg = (
                f"Arguments `official_split` ({official_split}) and `num_defects` ({self.num_defects}) both choose the "
                "defective training images. Give one of them."
            )
            raise ValueError(msg)
        self.official_split = official_split

    def prepare_data(self) -> None:
        """Download the data set if the root does not exist or is empty (but for the archive)."""
        if not self.root.is_file() and all(path.name == KSDD2_ARCHIVE.file_name for path in _entries(self.root)):
            fetch_folder(KSDD2_ARCHIVE, self.root, check=_check_official_counts)

    def read_samples(self) -> DataFrame:
        """Read the folder, find each image's label in its mask, and check that nothing is missing."""
        images = _read_images(self.root)
        _check_complete(self.root, images)
        path = self.root / KINDS_FILE
        words = read_kind_table(path) if path.is_file() else {}
        rows = zip(images["split"], images["id"], images["label_index"], strict=True)
        images["kind"] = kinds_of([words.get((split, name), "") if label else "" for split, name, label in rows])
        if self.official_split is not None:
            images = self._keep_released(images, self.official_split)
        return images.drop(columns=["id", "size"])

    def _keep_released(self, images: DataFrame, number: int) -> DataFrame:
        """Leave out the defective training images whose masks the published split of this number does not release."""
        path = self.root / f"split_weakly_{number}.pyb"
        released = images["id"].isin(read_official_split(path).released_ids)
        defective = (images["split"] == "train") & (images["label_index"] == LabelName.ABNORMAL)
        count = int((defective & released).sum())
        if count != number:
            msg = (
                f"The file `{path}` releases the masks of {count} of the {int(defective.sum())} defective training "
                f"images in `{self.root}`, but its name says {number}. Extract it and the images again "
                "from the same archive."
            )
            raise ValueError(msg)
        return images[~defective | released]


class OfficialSplit(NamedTuple):
    """Ids of all training images, of those whose masks may be used, and of all test images."""

    train_ids: frozenset[str]
    released_ids: frozenset[str]
    test_ids: frozenset[str]


def read_official_split(path: Path) -> OfficialSplit:
    """Read a published split without running anything it contains.

    It is a pickle of ``(train_samples, test_samples)``, each a list of ``(image id, mask may be used)``. A pickle can
    run any code when it is read, and these come from a download: only lists, tuples, numbers, strings and booleans are
    built here, and everything else is refused.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but two lists of pairs of an id and a truth value.
    """
    if not path.is_file():
        msg = (
            f"There is no `{path}`. Argument `official_split` needs the file that comes with the official KSDD2; "
            "for a folder of your own use `num_defects` instead."
        )
        raise FileNotFoundError(msg)
    try:
        train, test = _unpickle_split(path)
    except Exception as error:  # a broken pickle may raise nearly any
        msg = (
            f"The file `{path}` is no KSDD2 split: {str(error) or type(error).__name__}. Extract it again from the "
            "archive of the data set."
        )
        raise ValueError(msg) from error
    released = frozenset(image_id for image_id, is_released in train.items() if is_released)
    return OfficialSplit(frozenset(train), released, frozenset(test))


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, strings and numbers; every other object would have to be looked up here."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        msg = f"it asks for `{module_name}.{global_name}`, and only lists, numbers and strings are allowed"
        raise pickle.UnpicklingError(msg)


def _unpickle_split(path: Path) -> list[dict[str, bool]]:
    """Return by id whether the mask may be used, of training and of test images."""
    if path.stat().st_size > _MAX_SPLIT_BYTES:
        msg = f"it has {path.stat().st_size} bytes, more than {_MAX_SPLIT_BYTES}"
        raise ValueError(msg)
    content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        msg = "it holds no pair of training and test images"
        raise ValueError(msg)
    return [_released_by_id(samples) for samples in content]


def _released_by_id(samples: Any) -> dict[str, bool]:
    if not isinstance(samples, list):
        msg = f"a list of images is expected, but it holds a {type(samples).__name__}"
        raise TypeError(msg)
    released: dict[str, bool] = {}
    for sample in samples:
        if not _is_pair(sample):
            # reprlib: a pickle of a few bytes may nest lists whose full text never ends
            msg = f"pairs of an image id and a truth value are expected, but it holds {reprlib.repr(sample)}"
            raise ValueError(msg)
        image_id, is_released = sample
        name = f"{image_id:05d}" if isinstance(image_id, int) else image_id
        if name in released:
            msg = f"it lists the image {reprlib.repr(name)} twice"
            raise ValueError(msg)
        released[name] = bool(is_released)
    return released


def _is_pair(sample: Any) -> bool:
    if not (isinstance(sample, (tuple, list)) and len(sample) == 2):
        return False
    image_id, is_released = sample
    known_id = isinstance(image_id, str) or (type(image_id) is int and 0 <= image_id <= _MAX_ID)
    return known_id and isinstance(is_released, int) and is_released in {0, 1}


def _read_images(root: Path) -> DataFrame:
    """Read a table of all images, with id and size (height and width) besides the columns of samples."""
    _check_layout(root)
    listed = [(split, image, mask) for split in KSDD2_COUNTS for image, mask in _list_pairs(root / split)]
    found = inspect_masks([(image, mask) for _, image, mask in listed])
    return DataFrame(
        {
            "image_path": [str(image) for _, image, _ in listed],
            "mask_path": [str(mask) for _, _, mask in listed],
            "label_index": [int(bool(info.has_defect)) for info in found],
            "split": [split for split, _, _ in listed],
            "id": [image.stem for _, image, _ in listed],
            "size": [info.size for info in found],
        }
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


def _check_complete(root: Path, images: DataFrame) -> None:
    """Refuse an incomplete copy of the official data set, and accept other folders in its layout.

    Only the official data set has ``split_weakly_N.pyb`` files, and these list all of its images.
    """
    parts = {split: images[images["split"] == split] for split in KSDD2_COUNTS}
    if published := sorted(root.glob("split_weakly_*.pyb")):
        _check_listed(root, published[0], parts)
        return
    counts = {split: count_labels(part) for split, part in parts.items()}
    if counts == KSDD2_COUNTS:
        return
    logger.info("`%s` is not the official KSDD2, but a folder in its layout.", root)
    if len(parts["train"]) >= LOOKALIKE_IMAGES and all(_looks_official(split, part) for split, part in parts.items()):
        logger.warning(
            "The ids and sizes of the images in `%s` are those of KSDD2, but there are %s instead of %s (normal, "
            "defective). If this should be KSDD2, it is incomplete: remove the folder, and it is downloaded anew.",
            root,
            counts,
            KSDD2_COUNTS,
        )


def _check_listed(root: Path, path: Path, parts: dict[str, DataFrame]) -> None:
    published = read_official_split(path)
    for split, ids in (("train", published.train_ids), ("test", published.test_ids)):
        listed = {image_id for image_id in ids if _IMAGE_NAME.match(f"{image_id}.png")}  # without the stray copy
        missing = sorted(listed - set(parts[split]["id"]))
        if missing:
            msg = (
                f"`{root}` is an incomplete copy of KSDD2: `{path.name}` lists {len(listed)} {split} images, but "
                f"{len(missing)} of them are missing, such as `{split}/{missing[0]}.png`. Remove the folder, and it is "
                f"downloaded anew. {KSDD2_ARCHIVE.by_hand(root)}"
            )
            raise FileNotFoundError(msg)
        if listed == {str(number) for number in _OFFICIAL_IDS[split]}:
            _check_counts(root, split, parts[split])


def _check_official_counts(root: Path) -> None:
    images = _read_images(root)
    for split in KSDD2_COUNTS:
        _check_counts(root, split, images[images["split"] == split])


def _check_counts(root: Path, split: str, part: DataFrame) -> None:
    if (counts := count_labels(part)) != KSDD2_COUNTS[split]:
        msg = (
            f"KSDD2 has {KSDD2_COUNTS[split]} (normal, defective) {split} images, but `{root}` has {counts}. Remove "
            "the folder, and it is downloaded anew."
        )
        raise ValueError(msg)


def _looks_official(split: str, part: DataFrame) -> bool:
    heights, widths = zip(*part["size"], strict=True)
    known_sizes = set(heights) <= set(OFFICIAL_HEIGHTS) and set(widths) <= set(OFFICIAL_WIDTHS)
    return known_sizes and set(part["id"].map(int)) <= set(_OFFICIAL_IDS[split])


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
