"""Collects patch features while images stream by, then selects the coreset.

Shape suffixes: N patches of all images, P patches of one, D features, S dimensions of the projection, M chosen patches.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anomalib_exdd.coreset import FeatureStore, MemoryStore, Shard, gaussian_projection, greedy_k_center
from anomalib_exdd.utils.distributed import gather_objects, gather_tensors, rank
from anomalib_exdd.utils.precision import full_float32

from .memory_bank import BankContent


class PatchCollector:
    """Patches of training images; with several processes, each collects those of the images that it sees.

    ``open_store`` makes the :attr:`store` when the first patches come, given the number of patches of an image, of
    features, and of dimensions of the projection in which the coreset is selected.
    """

    def __init__(
        self, projected_dimension: int, seed: int, open_store: Callable[[int, int, int], FeatureStore]
    ) -> None:
        self._projected_dimension, self._seed = projected_dimension, seed
        self._open_store = open_store
        self.store: FeatureStore = MemoryStore()
        self._projection: Tensor | None = None
        self._owner: dict[str, int] = {}  # after `share`, of the images of all processes
        self._lengths: dict[str, int] = self.store.lengths  # after `share`, of all processes

    def __contains__(self, image_path: str) -> bool:
        """Return whether this process has an image's patches."""
        return image_path in self.store

    def add(self, image_path: str, features_PD: Tensor, position_P2: Tensor) -> None:
        """Take the features and centres of an image's patches, unless it was seen before."""
        if len(features_PD) == 0:
            return
        if self._projection is None:
            patches, dimension = features_PD.shape
            self._projection = gaussian_projection(dimension, self._projected_dimension, self._seed)
            self.store = self._open_store(patches, dimension, self._projection.shape[1])
            self._lengths = self.store.lengths
        if image_path in self.store:
            return
        features_PD = features_PD.detach().cpu().float().contiguous()
        with full_float32(features_PD.device):
            projected_PS = features_PD @ self._projection
        self.store.add(image_path, features_PD, projected_PS, position_P2.cpu().to(torch.int64))

    def share(self) -> None:
        """Tell all processes who has which image: the first that saw it. All have to call, after the last image."""
        dimension = 0 if self._projection is None else len(self._projection)
        self._owner, self._lengths, dimensions = {}, {}, []
        for process, (lengths, its_dimension) in enumerate(gather_objects((dict(self.store.lengths), dimension))):
            dimensions.append(its_dimension)
            for path, length in lengths.items():
                if path not in self._owner:
                    self._owner[path], self._lengths[path] = process, length
        if dimension == 0 and max(dimensions):
            self._projection = gaussian_projection(max(dimensions), self._projected_dimension, self._seed)

    @property
    def num_patches(self) -> int:
        """Number of patches collected, of all processes after :meth:`share`."""
        return sum(self._lengths.values())

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
            description: Label of the progress bar.
            state: File to resume an interrupted selection from; see :func:`.greedy_k_center`.
            paths: Images to select from, sorted; all by default.

        Raises:
            ValueError: If no patch was collected.
        """
        paths = self.paths if paths is None else list(paths)
        if not paths or self._projection is None:
            msg = "No patch was collected, so that no memory bank can be built."
            raise ValueError(msg)
        lengths = torch.tensor([self._lengths[path] for path in paths])
        starts = lengths.cumsum(0) - lengths
        points_NS, shard = self._projections(paths, lengths, starts, self._projection.shape[1])
        count = max(minimum, round(ratio * int(lengths.sum())))
        shown = description if rank() == 0 else None
        chosen_M = greedy_k_center(
            points_NS, count, seed=self._seed, description=shown, overwrite=True, shard=shard, state=state
        )
        del points_NS
        source_M = torch.searchsorted(starts, chosen_M, right=True) - 1
        features, position = self._fetch(paths, source_M, chosen_M - starts[source_M], len(self._projection))
        return BankContent(features, source_M, position, paths)

    def _projections(self, paths: list[str], lengths: Tensor, starts: Tensor, width: int) -> tuple[Tensor, Shard]:
        """Return the projections of this process's patches in the order of the images, and which part they are."""
        own = [number for number, path in enumerate(paths) if self.is_own(path)]
        points_NS = torch.empty(int(lengths[own].sum()), width, dtype=torch.float32)
        index_N = torch.empty(len(points_NS), dtype=torch.int64)
        sums, filled = {}, 0
        for number in own:
            block = slice(filled, filled + int(lengths[number]))
            points_NS[block] = self.store.projected(paths[number])
            index_N[block] = torch.arange(int(lengths[number])) + starts[number]
            sums[number] = points_NS[block].double().sum(dim=0)
            filled = block.stop
        # Image by image in one order, so that the mean is the same for any number of processes.
        everywhere = {number: value for part in gather_objects(sums) for number, value in part.items()}
        total = int(lengths.sum())
        mean_S = torch.stack([everywhere[number] for number in range(len(paths))]).sum(dim=0) / total
        return points_NS, Shard(index_N, total, mean_S.float())

    def _fetch(self, paths: list[str], source_M: Tensor, row_M: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
        """Return the features and positions of chosen patches, each from the process that has it."""
        place, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dimension)]
        positions = [torch.empty(0, 2, dtype=torch.int64)]
        for number in source_M.unique().tolist():
            if self.is_own(paths[number]):
                place.append((source_M == number).nonzero().flatten())
                features.append(self.store.features(paths[number], row_M[place[-1]]))
                positions.append(self.store.positions(paths[number])[row_M[place[-1]]])
        order = gather_tensors(torch.cat(place)).argsort()
        return gather_tensors(torch.cat(features))[order], gather_tensors(torch.cat(positions))[order]
