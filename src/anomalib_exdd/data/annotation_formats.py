"""Reading the files of annotation tools: COCO, LabelMe, YOLO and Pascal VOC.

``.json``: COCO (polygons, boxes, run-length encoded masks), or LabelMe (one file for each image); ``.txt``: YOLO (one
file for each image: boxes or polygons); ``.xml``: Pascal VOC (one file for each image: boxes).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from anomalib_exdd.images.reading import DECODING_ERRORS

CLASS_NAMES = ("classes.txt", "obj.names", "data.yaml")
"""Files with the names of YOLO's classes: one in each line, or a list or table ``names``."""
_CIRCLE_CORNERS = 64
_LABELME_LINES = {"line", "linestrip"}
_LABELME_POLYGONS = {"polygon", "oriented_rectangle", "rotation"}
_DAMAGE = (TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError, yaml.YAMLError)


@dataclass(frozen=True)
class Shape:
    """A marked part of an image."""

    kind: str  # its class, such as "scratch"
    points: NDArray[np.float64]  # corners of a polygon as x and y, shape (N, 2): the first pixel lies between 0 and 1
    is_box: bool = False  # the box around a defect instead of its outline
    is_line: bool = False  # the points are those of an open line
    pixels: NDArray[np.bool_] | None = None  # what it covers, shape (h, w), from the only point on; None: the polygon


@dataclass(frozen=True)
class ImageShapes:
    """What an annotation file says of one image."""

    file: Path  # the annotation file
    image: str  # the image as the file names it, or its name without ending
    shapes: Sequence[Shape]  # what is marked in it; empty for an image without defects
    size: tuple[int, int] | None = None  # height and width of the annotated image; None if the file does not say
    is_relative: bool = False  # whether points are shares of width and height


def read_annotations(path: Path) -> list[ImageShapes]:
    """Read an annotation file, told apart by its ending and content.

    Raises:
        ValueError: If it cannot be read as one of the known formats.
        ImportError: If it is Pascal VOC's, and the extra ``annotations`` is not installed.
    """
    try:
        if path.suffix.lower() == ".xml":
            return [_read_voc(path)]
        if path.suffix.lower() == ".txt":
            return [_read_yolo(path)]
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if "shapes" in content:
            return [_read_labelme(path, content)]
        if "images" in content and "annotations" in content:
            return _read_coco(path, content)
        msg = "it has neither COCO's `images` and `annotations` nor LabelMe's `shapes`"
        raise ValueError(msg)
    except (*DECODING_ERRORS, *_DAMAGE) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        msg = (
            f"The annotation file `{path}` cannot be read: {reason}. Known are COCO and LabelMe (.json), YOLO (.txt) "
            "and Pascal VOC (.xml): export it anew as one of them, or, if it is no annotation, name the others alone."
        )
        raise ValueError(msg) from error


def _read_coco(path: Path, content: Mapping[str, Any]) -> list[ImageShapes]:
    kinds = {each["id"]: str(each["name"]) for each in content.get("categories", ())}
    shapes: dict[Any, list[Shape]] = {image["id"]: [] for image in content["images"]}
    for each in content["annotations"]:
        shapes[each["image_id"]] += _coco_shapes(each, kinds.get(each.get("category_id"), ""))
    found = []
    for image in content["images"]:
        of_image = shapes[image["id"]]
        sizes: list[Any] = [shape.pixels.shape for shape in of_image if shape.pixels is not None]
        sizes.append(_size(image.get("height"), image.get("width")))
        found.append(ImageShapes(path, str(image["file_name"]), of_image, sizes[0]))
    return found


def _coco_shapes(annotation: Mapping[str, Any], kind: str) -> list[Shape]:
    segmentation = annotation.get("segmentation") or []
    if isinstance(segmentation, Mapping):
        return [Shape(kind, np.zeros((1, 2)), pixels=_decode_runs(segmentation))]
    if polygons := [polygon for polygon in segmentation if polygon]:
        return [Shape(kind, _points(polygon)) for polygon in polygons]
    left, top, width, height = annotation["bbox"]
    return [_box(kind, [left, top, left + width, top + height])]


