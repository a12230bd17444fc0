"""Features to measure with: made-up ones of any number, and patches of real images.

Shape suffixes: N points, M bank entries, Q queries, D feature dimension, h x w patches.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_exdd.coreset import gaussian_projection, greedy_k_center

LARGEST_CORESET = 10_000  # larger banks are drawn at random: selecting them takes longer than measuring


class Clusters:
    """Points of low intrinsic dimension, as patch features are: clusters that spread in a few directions each.

    Args:
        count: Number of clusters.
        dimension: Dimension D of the points.
        generator: Draws centres and directions.
    """

    DIRECTIONS = 12
    NOISE = 0.1

    def __init__(self, count: int, dimension: int, generator: torch.Generator) -> None:
        self.centre_CD = torch.randn(count, dimension, generator=generator)
        self.direction_CKD = torch.randn(count, self.DIRECTIONS, dimension, generator=generator) / 4

    def draw(self, cluster_N: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a point of each given cluster, float32, shape (N, D)."""
        along_NK = torch.randn(len(cluster_N), self.DIRECTIONS, generator=generator)
        points_ND = self.centre_CD[cluster_N]
        for cluster in cluster_N.unique().tolist():
            of_it = cluster_N == cluster
            points_ND[of_it] += along_NK[of_it] @ self.direction_CKD[cluster]
        return points_ND + self.NOISE * torch.randn(points_ND.shape, generator=generator)


def made_up(count: int, dimension: int, device: str = "cpu") -> Tensor:
    """Draw points of 200 clusters, float32, shape (N, D)."""
    generator = torch.Generator().manual_seed(count)
    clusters = Clusters(200, dimension, generator)
    blocks = []
    for start in range(0, count, 1 << 16):
        cluster_N = torch.randint(200, (min(1 << 16, count - start),), generator=generator)
        blocks.append(clusters.draw(cluster_N, generator))
    return torch.cat(blocks).to(device)


class Source(NamedTuple):
    """Where banks and queries of one dimension come from."""

    name: str
    draw: Callable[[int, int], tuple[Tensor, Tensor]]  # bank size and number of queries -> bank, queries
    largest: float = float("inf")  # bank


def resnet_like(dimension: int) -> Source:
    """Draw features like those of a ResNet-18: clusters of Gaussians of falling variance, away from the origin.

    The j-th largest variance is proportional to (j + 18)^-2; clusters hold 60 % of it.
    """

    def draw(size: int, queries: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(dimension)
        rotation_DD = torch.linalg.qr(torch.randn(dimension, dimension, generator=rng)).Q
        mixing_DD = rotation_DD / torch.arange(19.0, 19 + dimension).unsqueeze(1)
        centre_CD = 0.6**0.5 * torch.randn(1000, dimension, generator=rng)
        cluster = torch.randint(0, 1000, (size + queries,), generator=rng)
        feature = 0.4**0.5 * torch.randn(size + queries, dimension, generator=rng) + centre_CD[cluster]
        feature = feature @ mixing_DD + 0.39 / dimension**0.5
        return feature[:size].clone(), feature[size:].clone()

    return Source("synthetic", draw)


def real(bank_ND: Tensor, query_ND: Tensor, name: str) -> Source:
    """Select banks from training patches, as ExDD does where that is quick, and draw queries from test patches."""

    def draw(size: int, queries: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(size)
        chosen = torch.randperm(len(bank_ND), generator=rng)[:size]
        if size < len(bank_ND) and size <= LARGEST_CORESET:
            chosen = greedy_k_center(bank_ND @ gaussian_projection(bank_ND.shape[1], 128, seed=0), size)
        asked = torch.randperm(len(query_ND), generator=rng)[:queries]
        return bank_ND[chosen], query_ND[asked]

    return Source(name, draw, len(bank_ND))


def side_by_side(features_NDhw: Tensor) -> Tensor:
    """Put the features of 2 x 2 neighbouring patches side by side."""
    height, width = (length - 1 for length in features_NDhw.shape[-2:])
    corners = [features_NDhw[..., top:, left:][..., :height, :width] for top in (0, 1) for left in (0, 1)]
    return torch.cat(corners, dim=1)


def patches(features_NDhw: Tensor, most: int) -> Tensor:
    """Flatten features to patches, and draw some of them at random if there are more."""
    grid = features_NDhw.shape[-2] * features_NDhw.shape[-1]
    rng = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(features_NDhw) * grid, generator=rng)[:most].sort().values
    return features_NDhw[rows // grid, :, rows % grid // features_NDhw.shape[-1], rows % features_NDhw.shape[-1]]
