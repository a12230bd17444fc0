"""Kinds of defects, such as "scratch" and "dent": what tables and the names of folders say about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anomalib_exdd.images.sources import Source

SOURCES_NAME = "sources.csv"
"""Table in a folder of KSDD2's layout that names the kinds of its defects."""

NORMAL_WORDS = frozenset({"normal", "good", "ok", "0", "0.0", "false"})
DEFECTIVE_WORDS = frozenset(
    {"defective", "defect", "bad", "abnormal", "anomalous", "anomaly", "nok", "1", "1.0", "true"}
)
_NUMBERS = frozenset({"0", "0.0", "false", "1", "1.0", "true"})
_PLAIN_WORDS = (NORMAL_WORDS | DEFECTIVE_WORDS) - _NUMBERS
_PLAIN_WORDS |= {"", "defects", "anomalies", "ng", "unknown", "none", "nan", "image", "images", "img", "imgs"}


def kinds_of(words: Sequence[str]) -> list[str]:
    """Find the kinds of defects among what tables or folders call the defective images of a data set.

    Args:
        words: A word for each image; empty where there is none.

    Returns:
        The kind of each image; empty where the word says no more than normal or defective. Labels such as 1 or true
        are kinds only among others, such as the classes 1 to 4.

    Example:
        >>> kinds_of(["scratch", "bad", ""]), kinds_of(["1", "1"]), kinds_of(["1", "2"])
        (['scratch', '', ''], ['', ''], ['1', '2'])
    """
    kinds = ["" if _is_plain(word) else word.strip() for word in words]
    are_labels = {kind.lower() for kind in kinds} <= {"", *_NUMBERS}
    return [""] * len(kinds) if are_labels else kinds


def words_of_folders(images: Sequence[Path], source: Source | None, root: Path) -> list[str]:
    """Find what folders call the images in them.

    Of several folders that are named, each is a kind by its own name; otherwise the folders below the one that is named
    are, as in MVTec AD's layout.

    Args:
        images: Images that ``source`` names.
        source: A folder, a file, a glob pattern, or a list of these.
        root: Folder that relative entries start from.

    Returns:
        A word for each image, for :func:`kinds_of`; empty for an image that lies in no named folder, or directly in a
        single one.
    """
    entries = source if isinstance(source, list) else [source]
    paths = [root / Path(entry).expanduser() for entry in entries if entry is not None]
    folders = {path for path in paths if path.is_dir()}
    return [_word(image, folders) for image in images]


def _word(image: Path, folders: set[Path]) -> str:
    around = [parent for parent in image.parents if parent in folders]
    if not around:
        return ""
    folder = around[0]  # the innermost
    names = image.parent.relative_to(folder).parts
    if len(folders) > 1:
        names = (folder.name, *names)
    return next((name for name in names if not _is_plain(name)), "")


def _is_plain(word: str) -> bool:
    return word.strip().lower() in _PLAIN_WORDS
