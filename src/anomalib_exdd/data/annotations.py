"""What CSV files and names of folders say about images: masks, labels, splits and kinds of defects."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anomalib.data.utils import LabelName, Split
from pandas import DataFrame

from anomalib_exdd.images.masks import inspect_masks

KINDS_FILE = "sources.csv"
"""Name of the table in a folder of KSDD2's layout that names the kinds of its defects."""

_COLUMNS = {"image_path": "image", "mask_path": "mask", "label_index": "label"}  # names in Anomalib's own tables
_KIND_COLUMNS = ("kind", "defect_type", "class")  # the first that is there counts
_NORMAL_WORDS = {"normal", "good", "ok", "0", "0.0", "false"}
_DEFECTIVE_WORDS = {"defective", "defect", "bad", "abnormal", "anomalous", "anomaly", "nok", "1", "1.0", "true"}
_NUMBERS = {"0", "0.0", "false", "1", "1.0", "true"}
_WORDS_WITHOUT_KIND = (_NORMAL_WORDS | _DEFECTIVE_WORDS) - _NUMBERS
_WORDS_WITHOUT_KIND |= {"", "defects", "anomalies", "ng", "unknown", "none", "nan", "image", "images", "img", "imgs"}


@dataclass(frozen=True)
class AnnotatedImage:
    """An image with its mask, if any, and what is said of it."""

    image: Path
    mask: Path | None
    label: int | None  # None: the mask decides
    split: Split
    named_by: str = ""  # argument or line, for messages
    word: str = ""  # about the kind of the defect, see `kinds_of`
    has_boxes: bool = False  # in the mask, around defects, instead of their outlines


def table_of(images: Sequence[AnnotatedImage]) -> DataFrame:
    """Check images against their masks, and make a table of samples of them (see :class:`.DefectDataset`).

    Raises:
        ValueError: If an image is listed twice or a file cannot be decoded, or if a mask has another size than its
            image or shows something else than the image's label says.
    """
    seen: dict[Path, AnnotatedImage] = {}
    for each in images:
        other = seen.setdefault(each.image.resolve(), each)
        if other is not each:
            msg = (
                f"The image `{each.image}` is named by {other.named_by} and by {each.named_by}, but has one label and "
                "one purpose. Name folders that do not contain each other, or patterns, or remove a line."
            )
            raise ValueError(msg)
    found = inspect_masks([(each.image, each.mask) for each in images])
    labels = [_label_of(each, has_defect=has_defect) for each, has_defect in zip(images, found, strict=True)]
    return DataFrame(
        {
            "image_path": [str(each.image) for each in images],
            "mask_path": [str(each.mask or "") for each in images],
            "label_index": labels,
            "split": [each.split.value for each in images],
            "kind": kinds_of([each.word if label else "" for each, label in zip(images, labels, strict=True)]),
            "has_boxes": [each.has_boxes for each in images],
        }
    )


def _label_of(image: AnnotatedImage, *, has_defect: bool | None) -> int:
    """Return the label of an image, given what its mask shows; None if it has none."""
    if has_defect is None:
        return int(image.label or LabelName.NORMAL)
    if image.label is not None and image.label != has_defect:
        named, shown = ("normal", "shows a defect") if has_defect else ("defective", "is all black or transparent")
        msg = (
            f"The image `{image.image}` is named as {named} ({image.named_by}), but its mask `{image.mask}` {shown}. "
            "Correct the mask, or name the image otherwise."
        )
        raise ValueError(msg)
    return int(has_defect)


def read_image_table(path: Path, roots: Sequence[Path]) -> list[AnnotatedImage]:
    """Read a CSV file that lists images.

    Args:
        path: File with a header line and at least the column ``image``; separated by commas, semicolons or tabs.
        roots: Folders that relative paths may start from, in order of preference.

    Returns:
        The images, in the order of the file; without a column ``split`` all for training.

    Raises:
        FileNotFoundError: If the file, an image or a mask does not exist.
        ValueError: If a column, a label or a split is not understood.
    """
    rows = _rows(path, ("image",), ("label", "mask"))
    without = [where for where, row in rows if not row.get("split")]
    if 0 < len(without) < len(rows):
        msg = f"{without[0]} has no split, as {len(without)} of {len(rows)}. Write `train` or `test` into all, or none."
        raise ValueError(msg)
    return [_annotated(where, row, roots) for where, row in rows]


