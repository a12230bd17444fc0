"""The made-up sample: what is drawn and what is written."""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from anomalib_exdd.data import surfaces
from anomalib_exdd.data.surfaces import (
    COVERAGE,
    DEFECTS,
    HEIGHTS,
    VISIBLE_CHANGE,
    WIDTHS,
    SurfaceImage,
    generate_sample,
    numbers,
    surface_image,
)

TRAIN, TEST = (5, 3), (2, 2)
generate_small = partial(generate_sample, train=TRAIN, test=TEST)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "exdd_sample"
    generate_small(root)
    return root


@pytest.fixture(scope="module")
def defective() -> list[tuple[np.ndarray, SurfaceImage]]:
    """Some numbers' surfaces without and with defects."""
    return [(clean(number), surface_image(0, number, defective=True)) for number in range(10_000, 10_010)]


def clean(number: int) -> np.ndarray:
    return surface_image(0, number, defective=False).image


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def masks(folder: Path) -> Iterator[np.ndarray]:
    return (read(path) for path in sorted(folder.glob("*_GT.png")))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_and_counts(root: Path) -> None:
    for split, first, (normal, faulty) in (("train", 10_000, TRAIN), ("test", 20_000, TEST)):
        expected = {f"{first + i}{ending}.png" for i in range(normal + faulty) for ending in ("", "_GT")}
        assert {path.name for path in (root / split).iterdir()} == expected
        assert sum(mask.any() for mask in masks(root / split)) == faulty
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "seed: 0" in readme
    assert "Apache-2.0" in readme


