"""Reading a data set from a CSV file: one line per image, with its mask, label, split and kind of defect."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anomalib.data.utils import LabelName

from .kinds import DEFECTIVE_WORDS, NORMAL_WORDS

# Names that Anomalib's own tables use are understood too.
_COLUMNS = {"image_path": "image", "mask_path": "mask", "label_index": "label"}
_KIND_COLUMNS = ("kind", "defect_type", "class")  # the first of them that there is
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class CsvSample:
    """One line of the file.

    Attributes:
        line: Line number, counted from 1 with the header.
        image: The image.
        mask: Its mask, if any.
        label: 0 normal, 1 defective; None if the mask decides.
        split: ``train``, ``test``, or empty if the file has no splits.
        kind: What the file says about the kind of the defect, see :func:`.kinds_of`.
    """

    line: int
    image: Path
    mask: Path | None
    label: int | None
    split: str
    kind: str


def read_csv_samples(path: Path, roots: list[Path]) -> list[CsvSample]:
    """Read a CSV file that lists images.

    Args:
        path: File with a header line and at least the column ``image``; separated by commas, semicolons or tabs.
        roots: Folders that relative paths may start from, in order of preference.

    Returns:
        Its samples, in the order of the file.

    Raises:
        FileNotFoundError: If the file, an image or a mask does not exist.
        ValueError: If a column, a label or a split is not understood, or an image is listed twice.
    """
    if not path.is_file():
        msg = f"Argument `csv` names `{path}`, but there is no such file."
        raise FileNotFoundError(msg)
    samples = [_sample(path, line, row, roots) for line, row in _rows(path, _check_columns)]
    if not samples:
        msg = f"The file `{path}` lists no image: it holds nothing but a header line."
        raise ValueError(msg)
    _check_splits(path, samples)
    first_lines: dict[Path, int] = {}
    for sample in samples:
        first = first_lines.setdefault(sample.image.resolve(), sample.line)
        if first != sample.line:
            msg = f"Lines {first} and {sample.line} of `{path}` both list the image `{sample.image}`. Remove one."
            raise ValueError(msg)
    return samples


def read_kinds(path: Path) -> dict[tuple[str, str], str]:
    """Read a CSV file that names the kinds of defects of images that are listed elsewhere.

    Args:
        path: File with the columns ``split``, ``id`` and ``kind`` (or ``class``), one line per image.

    Returns:
        For split and id of an image what the file says, see :func:`.kinds_of`.

    Raises:
        ValueError: If a column is missing, a line is not understood, or two lines contradict each other.
    """
    words: dict[tuple[str, str], str] = {}
    for line, row in _rows(path, _check_kind_columns):
        image, word = (row["split"].lower(), row["id"]), _kind(row)
        if words.setdefault(image, word) != word:
            msg = (
                f"Line {line} of `{path}` calls the image `{row['id']}` of `{row['split']}` `{word}`, but an earlier "
                f"line calls it `{words[image]}`. Remove one of them."
            )
            raise ValueError(msg)
    return words


def _rows(path: Path, check: Callable[[Path, list[str], list[str]], None]) -> Iterator[tuple[int, dict[str, str]]]:
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
                line = reader.line_num + 1
                if len(cells) != len(columns):
                    msg = f"Line {line} of `{path}` has {len(cells)} cells, but the header has {len(columns)}."
                    raise ValueError(msg)
                yield line, {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
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
    if repeated := sorted(
        {name for name in columns if name in {"image", "mask", "label", "split", "kind"} and columns.count(name) > 1}
    ):
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


def _sample(path: Path, line: int, row: dict[str, str], roots: list[Path]) -> CsvSample:
    if not row["image"]:
        msg = f"Line {line} of `{path}` names no image."
        raise ValueError(msg)
    split = row.get("split", "").lower()
    if split not in {"", *_SPLITS}:
        msg = (
            f"Line {line} of `{path}` has the split `{split}`, but it has to be `train` or `test`. Validation images, "
            "if you want any, are drawn from the training images (`val_split_ratio`)."
        )
        raise ValueError(msg)
    mask = row.get("mask", "")
    return CsvSample(
        line=line,
        image=_find(path, line, "image", row["image"], roots),
        mask=_find(path, line, "mask", mask, roots) if mask else None,
        label=_label(path, line, row.get("label", ""), has_mask=bool(mask)),
        split=split,
        kind=_kind(row),
    )


def _label(path: Path, line: int, word: str, *, has_mask: bool) -> int | None:
    if word.lower() in NORMAL_WORDS:
        return int(LabelName.NORMAL)
    if word.lower() in DEFECTIVE_WORDS:
        return int(LabelName.ABNORMAL)
    if word:
        msg = (
            f"Line {line} of `{path}` has the label `{word}`, but it has to be `normal` or `defective` (or `good` or "
            "`bad`, or 0 or 1)."
        )
        raise ValueError(msg)
    return None if has_mask else int(LabelName.NORMAL)


def _find(path: Path, line: int, kind: str, name: str, roots: list[Path]) -> Path:
    candidates = [root / Path(spelling) for root in roots for spelling in (name, name.replace("\\", "/"))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(f"`{candidate}`" for candidate in dict.fromkeys(candidates))
    msg = f"Line {line} of `{path}` names the {kind} `{name}`, but there is no such file; looked at {tried}."
    raise FileNotFoundError(msg)


def _check_splits(path: Path, samples: list[CsvSample]) -> None:
    unassigned = [sample.line for sample in samples if not sample.split]
    if unassigned and len(unassigned) < len(samples):
        msg = (
            f"Line {unassigned[0]} of `{path}` has no split ({len(unassigned)} of {len(samples)} lines), others have "
            "one. Write `train` or `test` into every line, or leave out the column to hold out a share for testing."
        )
        raise ValueError(msg)
