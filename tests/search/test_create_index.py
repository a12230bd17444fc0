"""What `auto` chooses, and that it says so once."""

import logging

import pytest
import torch

from anomalib_exdd.search import create_index, factory, faiss_index, faiss_loader
from anomalib_exdd.search.torch_index import TorchIndex


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(factory, "_said", set())
    caplog.set_level(logging.INFO, logger="anomalib_exdd.search.factory")


def test_auto_is_exact_and_says_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    bank = torch.randn(20, 4)
    for _ in range(3):
        index = create_index(bank, "auto")
        assert isinstance(index, TorchIndex)
        assert index.exact
    assert len(caplog.messages) == 1
    assert "Bank of 20 x 4 features on cpu: search 'torch'" in caplog.text
    assert "exact, in all 4 dimensions" in caplog.text
    assert "Index built in" in caplog.text
    create_index(bank[:10], "auto")
    assert len(caplog.messages) == 2


def test_large_banks_hint_at_approximate_search(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "SMALLEST_BANK", 15)
    create_index(torch.randn(14, 4), "auto")
    create_index(torch.randn(20, 4), "torch")
    assert "approximate" not in caplog.text
    create_index(torch.randn(15, 4), "auto")
    assert "'approximate' is faster" in caplog.text


def test_approximate_says_where_it_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    assert not create_index(torch.randn(20, 4), "approximate").exact
    assert "exact, in all 4 dimensions: too small to gain by approximation" in caplog.text


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
    class Bank:
        def __init__(self) -> None:
            self.device = torch.device(device)

    monkeypatch.setattr(factory, "faiss_available", lambda: installed)
    monkeypatch.setattr(faiss_index, "gpu_search_available", lambda: gpu)
    chosen, reason = factory._choose(Bank())  # type: ignore[arg-type]
    assert chosen == expected
    assert reason


def test_approximate_search_needs_no_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_loader, "installed_flavours", list)
    monkeypatch.setattr(faiss_loader.util, "find_spec", lambda name: None)
    bank = torch.randn(50, 4)
    assert create_index(bank, "approximate").search(bank, 1).distances.max() == 0
