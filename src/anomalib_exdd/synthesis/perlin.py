"""Regions of Perlin noise filled with texture, as in DRAEM (arXiv 2108.07610) and MemSeg (arXiv 2205.00908).

No real defect and no network is needed. In&Out (arXiv 2406.00501) makes one half of its images this way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import Generator
from PIL import Image

from .base import Mask, Pixels, Request, Synthesis, Synthesizer, check_range
from .foreground import foreground
from .shapes import LEAST_AREA, draw_shape

ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
CELLS = 8  # rows and columns that the image is cut into to be shuffled
THRESHOLD = 0.5  # of the noise, which reaches from -1 to 1
LARGEST_SCALE = 5  # noise has 2**0 to 2**5 waves along each axis
TRIES = 10


class PerlinSynthesizer(Synthesizer):
    """Fill regions of Perlin noise with texture: another image, or the image itself, cut up and shuffled.

    Noise, its rotation and the distortion of the texture's colors are those of Anomalib's ``PerlinAnomalyGenerator``.
    The request's mask is ignored: the regions are drawn within the part and returned as the mask.

    Args:
        textures: Folder of images to fill half of the regions with, such as the Describable Textures Dataset; folders
            in it are searched too. Default: all regions are filled with the image itself.
        opacity: Least and greatest share of the texture in the result, the rest is the image underneath.
        max_area: Regions cover at most this share of the part: pieces are left out until they do. 1.0 for no limit
            (noise may cover half of the part). If ten draws leave no region, a small shape is drawn instead.
    """

    def __init__(
        self,
        textures: str | Path | None = None,
        opacity: tuple[float, float] = (0.15, 1.0),
        max_area: float = 0.2,
    ) -> None:
        low, high = opacity
        if not 0 < low <= high <= 1:
            msg = f"Argument `opacity` has to be two ascending numbers above 0 and up to 1, but got {tuple(opacity)}."
            raise ValueError(msg)
        check_range(0, 1, max_area=max_area)
        self.textures = None if textures is None else Path(textures)
        paths = () if self.textures is None else self.textures.rglob("*")
        self._files = sorted(path for path in paths if path.suffix.lower() in ENDINGS)
        if self.textures is not None and not self._files:
            msg = f"The folder `{self.textures}` of `textures` holds no image ({', '.join(sorted(ENDINGS))})."
            raise ValueError(msg)
        self.opacity = (float(low), float(high))
        self.max_area = max_area

    def synthesize(self, requests: Sequence[Request]) -> list[Synthesis]:
        """Draw regions into each image; see `Synthesizer.synthesize`."""
        return [self._synthesize(request) for request in requests]

    def _synthesize(self, request: Request) -> Synthesis:
        # Importing Anomalib takes seconds, which other synthesizers do without.
        from anomalib.data.utils.generators import PerlinAnomalyGenerator  # noqa: PLC0415

        image, rng, files = request.image, np.random.default_rng(request.seed), self._files
        with torch.random.fork_rng(devices=[]):  # Anomalib and torchvision draw from torch's global generator
            torch.default_generator.manual_seed(request.seed)  # the CPU's alone: torch.manual_seed seeds all devices
            generator = PerlinAnomalyGenerator()  # draws already here: a new one for each image
            region, origin = draw_region(foreground(image), self.max_area, generator, rng)
            file = files[rng.integers(len(files))] if files and rng.random() < 0.5 else None
            texture = shuffled(image, rng) if file is None else _read_texture(file, image.shape[:2])
            tensor = torch.from_numpy(texture).permute(2, 0, 1).float() / 255
            distorted = (generator.augmenters(tensor).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        opacity = float(rng.uniform(*self.opacity))
        blend = np.rint((1 - opacity) * image + opacity * distorted.astype(np.float64)).astype(np.uint8)
        name = None if file is None or self.textures is None else file.relative_to(self.textures).as_posix()
        details = {"region": origin, "texture": name or "the image itself, shuffled", "opacity": round(opacity, 3)}
        return Synthesis(np.where(region[..., None], blend, image), region, details)


def draw_region(part: Mask, max_area: float, generator: Any, rng: Generator) -> tuple[Mask, str]:
    """Draw regions where noise of a random scale, turned at random, is high: at most a share of the part, never empty.

    Returns the regions, `[H, W]`, bool, and in words where they come from.
    """
    from anomalib.data.utils.generators import generate_perlin_noise  # noqa: PLC0415  as above

    height, width = part.shape
    for _ in range(TRIES):
        # Anomalib fills up to a power of two, which cannot have more waves than pixels.
        most = [min(LARGEST_SCALE, int(np.log2(size))) for size in part.shape]
        scale = 2 ** int(rng.integers(most[0] + 1)), 2 ** int(rng.integers(most[1] + 1))
        noise = generate_perlin_noise(height, width, scale=scale, device=torch.device("cpu"))
        turned = generator.perlin_rotation_transform(noise.unsqueeze(0)).squeeze(0).numpy()
        region = ((turned > THRESHOLD) & part).astype(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(region, connectivity=8)
        areas, keep = stats[:, cv2.CC_STAT_AREA], np.zeros(count, dtype=np.bool_)
        for label in rng.permutation(np.arange(1, count)):  # the smallest pieces and those too many are left out
            area = areas[keep].sum() + areas[label]
            keep[label] = areas[label] >= LEAST_AREA and area <= max_area * np.count_nonzero(part)
        if keep.any():
            return np.asarray(keep[labels]), "Perlin noise"
    mask, kind = draw_shape(part, rng)
    return mask, f"drawn {kind}, as Perlin noise found no region"


def shuffled(image: Pixels, rng: Generator) -> Pixels:
    """Cut an image into a grid of equal cells and put them together in random order; the edge is mirrored to fit."""
    height, width = image.shape[:2]
    rows, columns = min(CELLS, height), min(CELLS, width)
    down, across = -(-height // rows), -(-width // columns)
    padding = (0, rows * down - height, 0, columns * across - width)
    whole = np.asarray(cv2.copyMakeBorder(image, *padding, cv2.BORDER_REFLECT))
    cells = whole.reshape(rows, down, columns, across, 3).swapaxes(1, 2).reshape(-1, down, across, 3)
    mixed = cells[rng.permutation(len(cells))].reshape(rows, columns, down, across, 3).swapaxes(1, 2)
    return np.ascontiguousarray(mixed.reshape(whole.shape)[:height, :width])


def _read_texture(path: Path, shape: tuple[int, ...]) -> Pixels:
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"))
    return np.asarray(cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA), dtype=np.uint8)
