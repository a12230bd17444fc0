"""Projections that selections are made in."""

import pytest
import torch

from anomalib_exdd.coreset import gaussian_projection, principal_axes


def test_projection_has_unit_columns_and_keeps_distances() -> None:
    matrix = gaussian_projection(1536, 128, seed=1)
    torch.testing.assert_close(matrix.norm(dim=0), torch.ones(128))
    points = torch.randn(200, 1536, generator=torch.Generator().manual_seed(2))
    ratio = torch.pdist(points @ matrix) / torch.pdist(points)
    # Each squared projection has mean 1/1536 of the squared length: the factor is sqrt(128 / 1536).
    assert abs(ratio.mean().item() - (128 / 1536) ** 0.5) < 0.01
    assert ratio.std().item() < 0.03
    assert torch.equal(matrix, gaussian_projection(1536, 128, seed=1))
    assert not torch.equal(matrix, gaussian_projection(1536, 128, seed=2))


def test_projection_of_short_features_keeps_them() -> None:
    assert torch.equal(gaussian_projection(100, 128, seed=0), torch.eye(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dimension", [100, 200])
def test_projection_is_float32_whatever_the_default(dtype: torch.dtype, dimension: int) -> None:
    expected = gaussian_projection(dimension, 128, seed=0)
    torch.set_default_dtype(dtype)
    try:
        matrix = gaussian_projection(dimension, 128, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, expected)


def test_axes_are_those_of_most_variance_for_any_number_of_threads() -> None:
    rng = torch.Generator().manual_seed(1)
    scale = 1 / torch.arange(4.0, 100)
    rotation = torch.linalg.qr(torch.randn(96, 96, generator=rng)).Q
    bank = (torch.randn(5003, 96, generator=rng) * scale) @ rotation
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


def test_axes_that_save_nothing_are_not_given() -> None:
    assert principal_axes(torch.randn(5000, 16, generator=torch.Generator().manual_seed(7)), 0.07) is None
    assert principal_axes(torch.zeros(5000, 8), 0.07) is None
