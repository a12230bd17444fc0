"""Patches come back from memory and from disk as they were, also after an interruption."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anomalib_exdd.models.exdd import training_stores
from anomalib_exdd.models.exdd.training_stores import FeatureStore, TrainingStores

Image = tuple[str, Tensor, Tensor, Tensor]


def image(name: str, patches: int, seed: int = 0) -> Image:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(patches, 7, generator=generator)
    positions = torch.randint(0, 5000, (patches, 2), generator=generator)
    return name, features, torch.randn(patches, 3, generator=generator), positions


def assert_holds(store: FeatureStore, images: list[Image], *, half: bool) -> None:
    assert store.lengths == {name: len(features) for name, features, _, _ in images}
    for name, features, projected, positions in images:
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
    memory, disk = FeatureStore(), FeatureStore(tmp_path_factory.mktemp("store"))
    for each in images:
        memory.add(*each)
        disk.add(*each)
    assert_holds(memory, images, half=False)
    assert_holds(disk, images, half=True)
    assert_holds(FeatureStore(disk.folder), images, half=True)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".partial"])
def test_an_interrupted_image_is_forgotten(suffix: str, kept: float, tmp_path: Path) -> None:
    """With a file that is written in part, before or after it is renamed, the other images are whole."""
    images = [image("a", 4, 1), image("b", 5, 2), image("c", 3, 3)]
    store = FeatureStore(tmp_path)
    store.add(*images[0])
    before = set(tmp_path.iterdir())
    store.add(*images[1])
    (written,) = set(tmp_path.iterdir()) - before
    damaged = written.rename(written.with_suffix(suffix))
    with damaged.open("r+b") as file:
        file.truncate(int(kept * damaged.stat().st_size))
    again = FeatureStore(tmp_path)
    assert_holds(again, images[:1], half=True)
    again.add(*images[2])
    again.add(*images[1])
    assert_holds(again, images, half=True)
    assert_holds(FeatureStore(tmp_path), images, half=True)


def opened(place: Path, seed: int, images: int = 1) -> tuple[TrainingStores, Path]:
    """Open the stores of a training on disk; return them and their folder."""
    stores = TrainingStores("disk", place, lambda: images, lambda: {"seed": seed})
    folder = stores.open("normal", 4, 7, 3).folder
    assert folder is not None
    return stores, folder.parent


class TestFoldersOfTrainings:
    def test_the_same_training_finds_its_folder_again(self, tmp_path: Path) -> None:
        stores, folder = opened(tmp_path, 1)
        (folder / "kept").write_text("x")
        other, twin = opened(tmp_path, 2), opened(tmp_path, 1)  # while the first is still running
        assert len({folder, other[1], twin[1]}) == 3
        stores.release()
        again = opened(tmp_path, 1)
        assert again[1] == folder
        assert (folder / "kept").read_text() == "x"
        for each, _ in (again, other, twin):
            each.remove()
        assert list(tmp_path.iterdir()) == []

    def test_what_nobody_resumes_is_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (old, folder), (running, used) = opened(tmp_path, 1), opened(tmp_path, 2)
        old.release()
        opened(tmp_path, 3)[0].remove()
        assert folder.is_dir()  # it may still be resumed
        monkeypatch.setattr(training_stores, "KEPT_SECONDS", -1.0)
        opened(tmp_path, 3)[0].remove()
        assert not folder.exists()
        assert used.is_dir()
        running.remove()

    def test_a_full_disk_is_an_error_that_names_folder_and_sizes(self, tmp_path: Path) -> None:
        old, folder = opened(tmp_path, 1)
        old.release()
        # 4 patches of 7 features in 2 bytes, 3 projections in 4 and a position in 8, and a twentieth more.
        with pytest.raises(OSError, match=rf"take 142800000\.0 GB on disk, but {tmp_path} has .* GB free.*_dir"):
            opened(tmp_path, 2, images=10**15)
        assert not folder.exists()  # its space was needed
        opened(tmp_path, 2)[0].remove()  # the failed one holds no lock
