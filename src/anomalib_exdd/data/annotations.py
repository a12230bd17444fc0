"""What CSV files and names of folders say about images: masks, labels, splits and kinds of defects."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
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
    if not path.is_file():
        msg = f"Argument `csv` names `{path}`, but there is no such file."
        raise FileNotFoundError(msg)
    images = [_annotated(where, row, roots) for where, row in _rows(path, _check_columns)]
    if not images:
        msg = f"The file `{path}` lists no image: it holds nothing but a header line."
        raise ValueError(msg)
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
        ValueError: If a column is missing, a line is not understood, or two lines contradict each other.
    """
    words: dict[tuple[str, str], str] = {}
    for where, row in _rows(path, _check_kind_columns):
        image, word = (row["split"].lower(), row["id"]), _kind(row)
        if words.setdefault(image, word) != word:
            msg = (
                f"{where} calls the image `{row['id']}` of `{row['split']}` `{word}`, but an earlier "
                f"line calls it `{words[image]}`. Remove one of them."
            )
            raise ValueError(msg)
    return words


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
    entries = paths if isinstance(paths, list) else [paths]
    named = [root / Path(entry).expanduser() for entry in entries if entry is not None]
    folders = {path for path in named if path.is_dir()}
    return [_word_of_folders(image, folders) for image in images]


def _word_of_folders(image: Path, folders: set[Path]) -> str:
    innermost = next((parent for parent in image.parents if parent in folders), None)
    if innermost is None:
        return ""
    names = image.parent.relative_to(innermost).parts
    if len(folders) > 1:
        names = (innermost.name, *names)
    return next(filter(_names_kind, names), "")


def _names_kind(word: str) -> bool:
    return word.strip().lower() not in _WORDS_WITHOUT_KIND


def _rows(path: Path, check: Callable[[Path, list[str], list[str]], None]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield number of the line, in words, and its cells by column, after a check of header and columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header_line = file.readline()
            separator = max(",;\t", key=header_line.count)
            header = [name.strip().lower() for name in next(csv.reader([header_line], delimiter=separator), [])]
            columns = [_COLUMNS.get(name, name) for name in header]
            check(path, header, columns)
            reader = csv.reader(file, delimiter=separator)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"Line {reader.line_num + 1} of `{path}`"  # the header is line 1
                if len(cells) != len(columns):
                    msg = f"{where} has {len(cells)} cells, but the header has {len(columns)}."
                    raise ValueError(msg)
                yield where, {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
    except UnicodeDecodeError as error:
        msg = f"The file `{path}` is not in UTF-8 ({error}). Save it as `CSV UTF-8`."
        raise ValueError(msg) from error
    except csv.Error as error:
        msg = f"The file `{path}` is no CSV file ({error})."
        raise ValueError(msg) from error


def _check_columns(path: Path, header: list[str], columns: list[str]) -> None:
    if "image" not in columns:
        msg = (
            f"The header of `{path}` has to name the column `image` (and may name `mask`, `label`, `split` and "
            f"`kind`), but it is {header}."
        )
        raise ValueError(msg)
    if "label" not in columns and "mask" not in columns:
        msg = f"The header of `{path}` has to name a column `label` or `mask`, or both, but it is {header}."
        raise ValueError(msg)
    if repeated := [name for name in ("image", "kind", "label", "mask", "split") if columns.count(name) > 1]:
        msg = f"The header of `{path}` names the column `{repeated[0]}` twice: {header}."
        raise ValueError(msg)


def _check_kind_columns(path: Path, header: list[str], columns: list[str]) -> None:
    if not {"split", "id"} <= set(columns) or not set(_KIND_COLUMNS) & set(columns):
        msg = (
            f"The header of `{path}` has to name the columns `split`, `id` and `kind` (or `class`), but it is "
            f"{header}. Correct it, or remove the file if it is not about the kinds of defects."
        )
        raise ValueError(msg)


def _kind(row: dict[str, str]) -> str:
    return next((row[name] for name in _KIND_COLUMNS if name in row), "")


def _annotated(where: str, row: dict[str, str], roots: list[Path]) -> AnnotatedImage:
    if not row["image"]:
        msg = f"{where} names no image."
        raise ValueError(msg)
    split = row.get("split", "").lower()
    if split not in {"", Split.TRAIN.value, Split.TEST.value}:
        msg = (
            f"{where} has the split `{split}`, but it has to be `train` or `test`. Validation images, if you want any, "
            "are drawn from the training images (`val_split_ratio`)."
        )
        raise ValueError(msg)
    mask = row.get("mask", "")
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
    candidates = [root / Path(spelling) for root in roots for spelling in (name, name.replace("\\", "/"))]
    if found := next((path for path in candidates if path.is_file()), None):
        return found
    tried = ", ".join(f"`{path}`" for path in dict.fromkeys(candidates))
    msg = f"{where} names the {kind} `{name}`, but there is no such file; looked at {tried}."
    raise FileNotFoundError(msg)
