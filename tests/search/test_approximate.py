"""Approximate search finds nearly all nearest entries, tells true distances, and always the same ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomalib_exdd.search import approximate_index, create_index
from anomalib_exdd.search.approximate_index import ApproximateIndex
from anomalib_exdd.search.exact import brute_force

Draw = Callable[[int, int], Tensor]


@pytest.fixture(scope="module")
def bank(draw_features: Draw) -> Tensor:
    return draw_features(6001, 1)


@pytest.fixture
def index(bank: Tensor, monkeypatch: pytest.MonkeyPatch) -> ApproximateIndex:
    monkeypatch.setattr(approximate_index, "SMALLEST_BANK", 6000)
    index = create_index(bank, "approximate")
    assert isinstance(index, ApproximateIndex)
    assert index.axes_DP is not None
    return index


@pytest.mark.parametrize("k", [1, 3])
def test_recall_and_true_distances(index: ApproximateIndex, bank: Tensor, draw_features: Draw, k: int) -> None:
    query = draw_features(1000, 2)
    found, exact = index.search(query, k), brute_force(query, bank, k)
    assert (found.indices[:, 0] == exact.indices[:, 0]).float().mean() >= 0.999
    assert (found.indices == exact.indices).float().mean() >= 0.995
    true = torch.linalg.vector_norm(query.double().unsqueeze(1) - bank.double()[found.indices], dim=-1)
    torch.testing.assert_close(found.distances, true.float(), rtol=1e-6, atol=0)
    assert (found.distances.diff(dim=1) >= 0).all()
    assert found.distances.dtype == torch.float32
    assert found.indices.dtype == torch.int64


def test_entries_of_the_bank_find_themselves(index: ApproximateIndex, bank: Tensor) -> None:
    found = index.search(bank[::11], 1)
    assert torch.equal(found.distances, torch.zeros_like(found.distances))
    assert torch.equal(found.indices[:, 0], torch.arange(0, 6001, 11))


def test_the_same_in_any_batch_thread_count_and_after_a_rebuild(
    index: ApproximateIndex, bank: Tensor, draw_features: Draw
) -> None:
    query = draw_features(400, 3)
    query[::40] += 5 * torch.randn(query[::40].shape, generator=torch.Generator().manual_seed(3))
    expected, threads = index.search(query, 3), torch.get_num_threads()
    for size in (1, 7, 60):
        parts = [index.search(part, 3) for part in query[:60].split(size)]
        assert torch.equal(torch.cat([part.distances for part in parts]), expected.distances[:60])
        assert torch.equal(torch.cat([part.indices for part in parts]), expected.indices[:60])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rebuilt = create_index(bank.clone(), "approximate")
            assert isinstance(rebuilt, ApproximateIndex)
            assert torch.equal(rebuilt.compressed.lengthened_MF, index.compressed.lengthened_MF)
            found = rebuilt.search(query, 3)
            assert torch.equal(found.distances, expected.distances)
            assert torch.equal(found.indices, expected.indices)
    finally:
        torch.set_num_threads(threads)


def test_far_queries_are_searched_exactly(index: ApproximateIndex, bank: Tensor) -> None:
    query = 100 * torch.randn(20, 96, generator=torch.Generator().manual_seed(4))
    found, exact = index.search(query, 2), create_index(bank, "torch").search(query, 2)
    assert torch.equal(found.distances, exact.distances)
    assert torch.equal(found.indices, exact.indices)


def test_banks_that_gain_nothing_are_searched_exactly(bank: Tensor, draw_features: Draw) -> None:
    query = draw_features(100, 5)
    varied = torch.randn(50_000, 8, generator=torch.Generator().manual_seed(5))
    for entries, asked, cause in ((bank, query, "too small"), (varied, varied[:50] + 0.1, "too many directions")):
        index = create_index(entries, "approximate")
        assert cause in index.description
        assert torch.equal(index.search(asked, 2).distances, create_index(entries, "torch").search(asked, 2).distances)


def test_bad_arguments_are_named(index: ApproximateIndex, bank: Tensor) -> None:
    with pytest.raises(ValueError, match="between 1 and the bank's size 6001, but got 6002"):
        index.search(bank[:2], 6002)
    assert index.search(bank[:2], 6001).distances.shape == (2, 6001)
    assert index.search(bank[:0], 2).distances.shape == (0, 2)
