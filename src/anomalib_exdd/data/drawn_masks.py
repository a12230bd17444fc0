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
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.draw import polygon2mask

from anomalib_exdd.images.file_discovery import nearest, visible_files
from anomalib_exdd.images.reading import IMAGE_EXTENSIONS, inspect_image, map_files
from anomalib_exdd.utils.files import write_atomically

from .annotation_formats import CLASS_NAMES, ImageShapes, Shape, class_names, read_annotations

logger = logging.getLogger(__name__)

MASKS_FOLDER = ".masks"
"""Folder of drawn masks in the root; hidden, so that they are not taken for images."""
BOX_LEVEL, OUTLINE_LEVEL = 128, 255  # either is defect; they differ for who looks at the mask


class DrawnMask(NamedTuple):
    """The mask of an image, the kind of what is most of it, and whether any of it is a box around a defect."""

    path: Path | None
    kind: str = ""
    has_boxes: bool = False


def separate_annotations(entries: Sequence[str | Path], root: Path) -> tuple[list[Path], list[str | Path]]:
    """Separate what an argument for masks names into annotation files, sorted, and entries that name none.

    A folder that holds both images and annotation files counts as annotations: the images are those that are annotated.
    Text files beside images have to be named like one of them.
    """
    files: set[Path] = set()
    others: list[str | Path] = []
    for entry in entries:
        listed = [path for path in visible_files(entry, root) if path.name not in CLASS_NAMES]
        images = {path.stem for path in _images_in(listed)}
        found = {path for path in listed if path.suffix.lower() in {".json", ".xml"}}
        found |= {path for path in listed if path.suffix.lower() == ".txt" and (not images or path.stem in images)}
        files |= found
        others += [] if found else [entry]
    return sorted(files), others


def _images_in(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]


def draw_masks(files: Sequence[Path], root: Path, listed: Iterable[Path]) -> tuple[dict[Path, DrawnMask], list[Path]]:
    """Draw the mask of every image that annotation files mark, into :data:`MASKS_FOLDER` of the root.

    A pixel is marked if its centre lies in a shape. The names of the masks change with their content: what another
    training reads is never overwritten. Images are looked for by the names in the files: beside these, among those
    listed, and in the root.

    Returns:
        The mask of each marked image; and the images without a mark that the same files list or that lie beside.

    Raises:
        FileNotFoundError: If a marked image is missing.
        ValueError: If a file cannot be read, two images fit, or an annotation does not fit its image.
    """
    class_names.cache_clear()  # the files may have changed
    finder = _ImageFinder(root, listed)
    found: defaultdict[Path, list[ImageShapes]] = defaultdict(list)
    missing = []
    for each in chain.from_iterable(map_files(read_annotations, files, "Reading annotations")):
        if image := finder.find(each):
            found[image].append(each)
        elif each.shapes:
            missing.append(each)
    marked = {image: parts for image, parts in found.items() if any(part.shapes for part in parts)}
    if missing:
        msg = (
            f"The annotation file `{missing[0].file}` marks the image `{missing[0].image}`, but there is no such image "
            f"({len(missing)} of {len(missing) + len(marked)} marked images are missing) beside the file or in any "
            f"folder of `{root}`. Put it there, correct `root`, or remove the annotation."
        )
        raise FileNotFoundError(msg)
    masks = dict(zip(marked, map_files(partial(_draw, root=root), list(marked.items()), "Drawing masks"), strict=True))
    logger.info("Drew masks in %s, of images marked in annotation files: %d.", root / MASKS_FOLDER, len(masks))
    beside = {path for folder in {image.parent for image in marked} for path in _images_in(visible_files("*", folder))}
    return masks, sorted((beside | set(found)) - set(marked))


