"""Masks by the files of annotation tools: what is drawn, for which images, and what DefectFolder makes of it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib import TaskType
from numpy.typing import NDArray
from PIL import ExifTags, Image

from anomalib_exdd.data import DefectFolder
from anomalib_exdd.data.drawn_masks import BOX_LEVEL, OUTLINE_LEVEL, DrawnMask, draw_masks
from made_up_images import save_image, save_mask
from reading_back import kinds_by_name, ready_folder, sample_rows, split_counts

HEIGHT, WIDTH = 12, 8
CORNERS = [(1, 2), (5, 2), (5, 4), (3, 4), (3, 7), (1, 7)]
CORNER_PIXELS = """
........
........
.####...
.####...
.##.....
.##.....
.##.....
........
........
........
........
........
"""
BOX = (2, 3, 6, 8)  # left, top, right, bottom


def pixels(drawing: str) -> NDArray[np.bool_]:
    return np.array([[sign == "#" for sign in line] for line in drawing.split()])


def box_pixels() -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[3:8, 2:6] = True
    return mask


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco_file(path: Path, images: dict[str, list[dict[str, Any]]], **of_images: Any) -> Path:
    """Write a COCO file with the annotations of images, by their names; categories are 1 scratch and 2 dent."""
    listed = [{"id": number, "file_name": name, **of_images} for number, name in enumerate(images)]
    annotations = [
        {"category_id": 1, **each, "image_id": number} for number, found in enumerate(images.values()) for each in found
    ]
    kinds = [{"id": 1, "name": "scratch"}, {"id": 2, "name": "dent"}]
    return write(path, {"images": listed, "annotations": annotations, "categories": kinds})


def polygon_of_coco(corners: list[tuple[float, float]], category: int = 1) -> dict[str, Any]:
    return {"segmentation": [[value for corner in corners for value in corner]], "category_id": category}


def box_of_coco(category: int = 1) -> dict[str, Any]:
    left, top, right, bottom = BOX
    return {"bbox": [left, top, right - left, bottom - top], "category_id": category}


OUTLINE = polygon_of_coco(CORNERS)


def coco(path: Path, *, box: bool) -> Path:
    return coco_file(path.with_suffix(".json"), {"d.png": [box_of_coco() if box else OUTLINE]})


def labelme(path: Path, *, box: bool) -> Path:
    shape = {"points": [BOX[2:], BOX[:2]], "shape_type": "rectangle"} if box else {"points": CORNERS}
    return write(path.with_suffix(".json"), {"imagePath": "d.png", "shapes": [{"label": "scratch", **shape}]})


def yolo(path: Path, *, box: bool) -> Path:
    write(path.with_name("classes.txt"), "dent\nscratch\n")
    left, top, right, bottom = BOX
    centre = [(left + right) / 2 / WIDTH, (top + bottom) / 2 / HEIGHT, (right - left) / WIDTH, (bottom - top) / HEIGHT]
    outline = [value for x, y in CORNERS for value in (x / WIDTH, y / HEIGHT)]
    return write(path.with_suffix(".txt"), " ".join(map(str, [1, *(centre if box else outline)])))


def voc(path: Path, *, box: bool) -> Path:
    assert box
    pytest.importorskip("defusedxml")
    corners = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True))
    shape = f"<object><name>scratch</name><bndbox>{corners}</bndbox></object>"
    return write(path.with_suffix(".xml"), f"<annotation><filename>d.png</filename>{shape}</annotation>")


def draw_one(root: Path, file: Path) -> tuple[DrawnMask, NDArray[np.uint8]]:
    ((_, drawn),) = draw_masks([file], root, [])[0].items()
    return drawn, np.asarray(Image.open(drawn.path))


@pytest.mark.parametrize("tool", [coco, labelme, yolo])
def test_the_same_polygon_gives_the_same_mask(tmp_path: Path, tool: Callable[..., Path]) -> None:
    save_image(tmp_path / "d.png")
    drawn, mask = draw_one(tmp_path, tool(tmp_path / "d", box=False))
    assert (drawn.kind, drawn.has_boxes) == ("scratch", False)
    assert np.array_equal(mask, pixels(CORNER_PIXELS) * OUTLINE_LEVEL)


@pytest.mark.parametrize("tool", [coco, labelme, yolo, voc])
def test_the_same_box_gives_the_same_mask(tmp_path: Path, tool: Callable[..., Path]) -> None:
    save_image(tmp_path / "d.png")
    drawn, mask = draw_one(tmp_path, tool(tmp_path / "d", box=True))
    assert (drawn.kind, drawn.has_boxes) == ("scratch", True)
    assert np.array_equal(mask, box_pixels() * BOX_LEVEL)


def test_a_pixel_belongs_if_its_centre_lies_inside(tmp_path: Path) -> None:
    """Compared with the half-planes of a triangle."""
    save_image(tmp_path / "d.png", size=(40, 50))
    triangle = [(3.3, 4.1), (44.7, 12.2), (20.4, 37.9)]
    file = coco_file(tmp_path / "c.json", {"d.png": [polygon_of_coco(triangle)]})
    y, x = np.mgrid[:40, :50] + 0.5
    inside = np.ones((40, 50), dtype=bool)
    for (x1, y1), (x2, y2) in zip(triangle, triangle[1:] + triangle[:1], strict=True):
        inside &= (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) > 0
    assert inside.sum() > 300
    assert np.array_equal(draw_one(tmp_path, file)[1] > 0, inside)


def test_what_is_thinner_than_a_pixel_is_drawn(tmp_path: Path) -> None:
    save_image(tmp_path / "d.png")
    sliver = polygon_of_coco([(1.6, 3.6), (6.6, 3.6), (6.6, 3.9)])
    _, mask = draw_one(tmp_path, coco_file(tmp_path / "c.json", {"d.png": [sliver]}))
    assert mask.nonzero()[0].tolist() == [3] * 6
    assert mask.nonzero()[1].tolist() == [1, 2, 3, 4, 5, 6]

    line = {"label": "crack", "points": [[1.5, 1.5], [1.5, 4.5], [5.5, 4.5]], "shape_type": "linestrip"}
    _, mask = draw_one(tmp_path, write(tmp_path / "l.json", {"imagePath": "d.png", "shapes": [line]}))
    assert sorted(zip(*mask.nonzero(), strict=True)) == [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (4, 3), (4, 4), (4, 5)]


def test_shapes_end_at_the_border(tmp_path: Path) -> None:
    save_image(tmp_path / "d.png")
    beyond = polygon_of_coco([(-1e9, 10), (1e9, 10), (1e9, 1e9), (-1e9, 1e9)])
    _, mask = draw_one(tmp_path, coco_file(tmp_path / "c.json", {"d.png": [beyond]}))
    assert mask[10:].all()
    assert not mask[:10].any()


def test_several_shapes_of_an_image(tmp_path: Path) -> None:
    """Outlines cover boxes, the kind is what covers most, and files add to each other."""
    save_image(tmp_path / "d.png")
    first = coco_file(tmp_path / "a.json", {"d.png": [box_of_coco(category=2), OUTLINE]})
    second = coco_file(tmp_path / "b.json", {"d.png": [polygon_of_coco([(7, 10), (8, 10), (8, 12), (7, 12)])]})
    masks, _ = draw_masks([first, second], tmp_path, [])
    (drawn,) = masks.values()
    assert (drawn.kind, drawn.has_boxes) == ("dent", True)  # 20 pixels, 16 are scratch
    expected = np.where(box_pixels(), BOX_LEVEL, 0)
    expected[pixels(CORNER_PIXELS)] = OUTLINE_LEVEL
    expected[10:, 7] = OUTLINE_LEVEL
    assert np.array_equal(np.asarray(Image.open(drawn.path)), expected)


def test_run_lengths_are_drawn(tmp_path: Path) -> None:
    save_image(tmp_path / "d.png")
    runs = {"segmentation": {"size": [12, 8], "counts": [14, 3, 79]}}
    _, mask = draw_one(tmp_path, coco_file(tmp_path / "c.json", {"d.png": [runs]}))
    assert sorted(zip(*mask.nonzero(), strict=True)) == [(2, 1), (3, 1), (4, 1)]


def test_masks_are_written_once_and_never_overwritten(tmp_path: Path) -> None:
    save_image(tmp_path / "bad" / "d.png")
    file = coco_file(tmp_path / "c.json", {"bad/d.png": [OUTLINE]})
    first, mask = draw_one(tmp_path, file)
    written = first.path.stat().st_mtime_ns
    assert first.path.parent == tmp_path / ".masks" / "bad"
    assert draw_one(tmp_path, file)[0] == first
    assert first.path.stat().st_mtime_ns == written
    second, changed = draw_one(tmp_path, coco_file(file, {"bad/d.png": [box_of_coco()]}))
    assert second.path != first.path
    assert not np.array_equal(changed, mask)
    assert np.array_equal(np.asarray(Image.open(first.path)), mask)
    assert len(list((tmp_path / ".masks").rglob("*.png"))) == 2


class TestWhichImage:
    """Annotation files call images by their names, in some folder."""

    def find(self, root: Path, file: Path, *listed: Path) -> Path:
        (image,) = draw_masks([file], root, listed)[0]
        return image

    def test_beside_the_file_before_all_others(self, tmp_path: Path) -> None:
        for folder in ("train", "valid", "."):
            save_image(tmp_path / folder / "d.png")
        file = coco_file(tmp_path / "train" / "c.json", {"d.png": [OUTLINE]})
        assert self.find(tmp_path, file) == tmp_path / "train" / "d.png"

    def test_by_the_folder_in_the_file(self, tmp_path: Path) -> None:
        for folder in ("train", "valid"):
            save_image(tmp_path / folder / "d.png")
        file = coco_file(tmp_path / "notes" / "c.json", {"valid\\d.png": [OUTLINE]})
        assert self.find(tmp_path, file) == tmp_path / "valid" / "d.png"
        file = coco_file(tmp_path / "notes" / "c.json", {"/home/somebody/valid/d.png": [OUTLINE]})
        assert self.find(tmp_path, file) == tmp_path / "valid" / "d.png"

    @pytest.mark.parametrize("place", ["images/train", "train/images"])
    def test_by_the_folder_of_labels(self, tmp_path: Path, place: str) -> None:
        for folder in (place, place.replace("train", "valid")):
            save_image(tmp_path / folder / "d.png")
        file = yolo(tmp_path / place.replace("images", "labels") / "d", box=True)
        assert self.find(tmp_path, file) == tmp_path / place / "d.png"

    def test_listed_images_first(self, tmp_path: Path) -> None:
        images = [save_image(tmp_path / folder / "d.png") for folder in ("old", "new")]
        file = coco_file(tmp_path / "c.json", {"d.png": [OUTLINE]})
        assert self.find(tmp_path, file, images[1]) == images[1]
        with pytest.raises(ValueError, match=r"Two images fit `d\.png` of .*c\.json`: .*Name the annotated images in"):
            self.find(tmp_path, file)

    def test_an_image_elsewhere(self, tmp_path: Path) -> None:
        image = save_image(tmp_path / "photos" / "d.png")
        (tmp_path / "work").mkdir()
        file = coco_file(tmp_path / "c.json", {"d.png": [OUTLINE]})
        marked, _ = draw_masks([file], tmp_path / "work", [image])
        assert list(marked) == [image]
        assert marked[image].path.is_relative_to(tmp_path / "work" / ".masks")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Nine good and three bad parts in one folder, and a COCO file about the bad ones and one good one."""
    root = tmp_path / "parts"
    for number in range(9):
        save_image(root / f"g{number}.png")
    for number in range(3):
        save_image(root / f"d{number}.png")
    dent = polygon_of_coco(CORNERS, category=2)
    coco_file(root / "annotations.json", {"g0.png": [], "d0.png": [dent], "d1.png": [box_of_coco()], "d2.png": [dent]})
    return root


