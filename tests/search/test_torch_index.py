"""Products in low precision lose no neighbour: what they propose is proved, or searched again."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anomalib_exdd.search import Neighbors, torch_index
from anomalib_exdd.search.exact import direct_distances
from anomalib_exdd.search.torch_index import TorchIndex, bfloat16_is_fast, smallest

Draw = Callable[[int, int], Tensor]


def nearest_in_float64(query: Tensor, bank: Tensor, k: int) -> Tensor:
    exact = torch.cdist(query.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return exact.topk(k, dim=1, largest=False).values.float()


@pytest.fixture(autouse=True, scope="module", params=[True, False], ids=["bfloat16", "float32"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Search as on a processor that multiplies bfloat16 fast, and as on one that does not."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch_index, "bfloat16_is_fast", lambda: request.param)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def bank(draw_features: Draw) -> Tensor:
    return draw_features(5003, 1)


@pytest.fixture(scope="module")
def index(bank: Tensor, precision: None) -> TorchIndex:
    return TorchIndex(bank)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_search_of_features_like_real_ones_is_exact(
    index: TorchIndex, bank: Tensor, draw_features: Draw, k: int
) -> None:
    query = draw_features(300, 2)
    found = index.search(query, k)
    torch.testing.assert_close(found.distances, nearest_in_float64(query, bank, k), rtol=1e-5, atol=0)
    assert torch.equal(direct_distances(query, bank, found.indices), found.distances)


@pytest.mark.parametrize("distance", [0.0, 0.3, 1000.0])
def test_no_other_entry_is_nearer_than_the_bound(
    index: TorchIndex, bank: Tensor, draw_features: Draw, distance: float
) -> None:
    query = draw_features(100, 3) + distance * torch.randn(100, 96, generator=torch.Generator().manual_seed(3))
    proposed = index.candidates(query - index.mean_D, 8, None)
    exact = torch.cdist(query.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    others = exact.scatter(1, proposed.indices, torch.inf).amin(dim=1)
    assert (proposed.bound.double() <= others).all()
    # And it is not far below: the bound leaves few queries to search again.
    assert (proposed.bound.double() > 0.95 * others).all()


@pytest.mark.parametrize("distance", [0.3, 2.0, 1000.0])
def test_queries_unlike_the_bank(index: TorchIndex, bank: Tensor, draw_features: Draw, distance: float) -> None:
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
    found = TorchIndex(scaled).search(query, 3)
    torch.testing.assert_close(found.distances, nearest_in_float64(query, scaled, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("crowd", [40, 600])
def test_duplicates_and_near_duplicates(bank: Tensor, crowd: int) -> None:
    """Differences far below the rounding of products, between more entries than are looked at first."""
    rng = torch.Generator().manual_seed(5)
    axis = torch.nn.functional.normalize(torch.randn(96, generator=rng), dim=0)
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
    assert (found.indices < 5003).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_excluded_entries_are_not_found(index: TorchIndex, bank: Tensor, draw_features: Draw, share: float) -> None:
    query = torch.cat([draw_features(60, 11), bank[:20]])
    excluded = torch.rand(80, len(bank), generator=torch.Generator().manual_seed(12)) < share
    excluded[60:, :20] |= torch.eye(20, dtype=torch.bool)  # an entry without itself
    excluded[0, 1:] = True  # a single one is left
    excluded[0, 0] = share == 1
    exact = torch.cdist(query.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = exact.masked_fill(excluded, torch.inf).topk(3, dim=1, largest=False).values.float()
    found = index.search(query, 3, excluded)
    torch.testing.assert_close(found.distances, expected, rtol=1e-5, atol=0)


def test_approximate_distances_have_two_digits(index: TorchIndex, bank: Tensor, draw_features: Draw) -> None:
    query = draw_features(1500, 13)  # several blocks
    excluded = torch.rand(len(bank), generator=torch.Generator().manual_seed(14)) < 0.3
    found = index.approximate_distances(query, excluded)
    torch.testing.assert_close(found, nearest_in_float64(query, bank[~excluded], 1)[:, 0], rtol=1e-2, atol=0)
    assert index.approximate_distances(query[:0], excluded).shape == (0,)


def test_a_bank_of_equal_entries() -> None:
    same = TorchIndex(torch.ones(5000, 8))
    assert torch.equal(same.search(torch.zeros(2, 8), 1).distances, torch.full((2, 1), 8**0.5))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_selections_from_scores(rows: int, size: int, seed: int, ties: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    size = size if seed % 2 else 64 * size  # with groups of groups
    score = torch.randn(rows, size, generator=rng)
    if ties:
        score = score.round()
    count = 1 + seed % min(size, 12)
    lowest = smallest(score, count)
    assert torch.equal(lowest.distances, score.sort(dim=1).values[:, :count])
    assert torch.equal(score.gather(1, lowest.indices), lowest.distances)
    assert all(len(row.unique()) == count for row in lowest.indices)


def test_speed_is_asked_once() -> None:
    """What the processor is fast at is measured, not looked up; the answer stays for the process."""
    assert bfloat16_is_fast() == bfloat16_is_fast()
    assert bfloat16_is_fast.cache_info().misses == 1
