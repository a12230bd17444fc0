"""FAISS is imported once, with the fast kernel, and never in two flavours."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from anomalib_exdd.search import create_index, faiss_index
from anomalib_exdd.search.torch_index import TorchIndex

needs_faiss = pytest.mark.skipif(not faiss_index.faiss_available(), reason="no FAISS")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**inherited, **environment}
    )


def test_two_flavours_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"faiss-cpu", "faiss-gpu"}
    monkeypatch.setattr(metadata, "distributions", lambda name: [object()] if name in installed else [])
    with pytest.raises(ImportError, match="faiss-cpu and faiss-gpu are installed together"):
        create_index(torch.randn(3, 2), "auto")


def test_without_faiss_torch_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda name: [])
    monkeypatch.setattr(faiss_index.util, "find_spec", lambda name: None)
    faiss_index.load_faiss.cache_clear()
    assert isinstance(create_index(torch.randn(3, 2), "auto"), TorchIndex)
    with pytest.raises(ImportError, match="FAISS is not installed"):
        create_index(torch.randn(3, 2), "faiss")


@needs_faiss
def test_kernel_is_set_for_the_import_only() -> None:
    code = """
import os, sys, importlib, torch
from anomalib_exdd.search import faiss_index
seen = []
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "faiss":
            seen.append(os.environ.get("OPENBLAS_CORETYPE"))
sys.meta_path.insert(0, Spy())
faiss_index.load_faiss()
capability = torch.backends.cpu.get_cpu_capability()
assert seen[-1] == faiss_index.OPENBLAS_KERNELS.get(capability), (seen, capability)
assert "OPENBLAS_CORETYPE" not in os.environ
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@needs_faiss
def test_a_kernel_that_the_user_chose_is_kept() -> None:
    code = """
import os
from anomalib_exdd.search import faiss_index
faiss_index.load_faiss()
assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"
"""
    result = run(code, OPENBLAS_CORETYPE="Haswell")
    assert result.returncode == 0, result.stderr