def test_a_root_and_an_annotation_file_are_enough(parts: Path) -> None:
    """Twice: the masks of the first time are no images."""
    for _ in range(2):
        data = DefectFolder(root=parts, masks="annotations.json", num_workers=0)
        data.setup()
        assert data.name == "parts"
        assert split_counts(data) == {"train": (7, 2), "val": (0, 0), "test": (2, 1)}
        assert data.train_data.task == data.test_data.task == TaskType.SEGMENTATION
        kinds = {"d0": "dent", "d1": "scratch", "d2": "dent"}
        assert kinds_by_name(data) == kinds | {f"g{number}": "" for number in range(9)}
        boxes, masks = {}, {}
        for dataset in (data.train_data, data.test_data):
            for batch in (dataset.collate_fn([dataset[n] for n in range(len(dataset))]),):
                names = [Path(path).stem for path in batch.image_path]
                boxes |= dict(zip(names, batch.has_boxes, strict=True))
                masks |= dict(zip(names, batch.gt_mask.numpy(), strict=True))
        assert {name for name, has_boxes in boxes.items() if has_boxes} == {"d1"}
        assert np.array_equal(masks["d0"], pixels(CORNER_PIXELS))
        assert np.array_equal(masks["d1"], box_pixels())
        assert not masks["g0"].any()