def _decode_runs(segmentation: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Decode a run-length encoded mask: lengths of background and mask in turns, down the columns."""
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    lengths = _uncompressed(counts) if isinstance(counts, str) else counts
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape((height, width), order="F")


def _uncompressed(text: str) -> list[int]:
    """Return the run lengths in a compressed string.

    Each is written as the difference to the one before the last, lowest bits first: five in a character, from "0" on,
    whose sixth bit says that more follow; the highest bit of the last is the sign.
    """
    lengths: list[int] = []
    value, shift = 0, 0
    for code in (ord(character) - ord("0") for character in text):
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << (shift - 4)
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
    return lengths


def _read_labelme(path: Path, content: Mapping[str, Any]) -> ImageShapes:
    shapes = [_labelme_shape(each) for each in content["shapes"]]
    size = _size(content.get("imageHeight"), content.get("imageWidth"))
    return ImageShapes(path, str(content.get("imagePath") or path.stem), shapes, size)


def _labelme_shape(shape: Mapping[str, Any]) -> Shape:
    kind, points = str(shape.get("label") or ""), _points(shape["points"])
    form = shape.get("shape_type") or "polygon"
    if form == "mask":
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as mask:
            return Shape(kind, points[:1], pixels=np.asarray(mask) > 0)
    if form == "rectangle":
        return _box(kind, [*points.min(axis=0), *points.max(axis=0)])
    if form == "circle":
        angles = np.linspace(0, 2 * np.pi, _CIRCLE_CORNERS, endpoint=False)
        radius = np.hypot(*(points[1] - points[0]))
        return Shape(kind, points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    if form not in _LABELME_LINES | _LABELME_POLYGONS:
        msg = f"a shape is a `{form}`, not a polygon, rectangle, circle, line or mask"
        raise ValueError(msg)
    return Shape(kind, points, is_line=form in _LABELME_LINES)


def _read_yolo(path: Path) -> ImageShapes:
    kinds = class_names(path.parent)
    shapes = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        kind, *words = line.split()
        values = [float(word) for word in words]
        if len(values) % 2 or len(values) < 4:
            msg = f"line {number} has {len(values)} numbers after the class, but boxes have 4, polygons 6, 8, 10 …"
            raise ValueError(msg)
        if outside := [value for value in values if not -0.01 <= value <= 1.01]:  # tools round
            msg = f"line {number} has {outside[0]:g}, but positions are shares of width and height, 0 to 1"
            raise ValueError(msg)
        kind = kinds.get(int(kind), kind)
        if len(values) == 4:
            x, y, width, height = values
            shapes.append(_box(kind, [x - width / 2, y - height / 2, x + width / 2, y + height / 2]))
        else:
            shapes.append(Shape(kind, _points(values)))
    return ImageShapes(path, path.stem, shapes, is_relative=True)


@lru_cache(maxsize=32)
def class_names(folder: Path) -> dict[int, str]:
    """Read the names of YOLO's classes from a file in the folder of the annotations, or in one of the two above."""
    places = (folder, *list(folder.resolve().parents)[:2])
    file = next((place / name for place in places for name in CLASS_NAMES if (place / name).is_file()), None)
    if file is None:
        return {}
    with file.open(encoding="utf-8-sig") as lines:
        names = yaml.safe_load(lines)["names"] if file.suffix == ".yaml" else [line.strip() for line in lines]
    numbered = names.items() if isinstance(names, dict) else enumerate(names)
    return {int(number): str(name) for number, name in numbered}


def _read_voc(path: Path) -> ImageShapes:
    try:
        from defusedxml.ElementTree import fromstring  # noqa: PLC0415 (an extra)
    except ImportError as error:
        msg = f'Pascal VOC files such as `{path}` need defusedxml: `pip install "anomalib-exdd[annotations]"`.'
        raise ImportError(msg) from error
    root = fromstring(path.read_bytes())
    if root.tag != "annotation":
        msg = f"its outermost element is `{root.tag}` instead of Pascal VOC's `annotation`"
        raise ValueError(msg)
    shapes = []
    for each in root.findall("object"):
        corners = [float(each.findtext(f"bndbox/{name}", "nan")) for name in ("xmin", "ymin", "xmax", "ymax")]
        shapes.append(_box(each.findtext("name", "").strip(), corners))
    size = _size(root.findtext("size/height"), root.findtext("size/width"))
    return ImageShapes(path, root.findtext("filename", "").strip() or path.stem, shapes, size)


def _box(kind: str, corners: Sequence[float]) -> Shape:
    """Return the shape of a box, given left, top, right and bottom."""
    left, top, right, bottom = corners
    return Shape(kind, _points([left, top, right, top, right, bottom, left, bottom]), is_box=True)


def _points(values: Sequence[Any]) -> NDArray[np.float64]:
    points = np.asarray(values, dtype=np.float64).reshape(-1, 2)
    if not len(points) or not np.isfinite(points).all():
        msg = f"the points {str(list(values))[:80]} are no positions"
        raise ValueError(msg)
    return points


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """Return height and width; None where a tool left them out or wrote zeros."""
    size = int(height or 0), int(width or 0)
    return size if all(size) else None