def read_kind_table(path: Path) -> dict[tuple[str, str], str]:
    """Read a CSV file with the columns ``split``, ``id`` and ``kind`` (or ``class``): words, see :func:`kinds_of`.

    Raises:
        ValueError: If a column is missing or a line is not understood.
    """
    rows = _rows(path, ("split",), ("id",), _KIND_COLUMNS)
    return {(row["split"].lower(), row["id"]): _kind(row) for _, row in rows}


def kinds_of(words: Sequence[str]) -> list[str]:
    """Find the kinds of defects among what tables or folders call the images of a data set.

    A word that says no more than normal or defective gives an empty kind. Labels such as 1 or true are kinds only among
    others, such as the classes 1 to 4.

    Example:
        >>> kinds_of(["scratch", "bad", ""]), kinds_of(["1", "1"]), kinds_of(["1", "2"])
        (['scratch', '', ''], ['', ''], ['1', '2'])
    """
    kinds = [word.strip() if _names_kind(word) else "" for word in words]
    are_labels = {kind.lower() for kind in kinds} <= {"", *_NUMBERS}
    return [""] * len(kinds) if are_labels else kinds


def words_of_folders(images: Sequence[Path], entries: Sequence[str | Path], root: Path) -> list[str]:
    """Find what folders call the images in them.

    Of several folders among the entries of an argument (relative to the root), each is a kind by its own name; of a
    single one, the folders below it are, as in MVTec AD's layout. An image in no such folder gets an empty word.
    """
    folders = {path for path in (root / Path(entry).expanduser() for entry in entries) if path.is_dir()}
    words = []
    for image in images:
        names: tuple[str, ...] = ()
        if innermost := next((parent for parent in image.parents if parent in folders), None):
            names = image.parent.relative_to(innermost.parent if len(folders) > 1 else innermost).parts
        words.append(next(filter(_names_kind, names), ""))
    return words


def _names_kind(word: str) -> bool:
    return word.strip().lower() not in _WORDS_WITHOUT_KIND


def _kind(row: dict[str, str]) -> str:
    return next((row[name] for name in _KIND_COLUMNS if name in row), "")


def _rows(path: Path, *needed: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """Read the lines of a CSV file: where each is, in words, and its cells by column.

    One column of each group in ``needed`` has to be there.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator)
            lines = [(f"Line {reader.line_num} of `{path}`", [cell.strip() for cell in cells]) for cells in reader]
    except UnicodeDecodeError as error:
        msg = f"The file `{path}` is not in UTF-8 ({error}). Save it as `CSV UTF-8`."
        raise ValueError(msg) from error
    header = [name.lower() for name in lines[0][1]] if lines else []
    columns = [_COLUMNS.get(name, name) for name in header]
    for names in needed:
        if not set(names) & set(columns):
            msg = f"The header of `{path}` has to name a column `{'` or `'.join(names)}`, but it is {header}."
            raise ValueError(msg)
    rows = [(where, cells) for where, cells in lines[1:] if any(cells)]
    for where, cells in rows:
        if len(cells) != len(columns):
            msg = f"{where} has {len(cells)} cells, but the header has {len(columns)}."
            raise ValueError(msg)
    return [(where, dict(zip(columns, cells, strict=True))) for where, cells in rows]


def _annotated(where: str, row: dict[str, str], roots: Sequence[Path]) -> AnnotatedImage:
    mask, label, split = row.get("mask", ""), row.get("label", "").lower(), row.get("split", "").lower()
    if label not in {"", *_NORMAL_WORDS, *_DEFECTIVE_WORDS}:
        msg = f"{where} has the label `{label}`, but it has to be `normal` or `defective` (or `good`, `bad`, 0 or 1)."
        raise ValueError(msg)
    if split not in {"", Split.TRAIN.value, Split.TEST.value}:
        msg = (
            f"{where} has the split `{split}`, but it has to be `train` or `test`. Validation images, if you want any, "
            "are drawn from the training images (`val_split_ratio`)."
        )
        raise ValueError(msg)
    return AnnotatedImage(
        image=_find(where, "image", row["image"], roots),
        mask=_find(where, "mask", mask, roots) if mask else None,
        label=None if mask and not label else int(label in _DEFECTIVE_WORDS),
        split=Split(split or Split.TRAIN),
        named_by=where,
        word=_kind(row),
    )


def _find(where: str, kind: str, name: str, roots: Sequence[Path]) -> Path:
    for path in (root / spelling for root in roots for spelling in (name, name.replace("\\", "/"))):
        if path.is_file():
            return path
    msg = f"{where} names the {kind} `{name}`, but there is no such file in `{'` or `'.join(map(str, roots))}`."
    raise FileNotFoundError(msg)
