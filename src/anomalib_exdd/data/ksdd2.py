"""Kolektor Surface-Defect Dataset 2, and any folder in its layout.

Anomalib's ``Kolektor`` is the first data set of this name; this is the second, with defective training images and their
masks: Bozic, Tabernik, Skocaj: Mixed supervision for surface-defect detection: from weakly to fully supervised
learning. Computers in Industry 129 (2021). Its layout::

    train/10000.png, 10000_GT.png    # and test/20000.png, ...: one mask per image; all black: normal
    split_weakly_16.pyb              # optional: published choices of defective training images
    sources.csv                      # optional: kinds of the defects, in the columns split, id and kind (or class)
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib.data.utils import LabelName, Split
from pandas import DataFrame

from anomalib_exdd.images.file_discovery import contents_of

from .annotations import KINDS_FILE, AnnotatedImage, read_kind_table, table_of
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
    """

    def __init__(self, root: str | Path = "./datasets/KSDD2", official_split: int | None = None, **kwargs: Any) -> None:
        if official_split is not None and official_split not in OFFICIAL_SPLITS:
            msg = f"Argument `official_split` has to be one of {list(OFFICIAL_SPLITS)}, but got {official_split}."
            raise ValueError(msg)
        super().__init__(root, **kwargs)
        if official_split is not None and self.num_defects is not None:
            msg = f"Give `official_split` ({official_split}) or `num_defects` ({self.num_defects}), not both."
            raise ValueError(msg)
        self.official_split = official_split

    def prepare_data(self) -> None:
        """Download the data set if the root does not exist or is empty (but for the archive)."""
        if not self.root.is_file() and all(path.name == KSDD2_ARCHIVE.filename for path in self.root.glob("*")):
            fetch_folder(KSDD2_ARCHIVE, self.root)

    def read_samples(self) -> DataFrame:
        """Read the folder, find each image's label in its mask, and check that nothing is missing."""
        table = self.root / KINDS_FILE
        words = read_kind_table(table) if table.is_file() else {}
        images = [image for split in _SPLITS for image in _list_images(self.root, split, words)]
        _check_complete(self.root, images)
        samples = table_of(images)
        return samples if self.official_split is None else self._keep_released(samples, self.official_split)

    def _keep_released(self, samples: DataFrame, number: int) -> DataFrame:
        """Leave out the defective training images whose masks the published split of this number does not release."""
        path = self.root / f"split_weakly_{number}.pyb"
        released = {image_id for image_id, is_released in read_official_split(path)["train"].items() if is_released}
        is_released = samples["image_path"].map(lambda image: Path(image).stem in released)
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
        msg = f"There is no `{path}`, a file of the official KSDD2. For images of your own, use `num_defects` instead."
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


def _list_images(root: Path, split: str, words: Mapping[tuple[str, str], str]) -> list[AnnotatedImage]:
    """List the images of a split, each of which has its mask, with the words for their kinds (by split and id)."""
    folder = root / split
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    images, masks = ({name[:5] for name in names if kind.fullmatch(name)} for kind in (_IMAGE_NAME, _MASK_NAME))
    if not images:
        place = folder if folder.is_dir() else root
        nested = sorted(path.parent for path in root.glob("*/train"))
        msg = (
            f"`{root}` is not in KSDD2's layout: images named `{split}/NNNNN.png` (five digits) are expected, but "
            f"`{place}` {contents_of(place)}. "
        )
        msg += (
            f"The data seem to lie one level deeper: try `root={nested[0]}`."
            if nested
            else f"Other names and layouts are for DefectFolder. {KSDD2_ARCHIVE.by_hand(root)}"
        )
        raise FileNotFoundError(msg)
    if without_mask := sorted(images - masks):
        msg = (
            f"The image `{folder / without_mask[0]}.png` has no mask `{without_mask[0]}_GT.png` ({len(without_mask)} "
            f"of {len(images)} have none). Draw one, all black for a normal image, or use DefectFolder."
        )
        raise FileNotFoundError(msg)
    if without_image := sorted(masks - images):
        msg = f"The mask `{folder / without_image[0]}_GT.png` has no image `{without_image[0]}.png`. Put it back."
        raise FileNotFoundError(msg)
    return [
        AnnotatedImage(
            image=folder / f"{image_id}.png",
            mask=folder / f"{image_id}_GT.png",
            label=None,
            split=Split(split),
            word=words.get((split, image_id), ""),
        )
        for image_id in sorted(images)
    ]


def _check_complete(root: Path, images: Sequence[AnnotatedImage]) -> None:
    """Refuse an incomplete copy of the official data set, whose files ``split_weakly_N.pyb`` list all images."""
    for path in sorted(root.glob("split_weakly_*.pyb"))[:1]:
        for split, listed in read_official_split(path).items():
            known = {image_id for image_id in listed if _IMAGE_NAME.fullmatch(f"{image_id}.png")}  # no stray copy
            if missing := sorted(known - {each.image.stem for each in images if each.split == split}):
                msg = (
                    f"`{root}` is an incomplete copy of KSDD2: `{path.name}` lists {len(known)} {split} images, but "
                    f"{len(missing)} are missing, such as `{split}/{missing[0]}.png`. Remove it to download it anew."
                )
                raise FileNotFoundError(msg)
