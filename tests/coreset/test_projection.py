"""Projections that selections are made in."""

import pytest
import torch

from anomalib_exdd.coreset import gaussian_projection


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
