"""The batched selection is the textbook's greedy selection."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_exdd.coreset import greedy_k_center, k_center
from anomalib_exdd.coreset.k_center import Coverage


def assert_greedy(points: np.ndarray, chosen: list[int]) -> None:
    """Check in float64 that every centre was the farthest point when it was chosen, ties of float32 rounding aside."""
    nearest = ((points - points[chosen[0]]) ** 2).sum(1)
    for centre in chosen[1:]:
        assert nearest[centre] >= nearest.max() * (1 - 1e-5)
        nearest = np.minimum(nearest, ((points - points[centre]) ** 2).sum(1))


def radius(points: np.ndarray, chosen: list[int]) -> float:
    """Return the distance of the farthest point to its nearest centre."""
    return float(np.sqrt(min_squared(points, points[chosen]).max()))


def min_squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.min([((points - centre) ** 2).sum(1) for centre in centres], axis=0)


@pytest.mark.parametrize(("total", "dimension", "count"), [(60, 2, 59), (1500, 16, 200), (3000, 128, 90)])
def test_every_choice_is_the_textbooks(total: int, dimension: int, count: int) -> None:
    rng = np.random.default_rng(total)
    centres = rng.normal(size=(20, dimension)) * 3
    points = centres[rng.integers(20, size=total)] + rng.normal(size=(total, dimension))
    selections = [
        greedy_k_center(torch.from_numpy(points).float(), count, seed=5, candidates=candidates).tolist()
        for candidates in (1, 7, 64, 5000)
    ]
    assert_greedy(points, selections[0])
    assert len(set(selections[0])) == count
    assert selections[0][0] == np.random.default_rng(5).integers(total)
    for selection in selections[1:]:  # the number of candidates decides the speed, not the choice
        assert selection == selections[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.integers(1, 6), st.integers(1, 60), st.integers(1, 40), st.integers(0, 999))
def test_radius_of_any_point_set(total: int, dimension: int, count: int, candidates: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.integers(-4, 5, size=(total, dimension)).astype(float)  # a grid: ties and duplicates everywhere
    chosen = greedy_k_center(torch.from_numpy(points), count, seed=seed, candidates=candidates).tolist()
    assert len(chosen) == len(set(chosen)) == min(count, total)
    # Ties may be broken differently; greedy's guarantee (at most twice the optimum) has to hold either way. The next
    # centre's distance bounds the optimum from below, as all chosen points are pairwise at least that far apart.
    if count < total and count > 1:
        spread = min(np.sqrt(((points[a] - points[b]) ** 2).sum()) for i, a in enumerate(chosen) for b in chosen[:i])
        assert radius(points, chosen) <= spread + 1e-5


def test_an_interrupted_selection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    whole = greedy_k_center(points, 300, candidates=16)
    monkeypatch.setattr(k_center, "SAVE_INTERVAL", -1.0)
    farthest, state = Coverage.farthest, tmp_path / "state.safetensors"

    def stop_half_way(coverage: Coverage, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if coverage.num_centres > 150:
            raise KeyboardInterrupt
        return farthest(coverage, count)

    with monkeypatch.context() as patched:
        patched.setattr(Coverage, "farthest", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            greedy_k_center(points, 300, candidates=16, state=state)
    assert state.is_file()
    larger = state.read_bytes()
    assert torch.equal(greedy_k_center(points, 20, candidates=16, state=state), whole[:20])  # fewer are wanted now
    assert not state.exists()
    state.write_bytes(larger)
    done = []
    monkeypatch.setattr(Coverage, "farthest", lambda *a: (done.append(a[0].num_centres), farthest(*a))[1])
    assert torch.equal(greedy_k_center(points, 300, candidates=16, state=state), whole)
    assert min(done) > 100  # it did not start anew
    assert not state.exists()


def test_points_may_be_overwritten_to_save_their_memory() -> None:
    points = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 3
    chosen = greedy_k_center(points, 40)
    kept = points.clone()
    assert torch.equal(greedy_k_center(points, 40, overwrite=True), chosen)
    assert not torch.equal(points, kept)


def test_first_centre_follows_the_seed() -> None:
    points = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    firsts = {greedy_k_center(points, 3, seed=seed)[0].item() for seed in range(20)}
    assert len(firsts) > 10
    assert torch.equal(greedy_k_center(points, 40, seed=3), greedy_k_center(points, 40, seed=3))


def test_all_points_when_asked_for_more_than_there_are() -> None:
    assert greedy_k_center(torch.randn(5, 2), 9).tolist() == [0, 1, 2, 3, 4]


def test_duplicates_alone() -> None:
    chosen = greedy_k_center(torch.ones(30, 3), 10)
    assert len(set(chosen.tolist())) == 10
