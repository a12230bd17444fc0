"""Every backend finds the true nearest neighbours, whatever the batch size and however close the points lie."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_exdd.search import NeighborIndex, create_index, dense_search
from anomalib_exdd.search.exact import Proposal, direct_distances
from anomalib_exdd.search.faiss_index import faiss_available

BACKENDS = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(not faiss_available(), reason="no FAISS"))]


def oracle(query: torch.Tensor, bank: torch.Tensor, k: int) -> np.ndarray:
    """Return the k smallest distances, computed by direct difference in float64."""
    difference = query.double().numpy()[:, None] - bank.double().numpy()[None]
    return np.sort(np.sqrt((difference**2).sum(-1)), axis=1)[:, :k]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "entries", "dimension", "k"), [(1, 1, 3, 1), (7, 5, 2, 5), (300, 700, 96, 4)])
def test_matches_float64(backend: str, queries: int, entries: int, dimension: int, k: int) -> None:
    rng = torch.Generator().manual_seed(entries)
    query = torch.randn(queries, dimension, generator=rng) + 50  # far from the origin: expansion alone would fail
    bank = torch.randn(entries, dimension, generator=rng) + 50
    found = create_index(bank, backend).search(query, k)
    np.testing.assert_allclose(found.distances.numpy(), oracle(query, bank, k), rtol=1e-5, atol=1e-6)
    assert torch.equal(direct_distances(query, bank, found.indices), found.distances)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_duplicates_have_distance_zero(backend: str) -> None:
    rng = torch.Generator().manual_seed(0)
    bank = 10 * torch.randn(2000, 256, generator=rng) + 100
    found = create_index(bank, backend).search(bank[::7], 1)
    assert torch.equal(found.distances, torch.zeros_like(found.distances))
    assert torch.equal(found.indices[:, 0], torch.arange(0, 2000, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_depend_on_the_batch_size(backend: str) -> None:
    rng = torch.Generator().manual_seed(1)
    bank, query = torch.randn(3000, 128, generator=rng), torch.randn(2000, 128, generator=rng)
    index = create_index(bank, backend)
    together = index.search(query, 3)
    for size in (1, 17, 512):
        parts = [index.search(part, 3) for part in query[:600].split(size)]
        assert torch.equal(torch.cat([part.distances for part in parts]), together.distances[:600])
        assert torch.equal(torch.cat([part.indices for part in parts]), together.indices[:600])


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_ties_far_from_the_origin(backend: str) -> None:
    """More near-duplicates than candidates: only the bound on rounding errors and brute force find the nearest one."""
    rng = torch.Generator().manual_seed(2)
    point = torch.randn(1, 64, generator=rng)
    cluster = point + 1e-4 * torch.randn(400, 64, generator=rng)
    bank = torch.cat([cluster, point + 30 * torch.randn(400, 64, generator=rng)])
    query = point + 1e-4 * torch.randn(50, 64, generator=rng)
    found = create_index(bank, backend).search(query, 2)
    np.testing.assert_allclose(found.distances.numpy(), oracle(query, bank, 2), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 12),
    st.floats(-3, 3),
    st.floats(-3, 2),
    st.integers(0, 2**31),
)
def test_any_scale_and_offset(
    queries: int, entries: int, dimension: int, log_offset: float, log_scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bank = torch.from_numpy(rng.normal(size=(entries, dimension)) * 10**log_scale + 10**log_offset).float()
    query = torch.from_numpy(rng.normal(size=(queries, dimension)) * 10**log_scale + 10**log_offset).float()
    k = min(3, entries)
    expected = oracle(query, bank, k)
    for backend in ("torch", "faiss") if faiss_available() else ("torch",):
        found = create_index(bank, backend).search(query, k)
        np.testing.assert_allclose(found.distances.numpy(), expected, rtol=1e-5, atol=1e-5 * 10**log_scale)


def test_dense_form_agrees_with_the_index() -> None:
    rng = torch.Generator().manual_seed(3)
    bank, query = torch.randn(900, 64, generator=rng) + 5, torch.randn(200, 64, generator=rng) + 5
    dense, indexed = dense_search(query, bank, 3), create_index(bank, "torch").search(query, 3)
    assert torch.equal(dense.indices, indexed.indices)
    torch.testing.assert_close(dense.distances, indexed.distances, rtol=1e-6, atol=0)


def test_reduced_precision_of_the_surroundings_changes_nothing() -> None:
    rng = torch.Generator().manual_seed(4)
    bank, query = torch.randn(500, 64, generator=rng), torch.randn(100, 64, generator=rng)
    expected = create_index(bank, "torch").search(query, 2)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = create_index(bank, "torch").search(query, 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(found.distances, expected.distances)


@pytest.mark.parametrize(("bound", "nearest"), [(2.1, 2.0), (1.9, 1.0)])
def test_brute_force_decides_what_rounding_could_reverse(bound: float, nearest: float) -> None:
    """Candidates without the nearest entry are believed only if the last of them is farther than what was found."""

    class Forgetful(NeighborIndex):
        def build(self, centred_MD: torch.Tensor) -> None:
            pass

        def candidates(self, centred_QD: torch.Tensor, count: int, excluded_QM: torch.Tensor | None) -> Proposal:
            return Proposal(torch.arange(1, 1 + count).unsqueeze(0), torch.tensor([bound]))

    bank = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    assert Forgetful(bank).search(torch.zeros(1, 1), 1).distances.item() == nearest


def test_no_queries_give_no_neighbours() -> None:
    for backend in ("torch", "faiss") if faiss_available() else ("torch",):
        found = create_index(torch.randn(9, 3), backend).search(torch.empty(0, 3), 2)
        assert found.distances.shape == found.indices.shape == (0, 2)


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(TypeError):
        NeighborIndex(torch.randn(2, 2))  # type: ignore[abstract]


def test_torch_index_can_be_copied() -> None:
    index = create_index(torch.randn(9, 3), "torch")
    query = torch.randn(4, 3)
    assert torch.equal(copy.deepcopy(index).search(query, 2).distances, index.search(query, 2).distances)


def test_distances_to_a_bank_of_half_precision_are_computed_in_full() -> None:
    generator = torch.Generator().manual_seed(0)
    query, bank = torch.randn(9, 40, generator=generator), torch.randn(30, 40, generator=generator).half()
    index = torch.randint(30, (9, 4), generator=generator)
    found = direct_distances(query, bank, index)
    expected = torch.linalg.vector_norm(query.double().unsqueeze(1) - bank.double()[index], dim=-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