def test_without_normal_images_listed_elsewhere_count_too(parts: Path) -> None:
    save_image(parts / "more" / "listed.png")
    save_image(parts / "more" / "not_listed.png")
    write(parts / "more" / "listed.json", {"imagePath": "listed.png", "shapes": []})
    data = ready_folder(parts, masks=["annotations.json", "more/listed.json"])
    assert {row[0] for row in sample_rows(data) if not row[2]} == {"listed.png", *(f"g{n}.png" for n in range(9))}


def test_files_beside_the_images(folders: Path) -> None:
    """A folder with an annotation file for each image, as LabelMe and YOLO write them."""
    for number in range(3):
        shape = {"label": "dent", "points": CORNERS}
        write(folders / "bad" / f"b{number}.json", {"imagePath": f"b{number}.jpg", "shapes": [shape]})
        write(folders / "bad" / f"b{number + 3}.txt", "0 0.5 0.5 0.5 0.5")
    write(folders / "bad" / "notes.txt", "taken on Monday")
    data = ready_folder(folders, normal="good", defective="bad", masks="bad")
    assert split_counts(data) == {"train": (8, 5), "val": (0, 0), "test": (2, 1)}
    kinds = kinds_by_name(data)
    assert [kinds[f"b{number}"] for number in range(6)] == ["dent"] * 3 + ["0"] * 3
    assert kinds_by_name(ready_folder(folders, normal="good", masks="bad/*")) == kinds


