"""Pruning by lower bounds loses no neighbour, and what the bounds are made of is exact."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anomalib_exdd.search import Neighbors, torch_index
from anomalib_exdd.search.exact import direct_distances, pair_distances
from anomalib_exdd.search.pca import compress, principal_axes
from anomalib_exdd.search.torch_index import GroupedScores, TorchIndex

Draw = Callable[[int, int], Tensor]


def nearest_in_float64(query: Tensor, bank: Tensor, k: int) -> Tensor:
    exact = torch.cdist(query.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return exact.topk(k, dim=1, largest=False).values.float()


@pytest.fixture(scope="module")
def bank(draw_features: Draw) -> Tensor:
    return draw_features(5003, 1)


@pytest.fixture(scope="module")
def index(bank: Tensor) -> TorchIndex:
    return TorchIndex(bank)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_pruned_search_of_features_like_real_ones_is_exact(
    index: TorchIndex, bank: Tensor, draw_features: Draw, k: int
) -> None:
    query = draw_features(300, 2)
    assert index.axes_DP is not None
    assert index.axes_DP.shape[1] < 40
    found, exact = index.pruned_search(query, k)
    assert exact.float().mean() > (0.9 if k < 40 else 0.01)  # many neighbours are cheaper by a full product
    expected = nearest_in_float64(query, bank, k)
    torch.testing.assert_close(found.distances[exact], expected[exact], rtol=1e-5, atol=0)
    torch.testing.assert_close(index.search(query, k).distances, expected, rtol=1e-5, atol=0)
    assert torch.equal(direct_distances(query, bank, found.indices), found.distances)


@pytest.mark.parametrize("distance", [0.3, 2.0, 1000.0])
def test_queries_unlike_the_bank_are_searched_in_all_dimensions(
    index: TorchIndex, bank: Tensor, draw_features: Draw, distance: float
) -> None:
    query = draw_features(200, 3) + distance * torch.randn(200, 96, generator=torch.Generator().manual_seed(3))
    found = index.search(query, 2)
    torch.testing.assert_close(found.distances, nearest_in_float64(query, bank, 2), rtol=1e-5, atol=0)


def test_does_not_depend_on_the_batch_size(index: TorchIndex, draw_features: Draw) -> None:
    query = draw_features(500, 4)
    query[::9] += torch.randn(query[::9].shape, generator=torch.Generator().manual_seed(4))
    together = index.search(query, 3)
    for size in (1, 17, 200):
        parts = [index.search(part, 3) for part in query[: 60 if size == 1 else 200].split(size)]
        found = Neighbors(*(torch.cat(column) for column in zip(*parts, strict=True)))
        assert torch.equal(found.distances, together.distances[: len(found.distances)])
        assert torch.equal(found.indices, together.indices[: len(found.indices)])


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1e-4), (1e3, 0.1), (-20.0, 30.0)])
def test_any_scale_and_offset(bank: Tensor, draw_features: Draw, offset: float, scale: float) -> None:
    scaled, query = scale * bank + offset, scale * draw_features(100, 10) + offset
    index = TorchIndex(scaled)
    assert index.axes_DP is not None
    expected = nearest_in_float64(query, scaled, 3)
    torch.testing.assert_close(index.search(query, 3).distances, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("crowd", [40, 600])
def test_duplicates_and_near_duplicates(bank: Tensor, crowd: int) -> None:
    """Differences far below the rounding of expanded distances, between more entries than are looked at first."""
    rng = torch.Generator().manual_seed(5)
    axis = principal_axes(bank - bank.mean(dim=0), 0.07)[
        :, 0
    ].float()  # along which bounds are no smaller than distances
    crowded = torch.cat([bank, bank[:1] + 3e-4 * torch.randn(crowd, 1, generator=rng) * axis, bank[10:20]])
    query = torch.cat([bank[:1] + 3e-4 * torch.randn(40, 1, generator=rng) * axis, bank[10:20]])
    found = TorchIndex(crowded).search(query, 2)
    torch.testing.assert_close(found.distances, nearest_in_float64(query, crowded, 2), rtol=1e-5, atol=0)
    assert torch.equal(found.distances[40:], torch.zeros(10, 2))


def test_a_query_that_is_not_a_number_harms_no_other(index: TorchIndex, draw_features: Draw) -> None:
    query = draw_features(30, 6)
    expected = index.search(query, 2)
    spoilt = query.clone()
    spoilt[7] = torch.nan
    found = index.search(spoilt, 2)
    rest = torch.arange(30) != 7
    assert torch.equal(found.distances[rest], expected.distances[rest])
    assert found.distances[7].isnan().all()


def test_small_or_varied_banks_are_not_pruned(bank: Tensor) -> None:
    assert TorchIndex(bank[:1000]).axes_DP is None
    assert TorchIndex(torch.randn(5000, 16, generator=torch.Generator().manual_seed(7))).axes_DP is None
    same = TorchIndex(torch.ones(5000, 8))
    assert same.axes_DP is None
    assert torch.equal(same.search(torch.zeros(2, 8), 1).distances, torch.full((2, 1), 8**0.5))


def test_threads_do_not_change_axes(bank: Tensor) -> None:
    centred, threads = bank - bank.mean(dim=0), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(principal_axes(centred, 0.07))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(axes, found[0]) for axes in found)
    axes = found[0]
    torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1], dtype=torch.float64))
    rest = (centred.double() - centred.double() @ axes @ axes.T).square().sum() / centred.double().square().sum()
    assert rest == pytest.approx(0.07, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**31), st.floats(-4, 4))
def test_distances_of_compressed_vectors_never_exceed_the_true_ones(
    dimension: int, seed: int, log_scale: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64, generator=rng)).Q
    axes = axes[:, : 1 + seed % dimension]
    left, right = 10**log_scale * torch.randn(2, 50, dimension, generator=rng)
    compressed_left, compressed_right = compress(left, axes), compress(right, axes)
    bound = torch.linalg.vector_norm(compressed_left.double() - compressed_right, dim=1)
    scale = torch.linalg.vector_norm(left, dim=1) + torch.linalg.vector_norm(right, dim=1)
    assert (bound <= torch.linalg.vector_norm(left.double() - right, dim=1) + 1e-7 * scale).all()
    torch.testing.assert_close(compressed_left.norm(dim=1), left.norm(dim=1), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 700), st.integers(0, 2**31), st.booleans())
def test_selections_from_scores(rows: int, size: int, seed: int, ties: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, size, generator=rng)
    if ties:
        score = score.round()
    count = 1 + seed % min(size, 12)
    scores = GroupedScores(score)
    lowest = scores.smallest(count)
    assert torch.equal(lowest.distances, score.sort(dim=1).values[:, :count])
    assert torch.equal(score.gather(1, lowest.indices), lowest.distances)
    assert all(len(row.unique()) == count for row in lowest.indices)
    limit = torch.randn(rows, generator=rng)
    row, column = scores.up_to(limit)
    found = torch.zeros(rows, size, dtype=torch.int64).index_put_((row, column), torch.tensor(1), accumulate=True)
    assert torch.equal(found, (score <= limit.unsqueeze(1)).long())
    assert (scores.count_groups(limit) <= found.sum(dim=1)).all()


def test_pairs_have_the_distances_of_lists() -> None:
    rng = torch.Generator().manual_seed(8)
    query, bank = torch.randn(6, 1500, generator=rng), torch.randn(40, 1500, generator=rng)
    index = torch.randint(0, 40, (6, 33), generator=rng)
    pairs = pair_distances(query, bank, torch.arange(6).repeat_interleave(33), index.flatten())
    assert torch.equal(pairs.view(6, 33), direct_distances(query, bank, index))


def test_the_limit_of_affordable_work_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, index: TorchIndex, draw_features: Draw
) -> None:
    query = draw_features(100, 9)
    expected = index.search(query, 3)
    monkeypatch.setattr(torch_index, "AFFORDABLE_SHARE", 1 / 500)
    found = index.search(query, 3)
    assert torch.equal(found.distances, expected.distances)
    assert torch.equal(found.indices, expected.indices)
