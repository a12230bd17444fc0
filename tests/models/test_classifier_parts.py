"""The classifier's network, loss, presets, threshold and record, each against an oracle."""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import ImageBatch, InferenceBatch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd import DefectClassifier
from anomalib_exdd.models.defect_classifier.post_processor import ProbabilityPostProcessor
from anomalib_exdd.models.defect_classifier.selection import SELECTION, EpochSelection, ValidationRecord
from anomalib_exdd.models.defect_classifier.torch_model import DefectClassifierModel
from anomalib_exdd.models.defect_classifier.training import label_loss, label_weights
from anomalib_exdd.models.weights import fresh_layers
from toy_surfaces import TOY


def images(count: int, size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "test_convnext", "mobilenetv3_small_050"])
def test_the_mean_of_the_activation_is_the_logit_of_pooling_and_a_linear_layer(backbone: str) -> None:
    model = DefectClassifierModel(backbone, pre_trained=False).eval()
    with torch.no_grad():
        batch = images(3)
        activation = model.activation(batch)
        pooled = model.backbone(batch).mean(dim=(2, 3))
        logits = F.linear(pooled, model.head.weight, model.head.bias).squeeze(1)
        torch.testing.assert_close(activation.mean(dim=(1, 2)), logits, rtol=1e-4, atol=1e-5)
        found = model(batch)
    torch.testing.assert_close(found.pred_score, torch.sigmoid(logits), rtol=1e-4, atol=1e-6)
    assert found.anomaly_map.shape == (3, 1, 64, 96)
    assert activation.shape[1:] == (2, 3)
    # Between two cells, as anywhere, the map is their weighted mean: pixels 31 and 32 lie around the border.
    border = found.anomaly_map[:, 0, 0, 31:33].mean(dim=1)
    torch.testing.assert_close(border, activation[:, 0, :2].mean(dim=1), rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_timms_own_network_with_one_class() -> None:
    ours = DefectClassifierModel("resnet18", pre_trained=False).eval()
    theirs = timm.create_model("resnet18", pretrained=False, num_classes=1).eval()
    theirs.load_state_dict(
        {**ours.backbone.state_dict(), "fc.weight": ours.head.weight.detach(), "fc.bias": ours.head.bias.detach()}
    )
    with torch.no_grad():
        expected = torch.sigmoid(theirs(images(2)).squeeze(1))
        torch.testing.assert_close(ours(images(2)).pred_score, expected, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 200), st.integers(1, 200))
def test_balanced_weights_are_scikit_learns(normal: int, defective: int) -> None:
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=np.repeat([0, 1], [normal, defective]))
    np.testing.assert_allclose(label_weights(normal, defective, "balanced"), expected)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1.0, 2.0, 5.0]))
