"""Finding a user's files: folders, single files, glob patterns, and which mask belongs to which image."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from .reading import IMAGE_EXTENSIONS

logger = logging.getLogger(__name__)

PathSpec = str | Path | list[str | Path]
"""A folder (with all folders in it), a file, a glob pattern, or a list of these."""

COMMON_MASK_SUFFIXES = (
    *("_mask", "_masks", "_gt", "_ground_truth", "_label", "_labels", "_seg", "_segmentation"),
    *("-mask", "-gt", "-label", "-seg"),
)

_SHOWN_NAMES = 5


class FilesOfEnding(NamedTuple):
    """How many files end alike, and the name of one of them."""

    number: int
    example: str


def list_images(argument: str, paths: PathSpec, root: Path) -> list[Path]:
    """List the image files that an argument names.

    Args:
        argument: Name of the argument, for messages.
        paths: Its value.
        root: Folder that relative paths start from.

    Returns:
        Sorted paths, without hidden files.

    Raises:
        FileNotFoundError: If an entry names nothing, or no image.
    """
    entries = paths if isinstance(paths, list) else [paths]
    if not entries:
        msg = f"Argument `{argument}` is an empty list. Name a folder, a file or a glob pattern, or leave it out."
        raise FileNotFoundError(msg)
    return sorted({path for entry in entries for path in _list_entry(argument, entry, root)})


def _list_entry(argument: str, entry: str | Path, root: Path) -> list[Path]:
    path = root / Path(entry).expanduser()
    if path.is_file():
        if path.suffix.lower() not in IMAGE_EXTENSIONS:
            msg = f"Argument `{argument}` names `{path}`, which is no image. Known are {', '.join(IMAGE_EXTENSIONS)}."
            raise FileNotFoundError(msg)
        return [path]
    if path.is_dir():
        anchor, found = path, list(path.rglob("*"))
    elif any(sign in str(entry) for sign in "*?["):
        anchor = Path(path.anchor) if Path(entry).expanduser().is_absolute() else root
        found = list(anchor.glob(str(path.relative_to(anchor))))
    else:
        msg = (
            f"Argument `{argument}` names `{entry}`, but there is no `{path}`. It has to be a folder, a file or a glob "
            f"pattern; `{path.parent}` {contents_of(path.parent)}."
        )
        raise FileNotFoundError(msg)
    visible = [file for file in found if _is_visible_file(file, anchor)]
    images = [file for file in visible if file.suffix.lower() in IMAGE_EXTENSIONS]
    if not images:
        msg = (
            f"Argument `{argument}` names `{path}`, but there is no image among the {len(found)} files and folders "
            f"found. Images end in {', '.join(IMAGE_EXTENSIONS)}."
        )
        raise FileNotFoundError(msg)
    if others := _by_ending(set(visible) - set(images)):
        logger.info("Left out of argument `%s`: %s.", argument, count_endings(others))
    return images


def other_files(folder: Path, files: Collection[Path]) -> dict[str, FilesOfEnding]:
    """Count what is in a folder, and in all folders in it, besides the given files and hidden ones."""
    folder, known = folder.resolve(), {path.resolve() for path in files}
    return _by_ending(
        path for path in folder.rglob("*") if _is_visible_file(path, folder) and path.resolve() not in known
    )


def _by_ending(files: Iterable[Path]) -> dict[str, FilesOfEnding]:
    """Count files by what their names end in, lower case, the most frequent first; empty for names without ending."""
    names: dict[str, list[str]] = defaultdict(list)
    for path in files:
        names[path.suffix.lower()].append(path.name)
    sorted_names = sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    return {ending: FilesOfEnding(len(alike), min(alike)) for ending, alike in sorted_names}


def count_endings(files: Mapping[str, FilesOfEnding]) -> str:
    """Format counts for messages: ``3 .jfif (such as a.jfif), 1 .txt (notes.txt)``."""
    return ", ".join(
        f"{number} {ending or 'without ending'} ({'such as ' if number > 1 else ''}{example})"
        for ending, (number, example) in files.items()
    )


def separate_masks(
    argument: str, images: Sequence[Path], masks: Iterable[Path], suffixes: Sequence[str]
) -> tuple[list[Path], list[Path]]:
    """Separate images from masks that lie in the same folder.

    Args:
        argument: Name of the argument that named the images, for messages.
        images: What it names.
        masks: What the argument for masks names.
        suffixes: What may follow an image's name in the name of its mask, lower case.

    Returns:
        The images, and the masks that were among them.

    Raises:
        ValueError: If a file looks like the mask of the image beside it, but is not named as a mask; or if all images
            are named as masks.
    """
    if not images:
        return [], []
    known_masks = set(masks)
    found: set[Path] = set()
    for files in _by_folder(images).values():
        paired = set(named_like_masks(files, suffixes))
        if unlisted := sorted(paired - known_masks):
            msg = (
                f"`{unlisted[0]}` was found as an image of argument `{argument}`, but looks like the mask of the "
                "image beside it. Name its folder in the argument for masks too (that may be the folder of the "
                "images), or rename the file if it is an image of its own."
            )
            raise ValueError(msg)
        found |= paired or known_masks.intersection(files)
    if len(found) == len(images):
        msg = (
            f"All {len(images)} files of argument `{argument}`, such as `{images[0]}`, are named as masks too, and "
            "none has the name of an image plus a suffix. Give images and masks folders of their own, or set "
            "`mask_suffix`."
        )
        raise ValueError(msg)
    return [path for path in images if path not in found], sorted(found)


def named_like_masks(files: Iterable[Path], suffixes: Sequence[str]) -> dict[Path, list[Path]]:
    """Find files with the name of another file in their folder plus a suffix, each with the files it may mask."""
    pairs: dict[Path, list[Path]] = {}
    for folder in _by_folder(files).values():
        by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in folder:
            by_stem[path.stem].append(path)
        for path in folder:
            stems = sorted(_image_stems(path, suffixes) - {path.stem})
            if images := [image for stem in stems for image in by_stem.get(stem, ())]:
                pairs[path] = images
    return pairs


def match_masks(images: Sequence[Path], masks: Sequence[Path], suffixes: Sequence[str]) -> dict[Path, Path]:
    """Find the mask of each image that has one, by its name.

    A mask fits if its stem is the image's, or the image's plus a suffix. Among several that fit, the one whose folder
    has the image's folder name is meant (``test/scratch/000.png`` and ``masks/scratch/000_mask.png``).

    Raises:
        ValueError: If two masks fit an image, or one mask fits two images.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        for stem in _image_stems(mask, suffixes):
            by_stem[stem].append(mask)
    matches: dict[Path, Path] = {}
    for image in images:
        fitting = by_stem[image.stem]
        if len(fitting) > 1:
            common = [_common_folders(image, mask) for mask in fitting]
            fitting = [mask for mask, count in zip(fitting, common, strict=True) if count == max(common)]
        if len(fitting) > 1:
            msg = (
                f"Two masks fit the image `{image}`: `{fitting[0]}` and `{fitting[1]}`. Set `mask_suffix` to what "
                "follows the image's name, or put masks into folders named like those of their images."
            )
            raise ValueError(msg)
        if fitting:
            matches[image] = fitting[0]
    users = Counter(matches.values())
    if shared := sorted(mask for mask, count in users.items() if count > 1):
        both = sorted(image for image, mask in matches.items() if mask == shared[0])
        msg = (
            f"The mask `{shared[0]}` fits two images: `{both[0]}` and `{both[1]}`. Give every image a mask of its own, "
            "and put masks into folders named like those of their images."
        )
        raise ValueError(msg)
    return matches


def contents_of(folder: Path) -> str:
    """Describe a folder for messages: ``holds `a`, `b` and 3 more``, ``is empty``, ``does not exist``."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "does not exist"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is empty"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return "holds " + ", ".join(f"`{name}`" for name in names[:_SHOWN_NAMES]) + more


def _by_folder(files: Iterable[Path]) -> dict[Path, list[Path]]:
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        by_folder[path.parent].append(path)
    return by_folder


def _image_stems(mask: Path, suffixes: Sequence[str]) -> set[str]:
    """Stems that an image with this mask may have."""
    stem = mask.stem
    return {stem[: len(stem) - len(suffix)] for suffix in suffixes if stem.lower().endswith(suffix)}


def _common_folders(image: Path, mask: Path) -> int:
    """Number of folder names that two paths share, counted from the file upwards."""
    pairs = zip(reversed(image.parent.parts), reversed(mask.parent.parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _is_visible_file(path: Path, anchor: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(anchor).parts)
    return not hidden and path.is_file()
