"""Backbones, their weights and what is done to their features."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.module import register_module_forward_hook

from anomalib_exdd.models.exdd.features import PatchFeatureExtractor, adaptive_average, with_folded_norms
from anomalib_exdd.models.exdd.filter_bank import FilterBank
from anomalib_exdd.models.weights import read_state_dict

LAYERS = ["layer2", "layer3"]
IMAGES = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return timm.create_model("resnet18", pretrained=False).state_dict()


def test_features_are_pooled_upsampled_and_concatenated() -> None:
    extractor = PatchFeatureExtractor("resnet18", LAYERS, pre_trained=False)
    maps = extractor.backbone(IMAGES)
    fine, coarse = (F.avg_pool2d(maps[layer].double(), 3, 1, 1) for layer in LAYERS)
    expected = torch.cat([fine, F.interpolate(coarse, size=(12, 8), mode="bilinear", align_corners=False)], dim=1)
    assert extractor(IMAGES).shape == (2, 384, 12, 8)
    torch.testing.assert_close(extractor(IMAGES).double(), expected, rtol=1e-5, atol=1e-6)


def test_published_pooling_has_no_padding_and_returns_to_the_grid() -> None:
    extractor = PatchFeatureExtractor("resnet18", LAYERS, pre_trained=False, padded=False)
    maps = extractor.backbone(IMAGES)
    expected = torch.cat([F.adaptive_avg_pool2d(F.avg_pool2d(maps[layer], 3, 1), (12, 8)) for layer in LAYERS], dim=1)
    torch.testing.assert_close(extractor(IMAGES), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "grid"), [((10, 6), (12, 8)), ((4, 2), (12, 8)), ((17, 9), (5, 4)), ((3, 3), (3, 3))])
def test_adaptive_average_is_torchs(size: tuple[int, int], grid: tuple[int, int]) -> None:
    features = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adaptive_average(features, grid), F.adaptive_avg_pool2d(features, grid))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file(suffix: str, state_dict: dict[str, torch.Tensor], tmp_path: Path) -> None:
    partial = {name: value for name, value in state_dict.items() if not name.startswith(("layer4", "fc"))}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in partial.items()}}, path)
    else:
        save_file(partial, path)
    extractor = PatchFeatureExtractor("resnet18", LAYERS, weights=path)
    assert not extractor.weights_ready
    features = extractor(IMAGES)
    network = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(1, 2, 3)).eval()
    network.load_state_dict(partial, strict=False)  # layer1 comes along for the refined map
    torch.testing.assert_close(extractor.backbone.feature_extractor(IMAGES), network(IMAGES))
    assert torch.equal(features, extractor(IMAGES))


def test_weights_that_do_not_fit_are_refused(state_dict: dict[str, torch.Tensor], tmp_path: Path) -> None:
    short = {name: value for name, value in state_dict.items() if not name.startswith("layer2.1")}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"short\.safetensors do not fit the backbone 'resnet18'.*layer2\.1\.conv1"):
        PatchFeatureExtractor("resnet18", LAYERS, weights=tmp_path / "short.safetensors").load_weights()
    with pytest.raises(ValueError, match="do not fit the backbone 'resnet50'"):
        PatchFeatureExtractor("resnet50", LAYERS, weights=tmp_path / "short.safetensors").load_weights()


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_files_are_read_without_running_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "harmful.pth"
    torch.save({"conv1.weight": Harmful()}, path)
    with pytest.raises(ValueError, match=r"harmful\.pth cannot be read as plain tensors"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_state_dict(path)
    assert "executed" not in capsys.readouterr().out
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state dict"):
        read_state_dict(path)


def test_without_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model

    def offline(*args: object, pretrained: bool = False, **kwargs: object) -> object:
        if pretrained:
            msg = "Name or service not known"
            raise OSError(msg)
        return create_model(*args, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    extractor = PatchFeatureExtractor("resnet18", LAYERS)
    with pytest.raises(
        RuntimeError, match=r"'resnet18' are not in the local cache.*--model\.weights.*pre_trained false"
    ):
        extractor.load_weights()


def test_random_network_is_the_same_for_everybody() -> None:
    torch.manual_seed(1)
    first = PatchFeatureExtractor("resnet18", LAYERS, pre_trained=False)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = PatchFeatureExtractor("resnet18", LAYERS, pre_trained=False)
    assert torch.equal(first(IMAGES), second(IMAGES))
    torch.manual_seed(1)
    PatchFeatureExtractor("resnet18", LAYERS, pre_trained=False)
    assert torch.equal(torch.random.get_rng_state(), state)  # the surroundings' random numbers are left alone


def test_backbone_is_frozen_and_stays_in_evaluation_mode() -> None:
    extractor = PatchFeatureExtractor("resnet18", LAYERS, pre_trained=False).train()
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    extractor(IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_other_families_of_backbones() -> None:
    extractor = PatchFeatureExtractor("convnext_atto", ["stages.1", "stages.2"], pre_trained=False)
    assert extractor(IMAGES).shape == (2, 80 + 160, 12, 8)


def test_filter_bank_ignores_brightness_and_contrast_of_the_image() -> None:
    rng = np.random.default_rng(0)
    texture = torch.from_numpy(rng.normal(size=(1, 1, 128, 96))).float()
    image = (0.4 + 0.1 * texture).repeat(1, 3, 1, 1)
    brighter = (0.5 + 0.1 * texture).repeat(1, 3, 1, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    bank = FilterBank()
    maps = [bank((picture - mean) / std)["filter_bank"] for picture in (image, brighter)]
    assert maps[0].shape == (1, 38, 16, 12)
    torch.testing.assert_close(maps[0][:, 2:], maps[1][:, 2:], rtol=1e-2, atol=1e-2)  # filters have zero mean
    torch.testing.assert_close(maps[0].mean(dim=(2, 3)), torch.zeros(1, 38), atol=1e-4, rtol=0)


def test_filter_bank_sees_a_scratch() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(0, 0.02, size=(1, 3, 128, 128))).float()
    image[:, :, 60:62, 20:100] += 0.5
    energy = FilterBank()(image)["filter_bank"].abs().mean(dim=1)[0]
    assert energy[7, 3:12].mean() > 2 * energy[2].mean()


def test_filter_bank_needs_no_weights() -> None:
    extractor = PatchFeatureExtractor("filter_bank", LAYERS, pre_trained=True)
    assert extractor.weights_ready
    assert extractor(IMAGES).shape == (2, 38, 12, 8)


# Known blocks; a stem in a Sequential; norms before convolutions, standardised weights, other norms and no norms.
@pytest.mark.parametrize(
    ("backbone", "norms_left"),
    [("resnet18", 0), ("resnet26d", 1), ("resnetv2_50d_gn", 0), ("test_efficientnet", None), ("vgg11_bn", 0)],
)
def test_folded_batch_norms_change_nothing_but_rounding(backbone: str, norms_left: int | None) -> None:
    network = timm.create_model(backbone, pretrained=False, features_only=True, out_indices=(1, 2)).eval()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after a training
            module.running_mean = torch.randn(module.num_features, generator=generator) / 10
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
    images, before = torch.randn(2, 3, 64, 96, generator=generator), copy.deepcopy(network.state_dict())
    folded = with_folded_norms(network)
    for found, expected in zip(folded(images), network(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if norms_left is not None:
        assert sum(type(module) is torch.nn.BatchNorm2d for module in folded.modules()) == norms_left
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_batch_norms_stay_where_their_input_is_looked_at() -> None:
    conv, norm = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)
    watched = torch.nn.Sequential(conv, norm).eval()
    seen = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert with_folded_norms(watched) is watched
    unknown = torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(3, 4, 1), "bn1": torch.nn.BatchNorm2d(4)}).eval()
    assert with_folded_norms(unknown) is unknown  # nobody knows in which order it runs them


def test_predictions_take_the_folded_backbone() -> None:
    extractor = PatchFeatureExtractor("resnet18", ["layer2", "layer3"], pre_trained=False)
    maps = extractor.backbone(IMAGES)
    expected = F.avg_pool2d(maps["layer2"], 3, 1, 1)
    torch.testing.assert_close(extractor(IMAGES)[:, :128], expected, rtol=1e-4, atol=1e-4)
    used: set[type[torch.nn.Module]] = set()
    with register_module_forward_hook(lambda module, *_: used.add(type(module))):
        extractor(IMAGES)
    assert torch.nn.Conv2d in used
    assert torch.nn.BatchNorm2d not in used
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in extractor.backbone.modules())


def test_a_changed_backbone_is_folded_anew() -> None:
    first, second = (PatchFeatureExtractor("resnet18", ["layer2"], pre_trained=False) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.01)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    size = len(pickle.dumps(first))
    before = first(images)
    assert len(pickle.dumps(first)) == len(pickle.dumps(copy.deepcopy(first))) == size  # without the folded network
    first.load_state_dict(second.state_dict())
    assert not torch.equal(first(images), before)
    torch.testing.assert_close(first(images), second(images))
    assert first.double()(images.double()).dtype == torch.float64
    assert not any("folded" in name for name in first.state_dict())
