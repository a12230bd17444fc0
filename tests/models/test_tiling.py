"""Tiles: the backbone sees one at a time, and what comes out is what comes out of whole images."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from anomalib_exdd import ExDD
from anomalib_exdd.models.exdd.memory_bank import BankContent
from anomalib_exdd.models.exdd.scoring import PatchDistances
from anomalib_exdd.models.exdd.tiling import spans
from anomalib_exdd.models.exdd.torch_model import ExDDModel

Make = Callable[..., Any]

STEP = 16  # pixels to a cell of a ResNet's layer3
EXACT = 288  # overlap beyond the reach of ResNet-18's layer3: 121 pixels to each side, and cells of the average's rim
LENGTHS = [100, 288, 304, 305, 499, 1000, 2000, 8000]


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(0, 39))
def test_every_pixel_is_taken_once_from_where_it_has_the_overlaps_half_around_it(
    length: int, size: int, overlap: int
) -> None:
    size, overlap = STEP * size, STEP * min(overlap, size - 1)
    found = spans(length, size, overlap, STEP)
    assert [found[0].first, *(span.last for span in found)] == [0, *(span.first for span in found[1:]), length]
    for span in found:
        assert span.start % STEP == span.first % STEP == 0
        assert span.stop - span.start < size + STEP
        assert span.start <= span.first < span.last <= span.stop
        assert span.start == 0 or span.first - span.start >= overlap // 2 // STEP * STEP
        assert span.stop == length or span.stop - span.last >= overlap // 2
    for span, following in pairwise(found):
        assert span.stop - following.start >= overlap


@pytest.mark.parametrize("length", LENGTHS)
def test_no_more_tiles_than_needed(length: int) -> None:
    size, overlap = 288, 96
    needed = 1 if length < size + STEP else -(-(length - length % STEP - overlap) // (size - overlap))
    assert len(spans(length, size, overlap, STEP)) == needed


def with_full_reach(model: ExDDModel) -> ExDDModel:
    """Let every residual branch of a random network count: timm starts them at 0, so that little is seen around."""
    for module in model.feature_extractor.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


def models_of(tile_size: int, overlap: int, **arguments: Any) -> tuple[ExDDModel, ExDDModel]:
    """The same model on whole images and on tiles, untrained."""
    tiles: dict[str, Any] = {"tile_size": tile_size, "tile_overlap": overlap}
    whole, tiled = (
        ExDDModel("resnet18", ["layer2", "layer3"], pre_trained=False, **arguments, **each) for each in ({}, tiles)
    )
    return with_full_reach(whole), with_full_reach(tiled)


def surface(height: int, width: int, count: int = 1) -> Tensor:
    """A smooth texture with a fine one on it, standardised, shape (B, 3, H, W)."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, height // 40 + 2, width // 40 + 2, generator=rng)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth - 0.5) * 3 + torch.randn(count, 3, height, width, generator=rng) * 0.2


def steps(maps: Tensor) -> Tensor:
    """How much neighbours along the rows differ, largest in every column."""
    return (maps[..., 1:] - maps[..., :-1]).abs().amax(dim=(0, 1, 2))


@torch.inference_mode()
def test_with_enough_overlap_tiles_give_the_features_of_whole_images() -> None:
    whole, tiled = models_of(320, EXACT)
    images = surface(352, 448, 2)
    for found, expected in zip(tiled.extract(images), whole.extract(images), strict=True):
        assert found is not None
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@torch.inference_mode()
def test_little_overlap_shows_at_the_seams_alone() -> None:
    """What the tests of equality rest on: without overlap there are seams, and they are found."""
    whole, tiled = models_of(320, 0)
    images = surface(320, 640)
    expected, found = whole.embed(images), tiled.embed(images)
    error_w = (found - expected).norm(dim=1).amax(dim=(0, 1))
    assert error_w[39:41].min() > expected.std()
    assert error_w[:20].max() < 1e-3 * expected.std()


@torch.inference_mode()
@pytest.mark.parametrize("scoring", ["calibrated", "paper", "ratio"])
def test_scores_and_maps_have_no_seams(scoring: str) -> None:
    models = models_of(320, EXACT, scoring=scoring, image_scoring=scoring)
    training = surface(128, 128, 2)
    whole, tiled = models
    features = whole.embed(training).flatten(2).transpose(1, 2).flatten(0, 1)
    fine = whole.extract(training)[1]
    assert fine is not None
    for model in models:
        for bank, rows in ((model.negative_bank, slice(0, 60)), (model.positive_bank, slice(300, 330))):
            count = len(features[rows])
            bank.fill(BankContent(features[rows], torch.zeros(count).long(), torch.zeros(count, 2).long(), ["a.png"]))
        rng = torch.Generator().manual_seed(1)
        for network, inputs in ((model.boundary, features.shape[1]), (model.refinement, fine.shape[1])):
            network.weight_in, network.bias_in = torch.randn(inputs, 4, generator=rng) / inputs, torch.zeros(4)
            network.weight_out, network.bias_out = torch.ones(1, 4), torch.zeros(1)
        model.calibration.known_weights = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 1.0])
        model.calibration.unknown_slope = torch.tensor(0.02)
    images = surface(352, 448, 2)
    found, expected = (model.score_images(images) for model in (tiled, whole))
    assert found.grid == expected.grid == (44, 56)
    torch.testing.assert_close(found.scores.images, expected.scores.images, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.scores.patches, expected.scores.patches, rtol=1e-3, atol=1e-4)
    spread = float(expected.anomaly_map.std())
    assert spread > 0
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3 * spread)
    torch.testing.assert_close(steps(found.anomaly_map), steps(expected.anomaly_map), rtol=1e-3, atol=1e-3 * spread)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(321, 500), (333, 200), (64, 1001)])
