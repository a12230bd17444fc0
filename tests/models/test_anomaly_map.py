"""Heat maps: the published code's Pillow blur, and the smooth one."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

from anomalib_exdd.models.exdd.anomaly_map import PublishedMap, SmoothMap, pillow_box_kernel


@pytest.mark.parametrize("radius", [1.0, 2.0, 4.0])
def test_published_map_is_pillows(radius: float) -> None:
    scores = (
        torch.rand(3, 1, 20, 14, generator=torch.Generator().manual_seed(0)) ** 3
        * torch.tensor([1, 50, 0.01])[:, None, None, None]
    )
    found = PublishedMap(radius)(scores, (160, 112))
    upsampled = torch.nn.functional.interpolate(scores, (160, 112), mode="bilinear", align_corners=False)
    for index in range(3):
        plane = upsampled[index, 0].numpy()
        picture = Image.fromarray((plane / plane.max() * 255).astype(np.uint8))
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), int)
        levels = found[index, 0].double().numpy() / plane.max() * 255
        np.testing.assert_allclose(levels, blurred, atol=1e-3)


def test_published_map_of_nothing_is_zero() -> None:
    assert torch.equal(PublishedMap()(torch.zeros(1, 1, 4, 4), (32, 32)), torch.zeros(1, 1, 32, 32))


def test_box_kernel_has_the_gaussians_variance() -> None:
    for radius in (0.7, 2.0, 5.5):
        high, low = pillow_box_kernel(radius).double()
        kernel = (high * 2**12 + low) / 2**24
        offset = torch.arange(len(kernel)) - len(kernel) // 2
        assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
        assert 3 * (kernel * offset**2).sum().item() == pytest.approx(radius**2, rel=1e-3)


def test_smooth_map_is_a_gaussian_blur() -> None:
    scores = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    found = SmoothMap(sigma=2.0)(scores, (128, 128))
    upsampled = torch.nn.functional.interpolate(scores, (128, 128), mode="bilinear", align_corners=False)
    expected = gaussian_filter(upsampled[1, 0].double().numpy(), 2.0, truncate=4.0, mode="mirror")
    np.testing.assert_allclose(found[1, 0].numpy(), expected, rtol=1e-5)
