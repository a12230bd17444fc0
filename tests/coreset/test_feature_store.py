"""Patches come back from both stores as they were, also after an interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anomalib_exdd.coreset import DiskStore, FeatureStore, MemoryStore, StoreFolder, feature_store

Image = tuple[str, Tensor, Tensor, Tensor]


def image(name: str, patches: int, seed: int = 0) -> Image:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(patches, 7, generator=generator)
    positions = torch.randint(0, 5000, (patches, 2), generator=generator)
    return name, features, torch.randn(patches, 3, generator=generator), positions


def assert_holds(store: FeatureStore, images: list[Image], *, half: bool) -> None:
    assert store.lengths == {name: len(features) for name, features, _, _ in images}
    for name, features, projected, positions in images:
        assert name in store
        expected = features.half().float() if half else features
        assert torch.equal(store.features(name), expected)
        rows = torch.arange(len(features) - 1, -1, -2)
        assert torch.equal(store.features(name, rows), expected[rows])
        assert store.features(name, rows[:0]).shape == (0, 7)
        assert torch.equal(store.projected(name), projected)
        assert torch.equal(store.positions(name), positions)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    images = [image(f'ï "{number}"\n.png', length, number) for number, length in enumerate(lengths)]
    memory, disk = MemoryStore(), DiskStore(tmp_path_factory.mktemp("store"), 7, 3)
    for each in images:
        memory.add(*each)
        disk.add(*each)
    assert_holds(memory, images, half=False)
    assert_holds(disk, images, half=True)
    assert_holds(DiskStore(disk.folder, 7, 3), images, half=True)


@pytest.mark.parametrize("damage", ["features.f16", "projected.f32", "positions.i32", "images.jsonl"])
def test_an_interrupted_image_is_forgotten(damage: str, tmp_path: Path) -> None:
    """Whatever was half-written when the process died, the images before are whole and the next one fits on."""
    images = [image("a", 4, 1), image("b", 5, 2), image("c", 3, 3)]
    store = DiskStore(tmp_path, 7, 3)
    store.add(*images[0])
    before = (tmp_path / damage).stat().st_size
    store.add(*images[1])
    with (tmp_path / damage).open("r+b") as file:  # half of what the second image added
        file.truncate((before + (tmp_path / damage).stat().st_size) // 2)
    again = DiskStore(tmp_path, 7, 3)
    assert_holds(again, images[:1], half=True)
    again.add(*images[2])
    assert_holds(again, [images[0], images[2]], half=True)
    assert_holds(DiskStore(tmp_path, 7, 3), [images[0], images[2]], half=True)


def test_features_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 2, 2)
    with pytest.raises(ValueError, match=r"A feature of a\.png is 1e\+05.*--model\.feature_store memory"):
        store.add("a.png", torch.tensor([[1.0, 1e5]]), torch.zeros(1, 2), torch.zeros(1, 2).long())
    assert "a.png" not in store


class TestStoreFolder:
    def test_the_same_training_finds_its_folder_again(self, tmp_path: Path) -> None:
        folder = StoreFolder(tmp_path, {"seed": 1}, 10)
        (folder.path / "kept").write_text("x")
        other = StoreFolder(tmp_path, {"seed": 2}, 10)
        twin = StoreFolder(tmp_path, {"seed": 1}, 10)  # while the first is still running
        assert len({folder.path, other.path, twin.path}) == 3
        folder.release()
        again = StoreFolder(tmp_path, {"seed": 1}, 10)
        assert again.path == folder.path
        assert (again.path / "kept").read_text() == "x"
        for each in (again, other, twin):
            each.remove()
        assert list(tmp_path.iterdir()) == []

    def test_what_nobody_resumes_is_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old, running = StoreFolder(tmp_path, {"seed": 1}, 10), StoreFolder(tmp_path, {"seed": 2}, 10)
        old.release()
        StoreFolder(tmp_path, {"seed": 3}, 10).remove()
        assert old.path.is_dir()  # it may still be resumed
        monkeypatch.setattr(feature_store, "KEPT_SECONDS", -1.0)
        StoreFolder(tmp_path, {"seed": 3}, 10).remove()
        assert not old.path.exists()
        assert running.path.is_dir()
        running.remove()

    def test_a_full_disk_is_an_error_that_names_folder_and_sizes(self, tmp_path: Path) -> None:
        old = StoreFolder(tmp_path, {"seed": 1}, 10)
        old.release()
        with pytest.raises(OSError, match=rf"take 1000000000\.0 GB on disk, but {tmp_path} has .* GB free.*_dir"):
            StoreFolder(tmp_path, {"seed": 2}, 10**18)
        assert not old.path.exists()  # its space was needed
        StoreFolder(tmp_path, {"seed": 2}, 10).remove()  # the failed one holds no lock


def test_the_list_of_images_is_plain_json(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 7, 3)
    store.add(*image("a", 2))
    assert json.loads((tmp_path / "images.jsonl").read_text()) == {"name": "a", "rows": 2}
    assert np.fromfile(tmp_path / "projected.f32", np.float32).shape == (6,)
