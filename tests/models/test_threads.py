"""First predictions of a fresh model come from several threads at once, as in a server."""

import copy
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from anomalib_exdd import ExDD
from anomalib_exdd.models.exdd import features as features_module
from anomalib_exdd.models.exdd import memory_bank
from anomalib_exdd.models.exdd.features import PatchFeatureExtractor
from anomalib_exdd.search import create_index
from anomalib_exdd.utils.precision import full_float32

THREADS = 8
IMAGES = torch.rand(THREADS, 1, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run every call in a thread of its own, all from the same moment on."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@torch.no_grad()
def scores(model: Callable[[Tensor], Any], images: Tensor) -> tuple[Tensor, Tensor]:
    found = model(images)
    return found.pred_score, found.anomaly_map


def exported(model: ExDD) -> bytes:
    """What `anomalib export --export_type torch` writes."""
    file = io.BytesIO()
    torch.save({"model": model}, file)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_first_predictions_are_those_of_one_thread_and_leave_other_models_alone(
    trained: tuple[ExDD, Path], kind: str
) -> None:
    other = timm.create_model("test_resnet", pretrained=False).eval()
    with torch.no_grad():
        expected = [scores(trained[0], images) for images in IMAGES]
        expected_other = other(IMAGES[0])
    file = exported(trained[0])
    for _ in range(5):
        if kind == "export":
            model = torch.load(io.BytesIO(file), weights_only=False)["model"]
        else:
            model = ExDD.load_from_checkpoint(trained[1]).eval()
        done = threading.Event()

        def use_other(done: threading.Event = done) -> list[Tensor]:
            found = []
            while not done.is_set():
                with torch.no_grad():
                    found.append(other(IMAGES[0]))
            return found

        with ThreadPoolExecutor(1) as beside:
            of_other = beside.submit(use_other)
            try:
                found = at_once([lambda images=images, model=model: scores(model, images) for images in IMAGES])
            finally:
                done.set()
            assert all(torch.equal(each, expected_other) for each in of_other.result())
        for (score, anomaly_map), (expected_score, expected_map) in zip(found, expected, strict=True):
            assert torch.equal(score, expected_score)
            assert torch.equal(anomaly_map, expected_map)


def test_what_is_made_for_the_first_prediction_is_made_once(
    trained: tuple[ExDD, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    def counting(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return make(*args, **kwargs)

        return counted

    monkeypatch.setattr(memory_bank, "create_index", counting("index", create_index))
    monkeypatch.setattr(features_module, "with_folded_norms", counting("folded", features_module.with_folded_norms))
    monkeypatch.setattr(features_module, "file_weights", counting("weights", features_module.file_weights))
    model = copy.deepcopy(trained[0])
    at_once([lambda: scores(model, IMAGES[0])] * THREADS)
    assert sorted(made) == ["folded", "index", "index"]  # one for each of the two banks
    made.clear()
    network = timm.create_model("resnet18", pretrained=False)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    extractor = PatchFeatureExtractor("resnet18", ["layer2"], weights=tmp_path / "weights.safetensors")
    found = at_once([lambda: extractor(IMAGES[0])] * THREADS)
    assert sorted(made) == ["folded", "weights"]
    assert all(torch.equal(each, found[0]) for each in found)


def test_settings_of_the_process_are_restored_whoever_leaves_last() -> None:
    precision, device = torch.get_float32_matmul_precision(), torch.device("cpu")
    first, second = full_float32(device), full_float32(device)
    torch.set_float32_matmul_precision("medium")
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"  # the second still computes
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
