"""Pictures of tests and predictions: whatever the image was, it is drawn as the model sees it."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_exdd import DefectClassifier, ExDD
from anomalib_exdd.models.transforms import without_normalization
from anomalib_exdd.models.visualization import SeenImageVisualizer

Make = Callable[..., Any]
LABEL = 30  # rows of a panel that the label covers


class Items(Dataset):  # type: ignore[type-arg]
    """Images, with or without the paths that their owner gave them."""

    def __init__(self, images: list[torch.Tensor], paths: list[str | None]) -> None:
        self.images, self.paths = images, paths

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(image=self.images[index], image_path=self.paths[index])


def loader_of(images: list[torch.Tensor], paths: list[str | None]) -> DataLoader:  # type: ignore[type-arg]
    return DataLoader(Items(images, paths), batch_size=2, collate_fn=ImageBatch.collate)


def random_images(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 96, 64, generator=generator) for _ in range(count)]


def pictures(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def first_panel(path: Path, panels: int = 3) -> NDArray[np.int64]:
    """The picture of the image itself."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int64)[:, : picture.width // panels]


@pytest.fixture
def model(trained: tuple[ExDD, Path]) -> ExDD:
    return deepcopy(trained[0])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results" / "ExDD" / "latest"


def test_images_without_paths_get_names(model: ExDD, engine: Make, results: Path) -> None:
    model.hparams.explain = 1
    images = random_images(3)
    engine().predict(model=model, dataloaders=loader_of(images, [None] * 3))
    names = [f"batch_0000{batch}_image_00{number}" for batch, number in ((0, 0), (0, 1), (1, 0))]
    assert list(pictures(results / "images")) == [f"{name}.png" for name in names]
    assert set(pictures(results / "explanations")) == {f"{name}.{end}" for name in names for end in ("json", "png")}
    rows = (results / "predictions.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["path", *(f"{name}.png" for name in names)]
    for image, path in zip(images, pictures(results / "images").values(), strict=True):
        shown = first_panel(path)[LABEL:-24]
        expected = Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).resize((200, 300))
        assert np.abs(shown - np.asarray(expected)[LABEL:]).mean() < 2


@pytest.mark.parametrize("name", ["folder/a.npy", "folder/frame 7", "folder/b.fits"])
def test_pictures_of_other_kinds_of_files_are_png(model: ExDD, engine: Make, results: Path, name: str) -> None:
    engine().predict(model=model, dataloaders=loader_of(random_images(1), [name]))
    assert list(pictures(results / "images")) == [f"{name}.png"]


def test_deep_images_are_not_white(model: ExDD, engine: Make, results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)[:, None].repeat(64, axis=1)
    Image.fromarray(ramp).save(folder / "a8.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "b16.png")
    engine().predict(model=model, data_path=folder)
    plain, deep = (first_panel(path) for path in pictures(results / "images").values())
    assert np.abs(plain - deep)[:-24].max() <= 2
    assert plain[LABEL:-24].min() < 100


@pytest.mark.parametrize("make", [ExDD, DefectClassifier])
def test_every_model_draws_what_it_sees(make: Make) -> None:
    assert isinstance(make(pre_trained=False).visualizer, SeenImageVisualizer)


def transforms() -> Iterator[Any]:
    normalize = Normalize(mean=[0.4, 0.5, 0.3], std=[0.2, 0.1, 0.3])
    yield None, None
    yield Resize((9, 7)), Resize((9, 7))
    yield Compose([Resize((9, 7)), normalize]), Resize((9, 7))
    yield Compose([Compose([normalize]), Resize((9, 7))]), Resize((9, 7))


@pytest.mark.parametrize(("transform", "geometry"), transforms())
def test_normalization_is_taken_back(transform: Any, geometry: Any) -> None:
    (image,) = random_images(1)
    seen = transform(image) if transform else image
    torch.testing.assert_close(
        without_normalization(seen, transform), geometry(image) if geometry else image, rtol=0, atol=1e-5
    )
