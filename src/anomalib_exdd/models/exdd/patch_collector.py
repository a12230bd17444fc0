"""Collects patch features while images stream by, then selects the representative few."""

from dataclasses import dataclass

import torch
from torch import Tensor

from anomalib_exdd.precision import full_float32
from anomalib_exdd.sampling import gaussian_projection, greedy_k_center

from .memory_bank import BankContent


@dataclass
class _ImagePatches:
    features_PD: Tensor
    projected_PS: Tensor
    position_P2: Tensor


class PatchCollector:
    """Patch features of the training images, kept on the CPU until the coreset is selected.

    Args:
        projected_dimension: Dimension that features are projected to for the selection, d*.
        seed: Seed of the projection and of the first centre.
    """

    def __init__(self, projected_dimension: int = 128, seed: int = 0) -> None:
        self.projected_dimension = projected_dimension
        self.seed = seed
        self._images: dict[str, _ImagePatches] = {}
        self._projection: Tensor | None = None

    @property
    def num_images(self) -> int:
        """Number of images that gave patches."""
        return len(self._images)

    @property
    def num_patches(self) -> int:
        """Number of patches collected."""
        return sum(len(image.features_PD) for image in self._images.values())

    def add(self, image_path: str, features_PD: Tensor, position_P2: Tensor) -> None:
        """Take the patches of one image; an image that was seen before is not counted twice.

        Args:
            image_path: Identifies the image, and orders the images before the selection.
            features_PD: Patch features, float32, shape (P, D).
            position_P2: Row and column of every patch's centre, in pixels, integer, shape (P, 2).
        """
        if image_path in self._images or len(features_PD) == 0:
            return
        if self._projection is None:
            self._projection = gaussian_projection(features_PD.shape[1], self.projected_dimension, self.seed)
        features_PD = features_PD.detach().cpu().float().contiguous()
        with full_float32(features_PD.device):
            projected_PS = features_PD @ self._projection
        self._images[image_path] = _ImagePatches(features_PD, projected_PS, position_P2.cpu().to(torch.int64))

    @property
    def paths(self) -> list[str]:
        """Paths of the images that gave patches, sorted."""
        return sorted(self._images)

    def features_of(self, image_path: str) -> Tensor:
        """Return an image's patch features, float32, shape (P, D)."""
        return self._images[image_path].features_PD

    def positions_of(self, image_path: str) -> Tensor:
        """Return the centres of an image's patches, int64, shape (P, 2)."""
        return self._images[image_path].position_P2

    def select(self, ratio: float, minimum: int, description: str) -> BankContent:
        """Select a coreset of all patches by greedy k-center on their projections.

        Images are taken in the order of their paths, so that the coreset depends on neither the order nor the batches
        in which they were seen.

        Args:
            ratio: Share of the patches to keep, in (0, 1].
            minimum: Patches to keep at least (all, if there are fewer).
            description: Label of the progress bar.

        Returns:
            The selected patches in their full dimension.

        Raises:
            ValueError: If no patch was collected.
        """
        if not self._images:
            msg = "No patch was collected, so that no memory bank can be built."
            raise ValueError(msg)
        paths = self.paths
        images = [self._images[path] for path in paths]
        lengths = torch.tensor([len(image.features_PD) for image in images])
        count = max(minimum, round(ratio * self.num_patches))
        projected_NS = torch.cat([image.projected_PS for image in images])
        chosen = greedy_k_center(projected_NS, count, seed=self.seed, description=description)
        source_of_N = torch.repeat_interleave(torch.arange(len(images)), lengths)
        source = source_of_N[chosen]
        row = chosen - (lengths.cumsum(0) - lengths)[source]
        features = torch.stack([images[s].features_PD[r] for s, r in zip(source.tolist(), row.tolist(), strict=True)])
        position = torch.stack([images[s].position_P2[r] for s, r in zip(source.tolist(), row.tolist(), strict=True)])
        return BankContent(features, source, position, paths)