def test_full_sample_counts() -> None:
    for split, first, counts in (("train", 10_000, (60, 20)), ("test", 20_000, (24, 24))):
        drawn = list(numbers(split, counts))
        assert [number for number, _ in drawn] == list(range(first, first + sum(counts)))
        assert sum(is_defective for _, is_defective in drawn) == counts[1]
        half = drawn[: len(drawn) // 2]  # not all of them at the end
        assert sum(is_defective for _, is_defective in half) == counts[1] // 2


def test_files_are_rgb_images_and_binary_masks_of_varied_sizes(root: Path) -> None:
    sizes = []
    for path in root.glob("*/?????.png"):
        with Image.open(path) as image, Image.open(path.with_name(f"{path.stem}_GT.png")) as mask:
            assert (image.mode, mask.mode) == ("RGB", "L")
            assert image.size == mask.size
            assert set(np.unique(np.asarray(mask))) <= {0, 255}
            sizes.append(image.size)
    assert all(WIDTHS[0] <= width <= WIDTHS[2] and HEIGHTS[0] <= height <= HEIGHTS[2] for width, height in sizes)
    assert len(set(sizes)) > len(sizes) // 2


def test_files_hold_what_is_drawn(root: Path) -> None:
    for number, is_defective in numbers("test", TEST):
        drawn = surface_image(0, number, defective=is_defective)
        np.testing.assert_array_equal(read(root / "test" / f"{number}.png"), drawn.image)
        np.testing.assert_array_equal(read(root / "test" / f"{number}_GT.png"), drawn.mask)


def test_the_table_says_what_is_drawn(root: Path) -> None:
    expected = ["split,id,kind"]
    for split, counts in (("train", TRAIN), ("test", TEST)):
        for number, is_defective in numbers(split, counts):
            expected.append(f"{split},{number},{surface_image(0, number, defective=is_defective).kind or 'good'}")
    assert (root / "sources.csv").read_text(encoding="utf-8").splitlines() == expected
    assert sum(line.endswith(",good") for line in expected) == TRAIN[0] + TEST[0]


def test_the_kind_is_that_of_all_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def recorded(draw: Callable[..., surfaces.Field]) -> Callable[..., surfaces.Field]:
        @wraps(draw)
        def record(*arguments: Any) -> surfaces.Field:
            drawn.append(draw.__name__)
            return draw(*arguments)

        return record

    monkeypatch.setattr(surfaces, "DEFECTS", tuple((recorded(draw), *strength) for draw, *strength in DEFECTS))
    found = set()
    for seed in range(30):
        drawn.clear()
        _, kind = surfaces.with_defects(
            np.random.default_rng(seed), np.random.default_rng(0).normal(120, 5, (620, 200)).astype(np.float32)
        )
        assert kind == (drawn[0] if len(set(drawn)) == 1 else "combined")
        found.add(kind)
    assert found == {"scratch", "spots", "mark", "combined"}
    assert surface_image(0, 10_000, defective=False).kind == ""


def test_masks_are_where_the_defect_visibly_changes_the_surface(
    defective: list[tuple[np.ndarray, SurfaceImage]],
) -> None:
    for surface, (image, mask, _) in defective:
        assert surface.shape == image.shape == (*mask.shape, 3)
        assert surface.dtype == image.dtype == mask.dtype == np.uint8
        change = np.abs(image.astype(int) - surface.astype(int)).max(axis=2)
        assert (change[mask == 0] < VISIBLE_CHANGE).all()
        assert (change[mask == 255] >= VISIBLE_CHANGE).mean() > 0.8  # the rest are closed pinholes
        near = cv2.dilate(np.uint8(change >= VISIBLE_CHANGE), np.ones((3, 3), np.uint8))
        assert near[mask == 255].all()
        assert COVERAGE[0] <= (mask == 255).mean() <= COVERAGE[1]


def test_defects_are_of_all_sizes_and_difficulties(defective: list[tuple[np.ndarray, SurfaceImage]]) -> None:
    coverage = [float((mask == 255).mean()) for _, (_, mask, _) in defective]
    contrast = [
        float(np.abs(image.astype(int) - surface)[mask == 255].max(axis=1).mean())
        for surface, (image, mask, _) in defective
    ]
    assert max(coverage) > 10 * min(coverage)
    assert max(contrast) > 2 * min(contrast)


@pytest.mark.parametrize("draw", [draw for draw, *_ in DEFECTS], ids=lambda draw: draw.__name__)
def test_every_kind_of_defect_is_drawn_within_bounds(draw) -> None:
    for seed in range(6):
        change = draw(np.random.default_rng(seed), (620, 230))
        assert (change.shape, change.dtype) == ((620, 230), np.float32)
        assert 0.15 < np.abs(change).max() <= 1.01
        assert (np.abs(change) < 0.01).mean() > 0.7  # most of the surface is left alone


def test_normal_images_have_empty_masks() -> None:
    normal = surface_image(0, 10_003, defective=False)
    assert normal.mask.shape == normal.image.shape[:2]
    assert not normal.mask.any()


def test_surfaces_are_neither_flat_nor_clipped_nor_alike() -> None:
    surfaces = [clean(number) for number in range(20_000, 20_004)]
    for surface in surfaces:
        assert 3 < surface.std() < 40
        assert 60 < surface.mean() < 180
        assert ((surface == 0) | (surface == 255)).mean() < 0.001
        across, along = (np.abs(np.diff(cv2.blur(surface[..., 1].astype(float), (1, 9)), axis=axis)) for axis in (1, 0))
        assert across.mean() > 1.5 * along.mean()  # brushed along the height
    assert len({surface.mean().round(2) for surface in surfaces}) == len(surfaces)


def test_an_image_depends_on_seed_and_number_only() -> None:
    first = surface_image(0, 10_005, defective=True)
    surface_image(0, 10_006, defective=True)
    np.random.default_rng().standard_normal(7)
    again = surface_image(0, 10_005, defective=True)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for seed, number in ((1, 10_005), (0, 10_006)):
        assert surface_image(seed, number, defective=True).image.tobytes() != first.image.tobytes()


def test_samples_of_other_sizes_hold_the_same_images(root: Path, tmp_path: Path) -> None:
    generate_sample(tmp_path / "other", train=(1, 0), test=TEST)
    written, other = snapshot(root), snapshot(tmp_path / "other")
    assert all(other[name] == content for name, content in written.items() if name.startswith("test/"))
    assert written["train/10000.png"] == other["train/10000.png"]  # the first image is normal in both


def test_a_complete_sample_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(surfaces, "surface_image", None)  # nothing is drawn
    generate_small(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "not" / "there"):
        generate_sample(root, train=(1, 0), test=(0, 1))
        assert len(list(root.rglob("*.png"))) == 4
        assert [path.name for path in root.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls = iter(range(100))

    def crash(seed: int, number: int, *, defective: bool) -> SurfaceImage:
        if next(calls) == after:
            raise KeyboardInterrupt
        return surface_image(seed, number, defective=defective)

    monkeypatch.setattr(surfaces, "surface_image", crash)
    with pytest.raises(KeyboardInterrupt):
        generate_sample(tmp_path / "root", train=(1, 1), test=(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"dear to somebody")
    with pytest.raises(FileExistsError, match=r"holds something else.*Remove it.*choose another `root`"):
        generate_small(tmp_path)
    assert snapshot(tmp_path) == {"holiday.png": b"dear to somebody"}


def test_a_sample_of_another_seed_is_refused(root: Path) -> None:
    with pytest.raises(FileExistsError, match="something else"):
        generate_small(root, seed=1)