def test_masks_and_annotations_together(folders: Path) -> None:
    for number in range(3):
        (folders / "masks" / f"b{number}_mask.png").unlink()
    marks = {f"b{number}.jpg": [box_of_coco()] for number in range(3)}
    coco_file(folders / "rest.json", marks)
    data = ready_folder(folders, normal="good", defective="bad", masks=["masks", "rest.json"])
    masks = {image: mask for image, mask, label, _ in sample_rows(data) if label}
    assert [masks[f"b{number}.jpg"].startswith(f"b{number}.jpg.") for number in range(6)] == [True] * 3 + [False] * 3
    assert kinds_by_name(data)["b0"] == "scratch"
    assert kinds_by_name(data)["b5"] == ""


def test_folders_name_the_kinds_that_classes_do_not(folders: Path) -> None:
    for kind in ("dent", "crack"):
        save_image(folders / "defects" / kind / f"{kind}.png")
    file = write(folders / "c.json", {"images": [{"id": 1, "file_name": "dent.png"}], "annotations": []})
    content = json.loads(file.read_text())
    content["images"].append({"id": 2, "file_name": "crack.png"})
    content["annotations"] = [{"image_id": number, "bbox": [1, 1, 2, 2]} for number in (1, 2)]
    write(file, content)
    data = ready_folder(folders, normal="good", defective="defects", masks="c.json", defective_test="bad")
    kinds = kinds_by_name(data)
    assert (kinds["dent"], kinds["crack"]) == ("dent", "crack")


def test_test_images_have_annotations_of_their_own(folders: Path) -> None:
    """Other images of the same file are left alone, as far as they exist."""
    for number in range(3):
        save_image(folders / "test" / f"t{number}.png")
    marks = {f"bad/b{number}.jpg": [OUTLINE] for number in range(6)} | {"test/t0.png": [OUTLINE]}
    coco_file(folders / "c.json", marks)
    explicit = {"normal": "good", "defective": "bad", "masks": "c.json", "defective_test": "test/t0.png"}
    data = ready_folder(folders, **explicit, masks_test="c.json")
    assert split_counts(data) == {"train": (8, 6), "val": (0, 0), "test": (2, 1)}
    assert data.test_data.task == TaskType.SEGMENTATION
    coco_file(folders / "t.json", {"test/t0.png": [OUTLINE]})
    data = ready_folder(folders, normal="good", defective="bad", masks="c.json", masks_test="t.json")
    assert split_counts(data) == {"train": (10, 6), "val": (0, 0), "test": (2, 1)}


def missing_image(root: Path) -> tuple[dict[str, Any], str]:
    coco_file(root / "c.json", {"gone.png": [OUTLINE], "d0.png": [OUTLINE], "unmarked_and_gone.png": []})
    return (
        {},
        r"`.*c\.json` marks the image `gone\.png`, but there is no such image \(1 of 2 marked images are missing\)",
    )


def missing_image_of_yolo(root: Path) -> tuple[dict[str, Any], str]:
    write(root / "labels" / "gone.txt", "0 0.5 0.5 0.5 0.5")
    return {"masks": "labels"}, r"`.*gone\.txt` marks the image `gone`, but there is no such image \(1 of 1"


