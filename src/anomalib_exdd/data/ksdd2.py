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

Reference:
    Bozic, Tabernik, Skocaj: Mixed supervision for surface-defect detection: from weakly to fully supervised learning.
    Computers in Industry 129 (2021).
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

from anomalib.data.utils import LabelName
from pandas import DataFrame

from anomalib_exdd.images.file_discovery import contents_of
from anomalib_exdd.images.masks import inspect_masks

from .annotations import KINDS_FILE, kinds_of, read_kind_table
from .base import DefectDataModule
from .download import Archive, fetch_folder

KSDD2_ARCHIVE = Archive(
    name="KSDD2",
    url="https://go.vicos.si/kolektorsdd2",
    hashsum="edcdb486809b24f1d17b785e30c52fafc5999554dd5fe18ddf77b61ceb6f36a8",
    filename="KolektorSDD2.zip",
    num_bytes=853_126_555,
    licence="CC BY-NC-SA 4.0 (no commercial use)",
)
OFFICIAL_SPLITS: tuple[int, ...] = (0, 16, 53, 126, 246)

_SPLITS = ("train", "test")
_IMAGE_NAME = re.compile(r"\d{5}\.png")  # "10301 (copy).png" in the archive is a stray copy
_MASK_NAME = re.compile(r"\d{5}_GT\.png")


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
        if not self.root.is_file() and all(path.name == KSDD2_ARCHIVE.filename for path in self.root.glob("*")):
            fetch_folder(KSDD2_ARCHIVE, self.root)

    def read_samples(self) -> DataFrame:
        """Read the folder, find each image's label in its mask, and check that nothing is missing."""
        samples = _read_images(self.root)
        _check_complete(self.root, samples)
        path = self.root / KINDS_FILE
        words = read_kind_table(path) if path.is_file() else {}
        rows = zip(samples["split"], samples["id"], samples["label_index"], strict=True)
        samples["kind"] = kinds_of(
            [words.get((split, image_id), "") if label else "" for split, image_id, label in rows]
        )
        if self.official_split is not None:
            samples = self._keep_released(samples, self.official_split)
        return samples.drop(columns="id")

    def _keep_released(self, samples: DataFrame, number: int) -> DataFrame:
        """Leave out the defective training images whose masks the published split of this number does not release."""
        path = self.root / f"split_weakly_{number}.pyb"
        released = {image_id for image_id, is_released in read_official_split(path)["train"].items() if is_released}
        is_released = samples["id"].isin(released)
        is_defective = (samples["split"] == "train") & (samples["label_index"] == LabelName.ABNORMAL)
        if (count := int((is_defective & is_released).sum())) != number:
            msg = (
                f"The file `{path}` releases the masks of {count} of the {int(is_defective.sum())} defective training "
                f"images in `{self.root}`, but its name says {number}. Extract both again from the same archive."
            )
            raise ValueError(msg)
        return samples[~is_defective | is_released]


def read_official_split(path: Path) -> dict[str, dict[str, bool]]:
    """Read a published split without running anything it contains.

    It is a pickle of ``(train, test)``, each a list of ``(image id, mask may be used)``. A pickle can run any code when
    it is read, and these come from a download: only lists, tuples, numbers, strings and booleans are built here.

    Returns:
        For "train" and "test": by the id of each image whether its mask may be used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but two lists of pairs.
    """
    if not path.is_file():
        msg = (
            f"There is no `{path}`. Argument `official_split` needs the file that comes with the official KSDD2; "
            "for a folder of your own use `num_defects` instead."
        )
        raise FileNotFoundError(msg)
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        return {
            split: {f"{image_id:05}": bool(is_released) for image_id, is_released in samples}
            for split, samples in zip(_SPLITS, content, strict=True)
        }
    except Exception as error:  # a broken pickle may raise nearly any
        msg = f"The file `{path}` is no KSDD2 split ({error!r}). Extract it again from the archive of the data set."
        raise ValueError(msg) from error


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain containers, strings and numbers; every other object would have to be looked up here."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        msg = f"it asks for `{module_name}.{global_name}`, and only lists, numbers and strings are allowed"
        raise pickle.UnpicklingError(msg)


def _read_images(root: Path) -> DataFrame:
    """Read a table of all images, with their ids besides the columns of samples."""
    if not all((root / split).is_dir() for split in _SPLITS):
        nested = sorted(path.parent.name for path in root.glob("*/train"))
        msg = (
            f"`{root}` is not in KSDD2's layout: folders `train` and `test` are expected, but it {contents_of(root)}. "
        )
        if nested:
            msg += f"The data seem to lie one level deeper: try `root={root / nested[0]}`."
        else:
            msg += f"Other layouts are for DefectFolder. {KSDD2_ARCHIVE.by_hand(root)}"
        raise FileNotFoundError(msg)
    listed = [(split, image, mask) for split in _SPLITS for image, mask in _list_pairs(root / split)]
    found = inspect_masks([(image, mask) for _, image, mask in listed])
    return DataFrame(
        {
            "image_path": [str(image) for _, image, _ in listed],
            "mask_path": [str(mask) for _, _, mask in listed],
            "label_index": [int(bool(has_defect)) for has_defect in found],
            "split": [split for split, _, _ in listed],
            "id": [image.stem for _, image, _ in listed],
        }
    )


def _list_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """List the images of a folder with their masks."""
    names = [path.name for path in folder.iterdir()]
    images, masks = ({name[:5] for name in names if kind.fullmatch(name)} for kind in (_IMAGE_NAME, _MASK_NAME))
    if not images:
        msg = (
            f"The folder `{folder}` holds no image named NNNNN.png (five digits): it {contents_of(folder)}. "
            "DefectFolder takes other names and layouts."
        )
        raise FileNotFoundError(msg)
    if without_mask := sorted(images - masks):
        msg = (
            f"The image `{folder / without_mask[0]}.png` has no mask `{without_mask[0]}_GT.png` "
            f"({len(without_mask)} of {len(images)} have none). Draw one, all black for a normal image, or use "
            "DefectFolder, which takes images without masks."
        )
        raise FileNotFoundError(msg)
    if without_image := sorted(masks - images):
        msg = (
            f"The mask `{folder / without_image[0]}_GT.png` has no image `{without_image[0]}.png`. Put the image back, "
            "or remove the mask."
        )
        raise FileNotFoundError(msg)
    return [(folder / f"{image_id}.png", folder / f"{image_id}_GT.png") for image_id in sorted(images)]


def _check_complete(root: Path, samples: DataFrame) -> None:
    """Refuse an incomplete copy of the official data set, whose files ``split_weakly_N.pyb`` list all images."""
    for path in sorted(root.glob("split_weakly_*.pyb"))[:1]:
        for split, listed in read_official_split(path).items():
            known = {image_id for image_id in listed if _IMAGE_NAME.fullmatch(f"{image_id}.png")}  # no stray copy
            if missing := sorted(known - set(samples["id"][samples["split"] == split])):
                msg = (
                    f"`{root}` is an incomplete copy of KSDD2: `{path.name}` lists {len(known)} {split} images, but "
                    f"{len(missing)} are missing, such as `{split}/{missing[0]}.png`. Remove the folder, and it is "
                    "downloaded anew."
                )
                raise FileNotFoundError(msg)