def test_a_weight_is_a_repetition_of_the_defective_images(normal: int, defective: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(normal * 10 + defective)
    logits = torch.randn(normal + defective, generator=generator)
    labels = torch.tensor([0] * normal + [1] * defective)
    weights = label_weights(normal, defective, weight)
    repeats = torch.where(labels == 1, int(weight), 1)
    repeated = F.binary_cross_entropy_with_logits(
        logits.repeat_interleave(repeats), labels.repeat_interleave(repeats).float()
    )
    torch.testing.assert_close(label_loss(logits, labels, weights), repeated)


@pytest.mark.parametrize(("normal", "defective", "kind"), [(5, 0, "defective"), (0, 5, "normal")])
def test_one_kind_of_training_images_is_an_error(normal: int, defective: int, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"no {kind} one.*anomalib synthesize"):
        label_weights(normal, defective, "balanced")


def test_presets_are_the_published_settings_and_each_can_be_replaced() -> None:
    in_and_out, diag = (DefectClassifier("test_resnet", preset=p, pre_trained=False) for p in ("in_and_out", "diag"))
    assert in_and_out.input_size == (600, 200)
    assert diag.input_size == (704, 256)
    optimizers = [model.configure_optimizers() for model in (in_and_out, diag)]
    assert [type(each).__name__ for each in optimizers] == ["SGD", "Adam"]
    assert [each.param_groups[0]["lr"] for each in optimizers] == [0.01, 1e-4]
    assert [(m.settings.batch_size, m.settings.max_epochs) for m in (in_and_out, diag)] == [(5, 50), (32, 50)]

    changed = DefectClassifier(
        **{**TOY, "preset": "in_and_out"}, optimizer="sgd", learning_rate=0.2, momentum=0.5, weight_decay=0.1
    )
    group = changed.configure_optimizers().param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.5, 0.1)
    assert changed.input_size == TOY["image_size"]
    adam = DefectClassifier(**{**TOY, "preset": "in_and_out"}, optimizer="adam").configure_optimizers()
    assert type(adam).__name__ == "Adam"
    assert adam.param_groups[0]["lr"] == 0.01  # the preset's, as everything that was not given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet17"}, r"`backbone` has to be a timm model, but got 'resnet17'"),
        ({"backbone": "vit_tiny_patch16_224"}, r"`backbone` has to be a timm model whose output .* feature maps"),
        ({"preset": "best"}, r"`preset` has to be one of \('in_and_out', 'diag'\), but got 'best'"),
        ({"optimizer": "lion"}, "`optimizer` has to be one of"),
        ({"learning_rate": 0.0}, "`learning_rate` has to be positive, but got 0.0"),
        ({"momentum": 1.0, "optimizer": "sgd"}, r"`momentum` has to be in \[0, 1\)"),
        ({"momentum": 0.9, "optimizer": "adam"}, "`momentum` has to be 0 without SGD, but got 0.9"),
        ({"weight_decay": -1.0}, "`weight_decay` has to be at least 0"),
        ({"pos_weight": -2.0}, "`pos_weight` has to be"),
        ({"patience": 0}, "`patience` has to be at least 1"),
        ({"image_size": (8, 600)}, "`image_size` has to be"),
        ({"freeze_batch_norm": True}, "`freeze_batch_norm` keeps loaded statistics"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DefectClassifier(**{**TOY, **arguments})


def test_fresh_layers_are_the_end_of_a_network_only() -> None:
    names = ["stem.w", "stages.0.a.w", "stages.1.a.w", "stages.1.b.w", "norm.w"]
    assert fresh_layers(names, []) == []
    assert fresh_layers(names, ["stages.1.b.w", "norm.w"]) == ["stages.1.b", "norm"]
    assert fresh_layers(names, ["stages.1.a.w", "stages.1.b.w", "norm.w"]) == ["stages.1", "norm"]
    assert fresh_layers(names, ["stem.w"]) is None
    assert fresh_layers(names, ["stages.1.a.w"]) is None
    assert fresh_layers(names, names) is None


def cut_weights(path: Path, without: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Write a state dict of resnet18, with statistics like trained ones, that lacks some layers."""
    torch.manual_seed(5)
    network = timm.create_model("resnet18", pretrained=False).train()
    network(images(4))
    state = {name: value for name, value in network.state_dict().items() if not name.startswith(without)}
    torch.save(state, path)
    return state


def test_weights_without_the_last_stage_are_completed_and_frozen_where_they_were_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = cut_weights(tmp_path / "cut.pth", ("layer4", "fc"))
    model = DefectClassifierModel("resnet18", weights=tmp_path / "cut.pth", freeze_batch_norm=True, seed=3)
    with caplog.at_level(logging.WARNING):
        model.load_weights()
    assert "has no weights for `layer4` of resnet18: learned from scratch (seed 3)" in caplog.text
    loaded = copy.deepcopy(model.backbone.state_dict())
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    again = DefectClassifierModel("resnet18", weights=tmp_path / "cut.pth", seed=3)
    again.load_weights()
    other = DefectClassifierModel("resnet18", weights=tmp_path / "cut.pth", seed=4)
    other.load_weights()
    key = "layer4.0.conv1.weight"
    assert torch.equal(loaded[key], again.backbone.state_dict()[key])
    assert not torch.equal(loaded[key], other.backbone.state_dict()[key])

    model.train()
    model(images(4))
    after = model.backbone.state_dict()
    changed = {name.split(".")[0] for name, value in loaded.items() if not torch.equal(value, after[name])}
    assert changed == {"layer4"}
    norms = {name: m.training for name, m in model.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(training == name.startswith("layer4") for name, training in norms.items())
    restored = DefectClassifierModel("resnet18", freeze_batch_norm=True)
    restored.load_state_dict(model.state_dict())
    restored.load_weights()  # nothing to do, and no network needed
    restored.train()
    assert restored.fresh == ["layer4"]
    assert not restored.backbone.bn1.training


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    cut_weights(tmp_path / "hole.pth", ("layer2",))
    with pytest.raises(ValueError, match=r"hole\.pth do not fit the backbone 'resnet18'.*layer2\.0\.conv1"):
        DefectClassifierModel("resnet18", weights=tmp_path / "hole.pth").load_weights()


def processed(scores: list[float], labels: list[int], maps: torch.Tensor) -> ProbabilityPostProcessor:
    """Show validation images to a post-processor."""
    post = ProbabilityPostProcessor()
    count = len(scores)
    batch = ImageBatch(
        image=torch.zeros(count, 3, 2, 2),
        gt_label=torch.tensor(labels),
        pred_score=torch.tensor(scores),
        anomaly_map=maps,
    )
    post.on_validation_batch_end(None, None, batch)
    post.on_validation_epoch_end(None, None)
    return post


def test_the_threshold_lies_midway_and_scores_stay_probabilities() -> None:
    maps = torch.tensor([-4.0, -2.0, 1.0, 4.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    post = processed([0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], maps)  # best F1 from 0.7 on; the next lower score is 0.2
    assert post.image_threshold.item() == pytest.approx(0.45)
    scores = torch.tensor([0.0, 0.4, 0.5, 0.999])
    found = post(InferenceBatch(pred_score=scores, anomaly_map=maps))
    assert torch.equal(found.pred_score, scores)
    assert found.pred_label.tolist() == [False, False, True, True]
    middle = float(np.log(0.45 / 0.55))  # of the map: the same threshold, in log-odds
    expected = ((maps - middle) / 8 + 0.5).clamp(0, 1)  # 8: from the smallest to the largest
    torch.testing.assert_close(found.anomaly_map, expected)
    assert found.pred_mask.flatten(1).any(1).tolist() == [False, False, True, True]
    post.image_sensitivity = 0.8  # as Anomalib's: 0.3 lower
    assert post(InferenceBatch(pred_score=scores, anomaly_map=maps)).pred_label.tolist() == [False, True, True, True]


def test_without_defective_validation_images_the_highest_normal_score_is_the_threshold() -> None:
    post = processed([0.1, 0.35, 0.2], [0, 0, 0], torch.randn(3, 1, 2, 2))
    assert post.image_threshold.item() == pytest.approx(0.35)


def recorded(*batches: tuple[torch.Tensor, torch.Tensor], epoch: int = 0) -> dict[str, float]:
    """Return what a record gives after batches of logits and labels."""
    record = ValidationRecord()
    for logits, labels in batches:
        record.update(logits, labels, label_loss(logits, labels, (1.0, 1.0)))
    return {name: value.item() for name, value in record.compute(epoch).items()}


def test_a_record_is_average_precision_and_loss_of_all_batches_or_the_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, generator=generator), torch.rand(23, generator=generator) < 0.3
    values = recorded(*((logits[part], labels[part]) for part in torch.arange(23).split(5)), epoch=4)
    expected = average_precision_score(labels.numpy(), logits.numpy())
    assert values["val_AP"] == pytest.approx(expected, abs=1e-6)
    loss = F.binary_cross_entropy_with_logits(logits, labels.float())
    assert values["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values[SELECTION] == pytest.approx(expected, abs=1e-4)
    # Equal average precision: the lower loss is better.
    unsure, sure = (
        recorded((torch.tensor([-1.0, 1.0]) * scale, torch.tensor([0, 1])))[SELECTION] for scale in (0.5, 2)
    )
    assert sure > unsure
    # Normal images alone: the later epoch is better.
    assert recorded((logits, torch.zeros(23)), epoch=7) == {SELECTION: 7.0}


def test_a_users_own_choice_of_checkpoint_stays(tmp_path: Path) -> None:
    own, default = ModelCheckpoint(monitor="val_loss"), ModelCheckpoint(dirpath=tmp_path)
    for keeper in (own, default):
        EpochSelection().setup(SimpleNamespace(checkpoint_callbacks=[keeper]), None, "fit")
    assert (own.monitor, own.mode) == ("val_loss", "min")
    assert (default.monitor, default.mode) == (SELECTION, "max")
