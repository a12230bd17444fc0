"""Finding a user's files: folders, single files, glob patterns, and which mask belongs to which image."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from glob import escape, glob
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


def entries_of(paths: PathSpec | None) -> list[str | Path]:
    """List what an argument names; nothing for None."""
    if isinstance(paths, list):
        return paths
    return [] if paths is None else [paths]


def visible_files(entry: str | Path, root: Path) -> list[Path]:
    """List the files that an entry names, sorted: a file, a folder with all folders in it, or a glob pattern.

    Relative entries start from the root. What is hidden is left out, unless it is named itself.
    """
    path = Path(entry).expanduser()
    pattern = str(path)
    if (root / path).exists():
        pattern = os.path.join(escape(pattern), "**") if (root / path).is_dir() else escape(pattern)  # noqa: PTH118
    # Unlike Path.glob, it leaves out what is hidden, and takes absolute patterns.
    found = {root / name for name in glob(pattern, root_dir=root, recursive=True)}  # noqa: PTH207
    return sorted(path for path in found if path.is_file())


def list_images(argument: str, paths: PathSpec, root: Path) -> list[Path]:
    """List the image files that an argument of this name and value names, sorted, without hidden files.

    Relative paths start from the root.

    Raises:
        FileNotFoundError: If an entry names no image.
    """
    images: set[Path] = set()
    for entry in entries_of(paths):
        files = visible_files(entry, root)
        found = {path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS}
        images |= found
        if not found:
            path = root / Path(entry).expanduser()
            folder = path if path.is_dir() else path.parent
            msg = (
                f"Argument `{argument}` names `{entry}`, but there is no image among the {len(files)} files found: "
                f"`{folder}` {contents_of(folder)}. Name a folder, a file or a glob pattern; images end in "
                f"{', '.join(IMAGE_EXTENSIONS)}."
            )
            raise FileNotFoundError(msg)
        if others := _by_ending(set(files) - found):
            logger.info("Left out of argument `%s`: %s.", argument, count_endings(others))
    return sorted(images)


def other_files(folder: Path, files: Collection[Path]) -> dict[str, FilesOfEnding]:
    """Count what is in a folder, and in all folders in it, besides the given files and hidden ones."""
    known = {path.resolve() for path in files}
    return _by_ending(path for path in visible_files(".", folder) if path.resolve() not in known)


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
    """Separate the images that an argument names from the masks among them, and return both.

    Args:
        argument: Name of the argument, for messages.
        images: What it names.
        masks: What the argument for masks names.
        suffixes: What may follow an image's name in the name of its mask, lower case.

    Raises:
        ValueError: If a file looks like the mask of another, but is not named as one; or if all are named as masks.
    """
    known = set(masks)
    paired = set(named_like_masks(images, suffixes))
    if unlisted := sorted(paired - known):
        msg = (
            f"`{unlisted[0]}` was found as an image of argument `{argument}`, but looks like the mask of the image "
            "beside it. Name its folder in the argument for masks too, or rename the file if it is an image."
        )
        raise ValueError(msg)
    # Where masks have names of their own, a file named as both is an image: its folder was named for its masks.
    mixed = {path.parent for path in paired}
    found = paired | {path for path in known.intersection(images) if path.parent not in mixed}
    if images and len(found) == len(images):
        msg = (
            f"All {len(images)} files of argument `{argument}`, such as `{images[0]}`, are named as masks too. Give "
            "images and masks folders of their own, or set `mask_suffix` to what follows the image's name."
        )
        raise ValueError(msg)
    return [path for path in images if path not in found], sorted(found)


def named_like_masks(files: Sequence[Path], suffixes: Sequence[str]) -> dict[Path, list[Path]]:
    """Find files with the name of another file in their folder plus a suffix, each with the files it may mask."""
    by_name: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in files:
        by_name[path.parent, path.stem].append(path)
    pairs: dict[Path, list[Path]] = {}
    for path in files:
        stems = sorted(_image_stems(path, suffixes) - {path.stem})
        if images := [image for stem in stems for image in by_name.get((path.parent, stem), ())]:
            pairs[path] = images
    return pairs


def match_masks(images: Sequence[Path], masks: Sequence[Path], suffixes: Sequence[str]) -> dict[Path, Path]:
    """Find the mask of each image that has one, by its name.

    A mask fits if its stem is the image's, or the image's plus a suffix. Among several that fit, the :func:`nearest` to
    the image's folder is meant (``test/scratch/000.png`` and ``masks/scratch/000_mask.png``).

    Raises:
        ValueError: If two masks fit an image, or one mask fits two images.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        for stem in _image_stems(mask, suffixes):
            by_stem[stem].append(mask)
    image_of: dict[Path, Path] = {}
    for image in images:
        fitting = nearest(by_stem[image.stem], image.parent)
        if len(fitting) > 1:
            msg = (
                f"Two masks fit the image `{image}`: `{fitting[0]}` and `{fitting[1]}`. Set `mask_suffix` to what "
                "follows the image's name, or put masks into folders named like those of their images."
            )
            raise ValueError(msg)
        for mask in fitting:
            if (other := image_of.setdefault(mask, image)) != image:
                msg = (
                    f"The mask `{mask}` fits two images: `{other}` and `{image}`. Give every image its own mask, and "
                    "put masks into folders named like those of their images."
                )
                raise ValueError(msg)
    return {image: mask for mask, image in image_of.items()}


def nearest(files: Sequence[Path], folder: Path) -> list[Path]:
    """Choose the files whose folder has most names in common with another, from the end, then from the start.

    That finds ``images/train/7.jpg`` for ``labels/train/``, and ``train/images/7.jpg`` for ``train/labels/``.
    """

    def closeness(path: Path) -> tuple[int, int]:
        ours, theirs = path.parent.parts, folder.parts
        return _common_start(ours[::-1], theirs[::-1]), _common_start(ours, theirs)

    closest = max(map(closeness, files), default=None)
    return [path for path in files if closeness(path) == closest]


def contents_of(folder: Path) -> str:
    """Describe a folder for messages: ``holds `a`, `b` and 3 more``, ``is empty``, ``does not exist``."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "does not exist"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "is empty"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return "holds " + ", ".join(f"`{name}`" for name in names[:_SHOWN_NAMES]) + more


def _common_start(first: Sequence[str], second: Sequence[str]) -> int:
    """Count the names that two paths have in common before they differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _image_stems(mask: Path, suffixes: Sequence[str]) -> set[str]:
    """Stems that an image with this mask may have."""
    return {mask.stem[: len(mask.stem) - len(suffix)] for suffix in suffixes if mask.stem.lower().endswith(suffix)}