class _ImageFinder:
    """Finds images by what annotation files call them: beside the file, in the root, or by name alone."""

    def __init__(self, root: Path, listed: Iterable[Path]) -> None:
        self._root = root
        self._listed = {path.resolve(): path for path in listed}
        self._listed_by_name = _by_name(self._listed.values())

    @cached_property
    def _found_by_name(self) -> dict[str, list[Path]]:
        return _by_name(_images_in(visible_files(".", self._root)))  # only where it is needed: the root may be large

    def find(self, annotation: ImageShapes) -> Path | None:
        name = Path(annotation.image.replace("\\", "/"))
        reference = annotation.file.parent / name
        for path in _images_in((reference, self._root / name)):
            if path.is_file():
                return self._listed.get(path.resolve(), Path(os.path.normpath(path)))
        candidates = self._listed_by_name.get(name.name) or self._found_by_name.get(name.name, [])
        fitting = nearest(candidates, reference.parent)
        if len(fitting) > 1:
            msg = (
                f"Two images fit `{annotation.image}` of the annotation file `{annotation.file}`: `{fitting[0]}` and "
                f"`{fitting[1]}`. Name the annotated images in argument `defective`, or their folder in the file."
            )
            raise ValueError(msg)
        return fitting[0] if fitting else None


def _by_name(images: Iterable[Path]) -> dict[str, list[Path]]:
    """Return images by their name, and by their name without ending."""
    by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_name[image.name].append(image)
        by_name[image.stem].append(image)
    return dict(by_name)


def _draw(item: tuple[Path, Sequence[ImageShapes]], root: Path) -> DrawnMask:
    """Draw and save the mask of an image, unless it is there."""
    image, annotations = item
    size = inspect_image(image)
    mask = np.zeros(size, dtype=np.uint8)
    area: Counter[str] = Counter()
    for annotation in annotations:
        if annotation.size not in {None, size}:
            msg = (
                f"The annotation file `{annotation.file}` says that `{annotation.image}` has {annotation.size} pixels "
                f"(height, width), but `{image}` has {size}. Annotate it as viewers show it, with its EXIF orientation."
            )
            raise ValueError(msg)
        for shape in annotation.shapes:
            pixels = _pixels_of(shape, size, size[::-1] if annotation.is_relative else (1, 1))
            if not pixels.any():
                msg = (
                    f"The annotation file `{annotation.file}` marks nothing within the image `{image}` by a shape of "
                    f"the class `{shape.kind}`. Correct or remove the shape."
                )
                raise ValueError(msg)
            area[shape.kind] += int(pixels.sum())
            mask[pixels] = np.maximum(mask[pixels], BOX_LEVEL if shape.is_box else OUTLINE_LEVEL)
    place, top = image.resolve(), root.resolve()
    name = place.relative_to(top if place.is_relative_to(top) else place.anchor)
    path = root / MASKS_FOLDER / f"{name}.{hashlib.sha256(mask.tobytes()).hexdigest()[:12]}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial_path:
            Image.fromarray(mask).save(partial_path)
    has_boxes = any(shape.is_box for annotation in annotations for shape in annotation.shapes)
    return DrawnMask(path, area.most_common(1)[0][0], has_boxes)


def _pixels_of(shape: Shape, size: tuple[int, int], scale: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels of an image a shape covers, boolean, shape (H, W)."""
    points = shape.points * scale
    drawn = np.zeros(size, dtype=np.uint8)
    if shape.pixels is not None:
        left, top = (int(value) for value in np.rint(points[0]).clip(0))
        part = drawn[top : top + shape.pixels.shape[0], left : left + shape.pixels.shape[1]]
        part[:] = shape.pixels[: part.shape[0], : part.shape[1]]
    elif not shape.is_line:
        drawn[polygon2mask(size, points[:, ::-1] - 0.5)] = 1
    if shape.pixels is None and not drawn.any():  # a line, or thinner than a pixel
        limit = 2 * max(size)  # OpenCV's numbers are of 32 bits
        corners = np.floor(points).clip(-limit, limit).astype(np.int32)
        cv2.polylines(drawn, [corners], isClosed=not shape.is_line, color=1)
    return drawn.astype(np.bool_)
