"""What `auto` chooses, and that it says so once."""

import logging

import pytest
import torch

from anomalib_exdd import search
from anomalib_exdd.search import choose_backend, create_index
from anomalib_exdd.search.torch_index import TorchIndex


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="anomalib_exdd.search")
    bank = torch.randn(23, 17)  # a size that no other test has logged
    for _ in range(3):
        assert isinstance(create_index(bank, "auto"), TorchIndex)
    assert len(caplog.messages) == 1
    assert "Bank of 23 x 17 features on cpu: search 'torch'" in caplog.text
    assert "exact, in all 17 dimensions" in caplog.text
    assert "Index built in" in caplog.text
    create_index(bank[:10], "auto")
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("device", "installed", "gpu", "expected"),
    [
        ("cpu", True, False, "torch"),
        ("cpu", False, False, "torch"),
        ("cuda", True, True, "faiss"),
        ("cuda", True, False, "torch"),
        ("cuda", False, False, "torch"),
        ("mps", True, False, "torch"),
    ],
)
def test_choice_by_device_and_installation(
    device: str, installed: bool, gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "faiss_available", lambda: installed)
    monkeypatch.setattr(search, "gpu_search_available", lambda: gpu)
    chosen, reason = choose_backend(torch.device(device))
    assert chosen == expected
    assert reason


def test_approximate_search_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of \('auto', 'torch', 'faiss'\), but got 'approximate'"):
        create_index(torch.randn(3, 2), "approximate")  # type: ignore[arg-type]
