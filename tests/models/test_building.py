"""Networks whose weights are loaded are built without drawing others first; random networks are the same for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.models.components import TimmFeatureExtractor
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anomalib_exdd import ExDD
from anomalib_exdd.models.defect_classifier.torch_model import DefectClassifierModel
from anomalib_exdd.models.exdd.features import PatchFeatureExtractor
from anomalib_exdd.models.weights import WithoutInitialValues

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
LAYERS = ["layer2", "layer3"]


class Draws(TorchFunctionMode):
    """Counts the random numbers that tensors are filled with; on the meta device there are none."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in {Tensor.normal_, Tensor.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_}:
            self.count += 0 if result.is_meta else result.numel()
        return result


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    states = found.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_random_networks_are_the_draws_of_their_seed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = TimmFeatureExtractor("resnet18", LAYERS, pre_trained=False)
    assert_same_state(PatchFeatureExtractor("resnet18", LAYERS, pre_trained=False).backbone, expected)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = timm.create_model("resnet18", num_classes=0, global_pool="")
        torch.manual_seed(3)
        head = nn.Linear(512, 1)
    model = DefectClassifierModel("resnet18", pre_trained=False, seed=3)
    assert_same_state(model.backbone, expected)
    assert_same_state(model.head, head)
    assert_same_state(DefectClassifierModel("resnet18", seed=3).head, head)


@pytest.mark.parametrize(
    "build",
    [
        lambda **arguments: PatchFeatureExtractor("resnetblur18", LAYERS, **arguments).eval(),
        lambda **arguments: DefectClassifierModel("resnetblur18", **arguments).eval(),
    ],
)
def test_loaded_networks_are_complete_without_a_draw(build: Callable[..., Any]) -> None:
    expected = build(pre_trained=False)
    buffers = {name for name, _ in expected.backbone.named_buffers()} - set(expected.backbone.state_dict())
    assert buffers, "the test's network has no buffer that its state dict leaves out"
    with Draws() as draws:
        loaded = build(pre_trained=True)
    assert draws.count < 2000  # the classifier's head
    loaded.load_state_dict(expected.state_dict())
    with torch.no_grad():
        found, wanted = loaded(IMAGES), expected(IMAGES)
    for name in ("pred_score", "anomaly_map") if hasattr(found, "pred_score") else ("data",):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


def test_a_command_with_a_checkpoint_draws_no_weights(
    trained: tuple[ExDD, Path], engine: Callable[..., Engine], sample_root: Path
) -> None:
    photo = PredictDataset(path=sample_root / "test" / "20000.png")
    expected = engine().predict(model=trained[0], dataset=photo, return_predictions=True)
    with Draws() as draws:
        model = ExDD()  # as the command line builds it: with another backbone than the checkpoint's random one
        found = engine().predict(model=model, dataset=photo, ckpt_path=trained[1], return_predictions=True)
    assert draws.count == 0
    assert expected is not None
    assert found is not None
    assert torch.equal(found[0].pred_score, expected[0].pred_score)


def test_the_context_leaves_all_but_random_numbers_to_their_functions() -> None:
    with WithoutInitialValues():
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        assert torch.equal(torch.arange(3).double().add_(1), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert torch.equal(network[1].weight, torch.ones(4))
    assert torch.equal(network[1].running_var, torch.ones(4))
    drawn = nn.Conv2d(3, 4, 1)
    assert drawn.weight.abs().sum() > 0


def test_a_classifier_without_weights_says_so() -> None:
    model = DefectClassifierModel("test_resnet").eval()
    with pytest.raises(ValueError, match=r"no weights yet\. Train the model, or load a trained checkpoint"):
        model(IMAGES)
