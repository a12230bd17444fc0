"""What CSV files and names of folders say about images: masks, labels, splits and kinds of defects."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anomalib.data.utils import LabelName, Split

from anomalib_exdd.images.file_discovery import PathSpec

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
    split: Split | None  # None: not said
    named_by: str  # argument or line, for messages
    word: str = ""  # about the kind of the defect, see `kinds_of`
    has_boxes: bool = False  # in the mask, around defects, instead of their outlines


def read_image_table(path: Path, roots: list[Path]) -> list[AnnotatedImage]:
    """Read a CSV file that lists images.

    Args:
        path: File with a header line and at least the column ``image``; separated by commas, semicolons or tabs.
        roots: Folders that relative paths may start from, in order of preference.

    Returns:
        The images, in the order of the file. Either all or none have a split.

    Raises:
        FileNotFoundError: If the file, an image or a mask does not exist.
        ValueError: If a column, a label or a split is not understood.
    """
    images = [_annotated(where, row, roots) for where, row in _rows(path, ("image",), ("label", "mask"))]
    unassigned = [each.named_by for each in images if each.split is None]
    if unassigned and len(unassigned) < len(images):
        msg = (
            f"{unassigned[0]} has no split ({len(unassigned)} of {len(images)} lines), others have one. Write `train` "
            "or `test` into every line, or leave out the column to hold out a share for testing."
        )
        raise ValueError(msg)
    return images


def read_kind_table(path: Path) -> dict[tuple[str, str], str]:
    """Read a CSV file with the columns ``split``, ``id`` and ``kind`` (or ``class``).

    Returns:
        For split and id of an image what the file says, see :func:`kinds_of`.

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


def words_of_folders(images: Sequence[Path], paths: PathSpec | None, root: Path) -> list[str]:
    """Find what folders call the images in them.

    Of several folders that are named, each is a kind by its own name; otherwise the folders below the one that is named
    are, as in MVTec AD's layout.

    Args:
        images: Images that ``paths`` names.
        paths: Value of an argument.
        root: Folder that relative paths start from.

    Returns:
        A word for each image; empty for one that lies in no named folder, or directly in a single one.
    """
    entries = [entry for entry in (paths if isinstance(paths, list) else [paths]) if entry is not None]
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
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except UnicodeDecodeError as error:
        msg = f"The file `{path}` is not in UTF-8 ({error}). Save it as `CSV UTF-8`."
        raise ValueError(msg) from error
    header = [name.lower() for name in lines[0][1]] if lines else []
    columns = [_COLUMNS.get(name, name) for name in header]
    for names in needed:
        if not set(names) & set(columns):
            msg = f"The header of `{path}` has to name a column `{'` or `'.join(names)}`, but it is {header}."
            raise ValueError(msg)
    rows = []
    for number, cells in lines[1:]:
        where = f"Line {number} of `{path}`"
        if any(cells) and len(cells) != len(columns):
            msg = f"{where} has {len(cells)} cells, but the header has {len(columns)}."
            raise ValueError(msg)
        if any(cells):
            rows.append((where, dict(zip(columns, cells, strict=True))))
    return rows


def _annotated(where: str, row: dict[str, str], roots: list[Path]) -> AnnotatedImage:
    split, mask = row.get("split", "").lower(), row.get("mask", "")
    if split not in {"", Split.TRAIN.value, Split.TEST.value}:
        msg = (
            f"{where} has the split `{split}`, but it has to be `train` or `test`. Validation images, if you want any, "
            "are drawn from the training images (`val_split_ratio`)."
        )
        raise ValueError(msg)
    return AnnotatedImage(
        image=_find(where, "image", row["image"], roots),
        mask=_find(where, "mask", mask, roots) if mask else None,
        label=_label(where, row.get("label", ""), has_mask=bool(mask)),
        split=Split(split) if split else None,
        named_by=where,
        word=_kind(row),
    )


def _label(where: str, word: str, *, has_mask: bool) -> int | None:
    if not word and has_mask:
        return None
    if not word or word.lower() in _NORMAL_WORDS:
        return int(LabelName.NORMAL)
    if word.lower() in _DEFECTIVE_WORDS:
        return int(LabelName.ABNORMAL)
    msg = f"{where} has the label `{word}`, but it has to be `normal` or `defective` (or `good` or `bad`, or 0 or 1)."
    raise ValueError(msg)


def _find(where: str, kind: str, name: str, roots: list[Path]) -> Path:
    for path in (root / spelling for root in roots for spelling in (name, name.replace("\\", "/"))):
        if path.is_file():
            return path
    msg = f"{where} names the {kind} `{name}`, but there is no such file in `{'` or `'.join(map(str, roots))}`."
    raise FileNotFoundError(msg)
