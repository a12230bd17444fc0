"""What is read from the files of annotation tools, by files written by hand."""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_exdd.data.annotation_formats import class_names, read_annotations

TRIANGLE = [[1.0, 2.0], [5.0, 2.0], [3.5, 7.25]]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(*annotations: dict[str, Any], **image: Any) -> dict[str, Any]:
    """One image of 8 x 12 pixels with annotations of two categories."""
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 8, "height": 12, **image}],
        "categories": [{"id": 1, "name": "scratch"}, {"id": 2, "name": "dent"}],
        "annotations": [{"id": number, "image_id": 7, **each} for number, each in enumerate(annotations)],
    }


def labelme(*shapes: dict[str, Any]) -> dict[str, Any]:
    return {"imagePath": "..\\images\\a.png", "imageHeight": 12, "imageWidth": 8, "shapes": list(shapes)}


def voc(body: str) -> str:
    size = "<size><width>8</width><height>12</height><depth>3</depth></size>"
    return f"<annotation><folder>x</folder><filename>a.png</filename>{size}{body}</annotation>"


def test_coco(tmp_path: Path) -> None:
    corners = [value for point in TRIANGLE for value in point]
    content = coco(
        {"category_id": 2, "segmentation": [corners, [*corners[2:], 0, 0]], "bbox": [0, 0, 9, 9]},
        {"category_id": 1, "segmentation": [], "bbox": [1, 2, 3.5, 4]},
    )
    (image,) = read_annotations(write(tmp_path / "c.json", content))
    assert (image.image, image.size, image.is_relative) == ("a.png", (12, 8), False)
    assert [(shape.kind, shape.is_box) for shape in image.shapes] == [
        ("dent", False),
        ("dent", False),
        ("scratch", True),
    ]
    assert image.shapes[0].points.tolist() == TRIANGLE
    assert image.shapes[2].points.tolist() == [[1, 2], [4.5, 2], [4.5, 6], [1, 6]]


def test_images_without_annotation_are_kept(tmp_path: Path) -> None:
    (image,) = read_annotations(write(tmp_path / "c.json", coco(width=None)))
    assert (image.shapes, image.size) == ([], None)
    (image,) = read_annotations(write(tmp_path / "b.txt", "\n"))
    assert (image.shapes, image.image) == ([], "b")
    (image,) = read_annotations(write(tmp_path / "b.json", {"shapes": []}))
    assert (image.shapes, image.image) == ([], "b")


# The string is what pycocotools 2.0.11 makes of these pixels.
@pytest.mark.parametrize("counts", [[14, 3, 8, 2, 69], ">38Om1"])
def test_run_lengths_of_coco(tmp_path: Path, counts: Any) -> None:
    """Runs go down the columns, and begin with the background."""
    expected = np.zeros((12, 8), dtype=bool)
    expected[2:5, 1] = expected[1:3, 2] = True
    runs = {"size": [12, 8], "counts": counts}
    (image,) = read_annotations(write(tmp_path / "c.json", coco({"category_id": 1, "segmentation": runs})))
    assert np.array_equal(image.shapes[0].pixels, expected)
    assert image.shapes[0].points.tolist() == [[0, 0]]


def test_labelme(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[255, 0], [255, 255], [0, 255]], dtype=np.uint8)).save(buffer, "PNG")
    content = labelme(
        {"label": "scratch", "points": TRIANGLE},
        {"label": "dent", "points": [[5, 6], [1, 2]], "shape_type": "rectangle"},
        {"label": "dent", "points": [[4, 5], [4, 8]], "shape_type": "circle"},
        {"label": "crack", "points": TRIANGLE, "shape_type": "linestrip"},
        {
            "label": "hole",
            "points": [[3, 4], [4, 6]],
            "shape_type": "mask",
            "mask": base64.b64encode(buffer.getvalue()).decode(),
        },
    )
    (image,) = read_annotations(write(tmp_path / "a.json", content))
    polygon, box, circle, line, mask = image.shapes
    assert (image.image, image.size) == ("..\\images\\a.png", (12, 8))
    assert [shape.kind for shape in image.shapes] == ["scratch", "dent", "dent", "crack", "hole"]
    assert polygon.points.tolist() == line.points.tolist() == TRIANGLE
    assert (polygon.is_box, polygon.is_line, line.is_line) == (False, False, True)
    assert box.is_box
    assert box.points.tolist() == [[1, 2], [5, 2], [5, 6], [1, 6]]
    assert np.allclose(np.hypot(*(circle.points - [4, 5]).T), 3)
    assert mask.points.tolist() == [[3, 4]]
    assert mask.pixels is not None
    assert mask.pixels.tolist() == [[True, False], [True, True], [False, True]]


