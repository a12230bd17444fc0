"""Collects patch features while images stream by, then selects the coreset.

Shape suffixes: N patches of all images, P patches of one, D features, S dimensions of the projection, M chosen patches.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from anomalib_exdd.coreset import Shard, gaussian_projection, greedy_k_center
from anomalib_exdd.utils.distributed import gather_objects, gather_tensors, rank
from anomalib_exdd.utils.precision import full_float32

from .memory_bank import BankContent
from .training_stores import FeatureStore, TrainingStores

logger = logging.getLogger(__name__)

V = TypeVar("V")


class PatchCollector:
    """Patches of training images; with several processes, each collects those of the images that it sees.

    They wait in the :attr:`store` of a kind, which is opened when the first patches come.
    """

    def __init__(self, projected_dimension: int, seed: int, stores: TrainingStores, kind: str) -> None:
        self._projected_dimension, self._seed = projected_dimension, seed
        self._stores, self._kind = stores, kind
        self.store = FeatureStore()
        self._projection = torch.empty(0, 0)  # until the first patches, shape (D, S)
        self._owner: dict[str, int] = {}  # after `share`, of the images of all processes
        self._lengths = self.store.lengths  # after `share`, of all processes

    def __contains__(self, image_path: str) -> bool:
        """Return whether this process has an image's patches."""
        return image_path in self.store.lengths

    def add(self, image_path: str, features_PD: Tensor, position_P2: Tensor) -> None:
        """Take the features and centres of an image's patches, unless it was seen before."""
        if len(features_PD) == 0:
            return
        if len(self._projection) == 0:
            patches, dimension = features_PD.shape
            self._projection = gaussian_projection(dimension, self._projected_dimension, self._seed)
            self.store = self._stores.open(self._kind, patches, dimension, self._projection.shape[1])
            self._lengths = self.store.lengths
        if image_path in self:
            return
        features_PD = features_PD.detach().cpu().float().contiguous()
        with full_float32(features_PD.device):
            projected_PS = features_PD @ self._projection
        self.store.add(image_path, features_PD, projected_PS, position_P2.cpu().to(torch.int64))

    def share(self) -> None:
        """Tell all processes who has which image: the first that saw it. All have to call, after the last image."""
        self._owner, self._lengths = {}, {}
        for process, lengths in reversed(list(enumerate(gather_objects(self.store.lengths)))):
            self._owner |= dict.fromkeys(lengths, process)
            self._lengths |= lengths
        dimension = max(gather_objects(len(self._projection)))
        if len(self._projection) < dimension:
            self._projection = gaussian_projection(dimension, self._projected_dimension, self._seed)

    @property
    def paths(self) -> list[str]:
        """Paths of the images that gave patches, sorted, of all processes after :meth:`share`."""
        return sorted(self._lengths)

    def is_own(self, image_path: str) -> bool:
        """Return whether an image is this process's to work on."""
        return self._owner.get(image_path, 0) == rank()

    def select(
        self,
        ratio: float,
        minimum: int,
        description: str,
        state: Path | None = None,
        paths: Sequence[str] | None = None,
    ) -> BankContent:
        """Select a coreset of all patches by greedy k-center on their projections.

        The order is that of the paths: the coreset does not depend on when, in which batch or by which process an image
        was seen. All processes have to call, after :meth:`share`.

        Args:
            ratio: Share of the patches to keep, in (0, 1].
            minimum: Patches to keep at least (all, if there are fewer).
            description: Label of the progress bar and of the log.
            state: File to resume an interrupted selection from; see :func:`.greedy_k_center`.
            paths: Images to select from, sorted, at least one; all by default.
        """
        paths = self.paths if paths is None else list(paths)
        lengths = torch.tensor([self._lengths[path] for path in paths])
        starts = lengths.cumsum(0) - lengths
        points_NS, shard = self._projections(paths, lengths)
        count = max(minimum, round(ratio * shard.total))
        shown = description if rank() == 0 else None
        chosen_M = greedy_k_center(
            points_NS, count, seed=self._seed, description=shown, overwrite=True, shard=shard, state=state
        )
        del points_NS
        logger.info("%s: %d of %d patches from %d images.", description, len(chosen_M), shard.total, len(paths))
        source_M = torch.searchsorted(starts, chosen_M, right=True) - 1
        features, position = self._fetch(paths, source_M, chosen_M - starts[source_M])
        return BankContent(features, source_M, position, paths)

    def _projections(self, paths: list[str], lengths: Tensor) -> tuple[Tensor, Shard]:
        """Return the projections of this process's patches in the order of the images, and which part they are."""
        own = torch.tensor([self.is_own(path) for path in paths])
        points_NS = torch.empty(int(lengths[own].sum()), self._projection.shape[1], dtype=torch.float32)
        sums = {}
        for path, points in zip(filter(self.is_own, paths), points_NS.split(lengths[own].tolist()), strict=True):
            points.copy_(self.store.projected(path))
            sums[path] = points.double().sum(dim=0)
        # Image by image in one order, so that the mean is the same for any number of processes.
        everywhere, total = of_all_processes(sums), int(lengths.sum())
        mean_S = torch.stack([everywhere[path] for path in paths]).sum(dim=0) / total
        return points_NS, Shard(own.repeat_interleave(lengths).nonzero().flatten(), total, mean_S.float())

    def _fetch(self, paths: list[str], source_M: Tensor, row_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and positions of chosen patches, each from the process that has it."""
        place, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, len(self._projection))]
        positions = [torch.empty(0, 2, dtype=torch.int64)]
        for number in source_M.unique().tolist():
            if self.is_own(paths[number]):
                place.append((source_M == number).nonzero().flatten())
                features.append(self.store.features(paths[number], row_M[place[-1]]))
                positions.append(self.store.positions(paths[number], row_M[place[-1]]))
        order = gather_tensors(torch.cat(place)).argsort()
        return gather_tensors(torch.cat(features))[order], gather_tensors(torch.cat(positions))[order]


def of_all_processes(own: dict[str, V]) -> dict[str, V]:
    """Join what each process has of its images."""
    return {path: value for part in gather_objects(own) for path, value in part.items()}
