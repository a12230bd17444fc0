"""Masks drawn from the files of annotation tools, for the images that these mark.

All that follows (training, metrics, reports) then reads masks as if they had been drawn by hand.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.draw import polygon

from anomalib_exdd.images.file_discovery import PathSpec, common_start, visible_files
from anomalib_exdd.images.reading import IMAGE_EXTENSIONS, inspect_image, map_files
from anomalib_exdd.utils.files import write_atomically

from .annotation_formats import CLASS_NAMES, ImageShapes, Shape, class_names, read_annotations

logger = logging.getLogger(__name__)

MASKS_FOLDER = ".masks"
"""Folder of drawn masks in the root; hidden, so that they are not taken for images."""
BOX_LEVEL, OUTLINE_LEVEL = 128, 255  # either is defect; they differ for who looks at the mask
_ANNOTATION_ENDINGS = {".json", ".txt", ".xml"}


class DrawnMask(NamedTuple):
    """The mask of an image, the kind of what is most of it, and whether any of it is a box around a defect."""

    path: Path | None
    kind: str = ""
    has_boxes: bool = False


class MarkedImages(NamedTuple):
    """Images with their masks, and those without a mark that are listed in the same files or lie beside them."""

    masks: dict[Path, DrawnMask]
    unmarked: list[Path]


def separate_annotations(paths: PathSpec | None, root: Path) -> tuple[list[Path], list[str | Path]]:
    """Separate what an argument for masks names into annotation files and other entries.

    A folder that holds both images and annotation files counts as annotations: the images are those that are annotated.
    Text files beside images have to be named like one of them.

    Returns:
        Annotation files, sorted, and the entries that name none.
    """
    files: set[Path] = set()
    others: list[str | Path] = []
    for entry in paths if isinstance(paths, list) else [paths]:
        if entry is not None:
            found = _annotations_in(visible_files(entry, root))
            files.update(found)
            others += [] if found else [entry]
    return sorted(files), others


def _annotations_in(files: Sequence[Path]) -> list[Path]:
    images = {each.stem for each in _images_in(files)}
    return [
        each
        for each in files
        if each.suffix.lower() in _ANNOTATION_ENDINGS
        and each.name not in CLASS_NAMES
        and (not images or each.suffix.lower() != ".txt" or each.stem in images)
    ]


def _images_in(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]


def draw_masks(files: Sequence[Path], root: Path, listed: Iterable[Path]) -> MarkedImages:
    """Draw the mask of every image that annotation files mark, into :data:`MASKS_FOLDER` of the root.

    A pixel is marked if its centre lies in a shape. The names of the masks change with their content: what another
    training reads is never overwritten.

    Args:
        files: Annotation files.
        root: Folder in which images are looked for, by the name that a file gives them.
        listed: Images that are looked at first.

    Raises:
        FileNotFoundError: If a marked image is missing.
        ValueError: If a file cannot be read, two images fit, or an annotation does not fit its image.
    """
    class_names.cache_clear()  # the files may have changed
    finder = _ImageFinder(root, listed)
    annotations = [each for found in map_files(read_annotations, files, "Reading annotations") for each in found]
    found: defaultdict[Path, list[ImageShapes]] = defaultdict(list)
    missing = []
    for each in annotations:
        image = finder.find(each)
        if image is not None:
            found[image].append(each)
        elif each.shapes:
            missing.append(each)
    if missing:
        msg = (
            f"The annotation file `{missing[0].file}` marks the image `{missing[0].image}`, but there is no such image "
            f"({len(missing)} of {sum(bool(each.shapes) for each in annotations)} marked images are missing). Looked "
            f"beside the file, in `{root}`, and by its name in all folders there. Put it there, correct `root`, or "
            "remove the annotation."
        )
        raise FileNotFoundError(msg)
    marked = {image: parts for image, parts in found.items() if any(part.shapes for part in parts)}
    masks = dict(zip(marked, map_files(partial(_draw, root=root), list(marked.items()), "Drawing masks"), strict=True))
    logger.info("Drew masks in %s, of images marked in annotation files: %d.", root / MASKS_FOLDER, len(masks))
    beside = {path for folder in {image.parent for image in marked} for path in _images_in(visible_files("*", folder))}
    return MarkedImages(masks, sorted((beside | set(found)) - set(marked)))


class _ImageFinder:
    """Finds images by what annotation files call them: beside the file, in the root, or by name alone."""

    def __init__(self, root: Path, listed: Iterable[Path]) -> None:
        self._root = root
        self._listed = {path.resolve(): path for path in listed}
        self._listed_by_name = _by_name(self._listed.values())

    @cached_property
    def _found_by_name(self) -> dict[tuple[bool, str], list[Path]]:
        return _by_name(_images_in(visible_files(".", self._root)))  # only where it is needed: the root may be large

    def find(self, annotation: ImageShapes) -> Path | None:
        name = Path(annotation.image.replace("\\", "/"))
        reference = annotation.file.parent / name
        has_ending = name.suffix.lower() in IMAGE_EXTENSIONS
        for path in (reference, self._root / name):
            if has_ending and path.is_file():
                return self._listed.get(path.resolve(), Path(os.path.normpath(path)))
        key = (has_ending, name.name)
        candidates = self._listed_by_name.get(key) or self._found_by_name.get(key)
        return _nearest(candidates, reference, annotation) if candidates else None


def _by_name(images: Iterable[Path]) -> dict[tuple[bool, str], list[Path]]:
    """Return images by their name, and by their name without ending."""
    by_name: defaultdict[tuple[bool, str], list[Path]] = defaultdict(list)
    for image in images:
        by_name[True, image.name].append(image)
        by_name[False, image.stem].append(image)
    return dict(by_name)


def _nearest(candidates: Sequence[Path], reference: Path, annotation: ImageShapes) -> Path:
    """Choose the image whose folder has most names in common with the reference's, from the end, then from the start.

    That finds ``images/train/7.jpg`` for ``labels/train/7.txt``, and ``train/images/7.jpg`` for ``train/labels/7.txt``.
    """

    def closeness(path: Path) -> tuple[int, int, int]:
        ours, theirs = path.parent.parts, reference.parent.parts
        return common_start(ours[::-1], theirs[::-1]), common_start(ours, theirs), -len(ours)

    first, *others = sorted(candidates, key=closeness, reverse=True)
    if others and closeness(others[0]) == closeness(first):
        msg = (
            f"Two images fit `{annotation.image}` of the annotation file `{annotation.file}`: `{first}` and "
            f"`{others[0]}`. Name the annotated images in argument `defective`, or write their folder into the file."
        )
        raise ValueError(msg)
    return first


def _draw(item: tuple[Path, Sequence[ImageShapes]], root: Path) -> DrawnMask:
    image, annotations = item
    size = inspect_image(image)
    mask = np.zeros(size, dtype=np.uint8)
    area: Counter[str] = Counter()
    for annotation in annotations:
        _check_size(image, size, annotation)
        for shape in annotation.shapes:
            scale = size[::-1] if annotation.is_relative else (1, 1)
            pixels = _pixels_of(shape, size, scale)
            if not pixels.any():
                msg = (
                    f"The annotation file `{annotation.file}` marks nothing within the image `{image}` by a shape of "
                    f"the class `{shape.kind}`. Correct or remove the shape."
                )
                raise ValueError(msg)
            area[shape.kind] += int(pixels.sum())
            mask[pixels] = np.maximum(mask[pixels], BOX_LEVEL if shape.is_box else OUTLINE_LEVEL)
    has_boxes = any(shape.is_box for annotation in annotations for shape in annotation.shapes)
    return DrawnMask(_save(mask, image, root), area.most_common(1)[0][0], has_boxes)


def _pixels_of(shape: Shape, size: tuple[int, int], scale: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels of an image a shape covers, boolean, shape (H, W)."""
    drawn = np.zeros(size, dtype=np.uint8)
    points = shape.points * scale
    if shape.pixels is not None:
        left, top = (int(value) for value in np.rint(points[0]).clip(0))
        part = drawn[top : top + shape.pixels.shape[0], left : left + shape.pixels.shape[1]]
        part[:] = shape.pixels[: part.shape[0], : part.shape[1]]
        return drawn.astype(np.bool_)
    if not shape.is_line:
        drawn[polygon(points[:, 1] - 0.5, points[:, 0] - 0.5, size)] = 1
    if shape.is_line or not drawn.any():  # thinner than a pixel
        limit = 2 * max(size)  # OpenCV's numbers are of 32 bits
        corners = np.floor(points).clip(-limit, limit).astype(np.int32)
        cv2.polylines(drawn, [corners], isClosed=not shape.is_line, color=1)
    return drawn.astype(np.bool_)


def _check_size(image: Path, size: tuple[int, int], annotation: ImageShapes) -> None:
    if annotation.size not in {None, size}:
        msg = (
            f"The annotation file `{annotation.file}` says that `{annotation.image}` has {annotation.size} pixels "
            f"(height, width), but `{image}` has {size}. Annotate it as viewers show it, with its EXIF orientation."
        )
        raise ValueError(msg)


def _save(mask: NDArray[np.uint8], image: Path, root: Path) -> Path:
    """Write a mask, unless it is there, and return its path."""
    place = image.resolve()
    start = root.resolve() if place.is_relative_to(root.resolve()) else place.anchor
    content = hashlib.sha256(mask.tobytes()).hexdigest()[:12]
    path = root / MASKS_FOLDER / f"{place.relative_to(start)}.{content}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial_path:
            Image.fromarray(mask).save(partial_path)
    return path