def test_any_size_of_images_fits(size: tuple[int, int]) -> None:
    whole, tiled = models_of(96, 32)
    shapes = [
        [None if maps is None else maps.shape for maps in model.extract(surface(*size))] for model in (whole, tiled)
    ]
    assert shapes[0] == shapes[1]


@torch.inference_mode()
def test_neither_backbone_nor_search_sees_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tiled = models_of(96, 32)
    tiled.negative_bank.fill(
        BankContent(torch.randn(20, 384), torch.zeros(20).long(), torch.zeros(20, 2).long(), ["a.png"])
    )
    seen, searched = [], []
    tiled.feature_extractor.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    search = tiled.negative_bank.distances

    def counting(rows: Tensor, **arguments: Any) -> PatchDistances:
        searched.append(rows.shape[1:3])
        return search(rows, **arguments)

    monkeypatch.setattr(tiled.negative_bank, "distances", counting)
    tiled.score_images(surface(480, 800))
    assert len(seen) == len(searched) > 50
    assert max(max(size) for size in seen) <= 96
    assert max(max(size) for size in searched) <= 12


@pytest.fixture(scope="module")
def tiles() -> dict[str, Any]:
    """Tiles of the small images, 96 x 64, with too little overlap to be exact: another tiling has other scores."""
    return {"tile_size": 64, "tile_overlap": 32}


def test_a_checkpoint_keeps_its_tiles_and_a_torch_export_too(
    tiles: dict[str, Any], small_model: Make, small_data: Make, engine: Make, sample_root: Path, tmp_path: Path
) -> None:
    trained = small_model(**tiles)
    with_full_reach(trained.model)
    training = engine()
    training.fit(model=trained, datamodule=small_data())
    path = training.best_model_path
    photo = sample_root / "test" / "20001.png"
    image = torch.as_tensor(read_image(photo, as_tensor=True))[None]
    expected = engine().predict(model=trained, data_path=photo)[0]
    probability = trained.eval().model(trained.pre_processor(image))
    whole = small_model()
    whole.load_state_dict(trained.state_dict())
    for model in (small_model(), small_model(**tiles), cast("Any", ExDD.load_from_checkpoint(path))):
        found = engine().predict(model=model, data_path=photo, ckpt_path=path)[0]
        assert (model.hparams.tile_size, model.hparams.tile_overlap) == (64, 32)
        assert torch.equal(found.pred_score, expected.pred_score)
        assert torch.equal(found.anomaly_map, expected.anomaly_map)
        assert torch.equal(model.eval().model(model.pre_processor(image)).pred_score, probability.pred_score)
    untiled = whole.eval().model(whole.pre_processor(image))
    assert not torch.allclose(untiled.anomaly_map, probability.anomaly_map, atol=1e-3)
    for other in ({"tile_size": 48, "tile_overlap": 32}, {"tile_size": 64, "tile_overlap": 16}):
        with pytest.raises(ValueError, match=r"`tile_.*` is .*, but the checkpoint was trained with"):
            engine().predict(model=small_model(**other), data_path=photo, ckpt_path=path)
    for export_type in (ExportType.ONNX, ExportType.OPENVINO):
        with pytest.raises(ValueError, match="--export_type torch"):
            engine().export(model=trained, export_type=export_type, export_root=tmp_path)
    exported = engine().export(model=trained, export_type=ExportType.TORCH, export_root=tmp_path)
    inferencer = torch.load(exported, weights_only=False)["model"]
    with torch.inference_mode():
        torch.testing.assert_close(inferencer(image).pred_score, expected.pred_score)


def test_a_model_trained_on_whole_images_takes_no_tiles(
    tiles: dict[str, Any], trained: tuple[ExDD, Path], small_model: Make, small_data: Make, engine: Make
) -> None:
    with pytest.raises(ValueError, match="`tile_size` is 64, but the checkpoint was trained with None"):
        engine().test(model=small_model(**tiles), datamodule=small_data(), ckpt_path=trained[1])


def test_anomalibs_callback_is_refused_with_what_to_write_instead(
    small_model: Make, small_data: Make, engine: Make
) -> None:
    callback = TilerConfigurationCallback(enable=True, tile_size=64, stride=48)
    with pytest.raises(ValueError, match=r"--model.tile_size 64 --model.tile_overlap 16"):
        engine(callbacks=[callback]).fit(model=small_model(), datamodule=small_data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_size": 100, "tile_overlap": 32}, "multiples of .* reduction 16, .*, but got 100 and 32"),
        ({"tile_size": 96, "tile_overlap": 20}, "but got 96 and 20"),
        ({"tile_size": 96, "tile_overlap": 96}, "the overlap smaller, but got 96 and 96"),
        ({"tile_size": 64, "tile_overlap": -16}, "but got 64 and -16"),
        ({"tile_size": 0, "tile_overlap": 0}, "but got 0 and 0"),
        ({"tile_size": 256, "backbone": "filter_bank"}, "'filter_bank' relates every patch to the whole image"),
        ({"tile_size": 512, "scoring": "published"}, "scoring 'published' relates every patch to the whole image"),
    ],
)
def test_tiles_that_cannot_work_are_refused(arguments: dict[str, Any], message: str, small_model: Make) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)
