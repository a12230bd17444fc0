"""Features as a backbone makes them: in clusters, away from the origin, their variance in ever smaller directions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DIMENSION = 96


@pytest.fixture(scope="session")
def draw_features() -> Callable[[int, int], Tensor]:
    """Return a function of a count and a seed that draws features of 96 dimensions."""
    rng = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=rng)).Q
    scale = 1 / torch.arange(4.0, 4 + DIMENSION)
    centres = torch.randn(20, DIMENSION, generator=rng)

    def draw(count: int, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        centre = centres[torch.randint(0, 20, (count,), generator=rng)]
        return ((0.5 * centre + torch.randn(count, DIMENSION, generator=rng)) * scale) @ rotation + 3

    return draw