def test_yolo(tmp_path: Path) -> None:
    write(tmp_path / "data.yaml", "path: x\nnames:\n  0: scratch\n  1: dent\n")
    path = write(tmp_path / "train" / "labels" / "a.txt", "1 0.5 0.25 0.5 0.25\n\n0 0.1 0.2 0.3 0.4 0.5 0.6\n")
    (image,) = read_annotations(path)
    assert (image.image, image.size, image.is_relative) == ("a", None, True)
    box, polygon = image.shapes
    assert (box.kind, box.is_box) == ("dent", True)
    assert box.points.tolist() == [[0.25, 0.125], [0.75, 0.125], [0.75, 0.375], [0.25, 0.375]]
    assert (polygon.kind, polygon.is_box) == ("scratch", False)
    assert polygon.points.tolist() == [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "scratch\ndent\n"),
        ("obj.names", "scratch\r\ndent"),
        ("data.yaml", "names: [scratch, dent]"),
        ("../data.yaml", "names: {0: scratch, 1: dent}"),
    ],
)
def test_names_of_the_classes_of_yolo(tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "labels"
    folder.mkdir()
    write(folder / name, content)
    assert class_names(folder) == {0: "scratch", 1: "dent"}


def test_classes_without_names_keep_their_numbers(tmp_path: Path) -> None:
    (image,) = read_annotations(write(tmp_path / "a.txt", "3 0.5 0.5 0.1 0.1"))
    assert image.shapes[0].kind == "3"


def test_pascal_voc(tmp_path: Path) -> None:
    pytest.importorskip("defusedxml")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4.5</xmax><ymax>6</ymax></bndbox>"
    (image,) = read_annotations(
        write(tmp_path / "a.xml", voc(f"<object><name> dent\n</name><pose>x</pose>{box}</object>"))
    )
    assert (image.image, image.size) == ("a.png", (12, 8))
    assert (image.shapes[0].kind, image.shapes[0].is_box) == ("dent", True)
    assert image.shapes[0].points.tolist() == [[1, 2], [4.5, 2], [4.5, 6], [1, 6]]


ENTITIES = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>' + voc("<object><name>&b;</name></object>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "Expecting property name"),
        ("a.json", "[" * 100_000, "recursion|Expecting value"),
        ("a.json", '[{"images": 1}]', "neither COCO's `images` and `annotations` nor LabelMe's `shapes`"),
        ("a.json", {"shapes": [{"label": "x", "points": [[1, 2]], "shape_type": "cuboid"}]}, "a shape is a `cuboid`"),
        ("a.json", {"shapes": [{"label": "x"}]}, "'points' is missing"),
        ("a.json", {"shapes": [{"points": [[1, float("nan")]]}]}, "are no positions"),
        ("a.json", {"shapes": [{"points": [[1, 2]], "shape_type": "mask", "mask": "AAAA"}]}, "cannot identify image"),
        ("a.json", coco({"image_id": 8, "bbox": [1, 2, 3, 4]}), "8 is missing"),
        ("a.json", coco({"category_id": 1}), "'bbox' is missing"),
        ("a.json", coco({"segmentation": [[1, 2, 3]]}), "cannot reshape"),
        ("a.txt", "0 0.5 0.5", "line 1 has 2 numbers after the class"),
        ("a.txt", "0 .1 .1 .1 .1\n0 0.5 0.5 0.1 0.1 0.9", "line 2 has 5 numbers after the class"),
        ("a.txt", "0 12 34 5 6", "line 1 has 12, but positions are shares"),
        ("a.txt", "bad parts are here", "could not convert"),
        ("a.xml", "<annotation", "unclosed token"),
        ("a.xml", "<annotations/>", "outermost element is `annotations`"),
        ("a.xml", voc("<object><name>x</name></object>"), r"the points \[nan, .* are no positions"),
        ("a.xml", ENTITIES, "EntitiesForbidden"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if name.endswith("xml"):
        pytest.importorskip("defusedxml")
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"annotation file `.*{name}` cannot be read: .*({message}).* Known are COCO"):
        read_annotations(path)


@pytest.mark.parametrize(
    "runs",
    [
        {"size": [12, 8], "counts": [14, 3, 8, 2]},
        {"size": [12, 8], "counts": [14, 3, 8, 2_000]},
        {"size": [12, 8], "counts": [14, -3, 85]},
        {"size": [12, 8], "counts": "zzzz"},
    ],
)
def test_wrong_run_lengths_are_refused(tmp_path: Path, runs: Any) -> None:
    path = write(tmp_path / "c.json", coco({"category_id": 1, "segmentation": runs}))
    with pytest.raises(ValueError, match="cannot be read"):
        read_annotations(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "defusedxml.ElementTree", None)
    with pytest.raises(ImportError, match=r"Pascal VOC .*: `pip install \"anomalib-exdd\[annotations\]\"`"):
        read_annotations(write(tmp_path / "a.xml", voc("")))