def unreadable_file(root: Path) -> tuple[dict[str, Any], str]:
    write(root / "c.json", "{")
    return {}, r"annotation file `.*c\.json` cannot be read"


def no_annotation_file(root: Path) -> tuple[dict[str, Any], str]:
    save_image(root / "labels" / "x.png")
    return {"masks": "labels"}, "`normal` is missing"


def other_size(root: Path) -> tuple[dict[str, Any], str]:
    coco_file(root / "c.json", {"d0.png": [OUTLINE]}, width=80, height=120)
    return {}, r"c\.json` says that `d0\.png` has \(120, 80\) pixels .*, but `.*d0\.png` has \(12, 8\)"


def mask_of_another_size(root: Path) -> tuple[dict[str, Any], str]:
    runs = {"segmentation": {"size": [12, 9], "counts": [14, 3, 91]}}
    coco_file(root / "c.json", {"d0.png": [runs]}, width=8, height=12)
    return {}, r"c\.json` says that `d0\.png` has \(12, 9\) pixels .*, but `.*d0\.png` has \(12, 8\)"


def turned(root: Path) -> tuple[dict[str, Any], str]:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "d0.png", exif=exif)
    coco_file(root / "c.json", {"d0.png": [OUTLINE]}, width=WIDTH, height=HEIGHT)
    return {}, r"d0\.png` has \(8, 12\)\. .*EXIF orientation"


def outside(root: Path) -> tuple[dict[str, Any], str]:
    coco_file(root / "c.json", {"d0.png": [polygon_of_coco([(20, 1), (30, 1), (30, 9)])]})
    return {}, r"c\.json` marks nothing within the image `.*d0\.png` by a shape of the class `scratch`"


def nothing_marked(root: Path) -> tuple[dict[str, Any], str]:
    coco_file(root / "c.json", {"d0.png": [], "d1.png": [OUTLINE]})
    arguments = {"normal": "g*.png", "defective": "d?.png"}
    return arguments, r"`.*d0\.png` \(`defective`\) has no mask \(2 of 3 have none\).* Give every one a mask or mark"


def normal_is_marked(root: Path) -> tuple[dict[str, Any], str]:
    coco_file(root / "c.json", {"g0.png": [OUTLINE], "d0.png": [OUTLINE]})
    return {"normal": "g*.png", "defective": "d0.png"}, r"`.*g0\.png` is named as normal .*shows a defect"


def broken_image(root: Path) -> tuple[dict[str, Any], str]:
    (root / "d0.png").write_text("x")
    coco_file(root / "c.json", {"d0.png": [OUTLINE]})
    return {}, r"image `.*d0\.png` cannot be decoded"


@pytest.mark.parametrize(
    "damage",
    [
        missing_image,
        missing_image_of_yolo,
        unreadable_file,
        no_annotation_file,
        other_size,
        mask_of_another_size,
        turned,
        outside,
        nothing_marked,
        normal_is_marked,
        broken_image,
    ],
)
def test_errors_name_what_is_wrong(parts: Path, damage: Callable[[Path], tuple[dict[str, Any], str]]) -> None:
    (parts / "annotations.json").unlink()
    arguments, message = damage(parts)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready_folder(parts, **{"masks": "c.json", **arguments})


def test_marks_in_images_named_as_normal(folders: Path) -> None:
    """Without `defective`, too, what is named as normal has to be."""
    coco_file(folders / "c.json", {"good/g0.png": [OUTLINE], "bad/b0.jpg": [OUTLINE]})
    with pytest.raises(ValueError, match=r"`.*g0\.png` is named as normal"):
        ready_folder(folders, normal="good", masks="c.json")


def test_masks_with_other_files_beside_them_stay_masks(folders: Path) -> None:
    write(folders / "masks" / "readme.txt", "drawn by hand")
    data = ready_folder(folders, normal="good", defective="bad", masks="masks")
    assert split_counts(data)["train"][1] == 5
    assert not (folders / ".masks").exists()


def test_it_is_told_where_masks_are_drawn(parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ready_folder(parts, masks="annotations.json")
    assert f"Drew masks in {parts / '.masks'}, of images marked in annotation files: 3." in caplog.text


def test_a_mask_beside_unmarked_images_is_noticed(parts: Path) -> None:
    save_mask(parts / "g1_mask.png", defect=True)
    with pytest.raises(ValueError, match=r"g1_mask\.png` was found as an image of argument `normal`"):
        ready_folder(parts, masks="annotations.json")
