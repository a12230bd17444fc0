"""A memory bank: representative patch features, and where each of them comes from."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

from anomalib_exdd.search import NeighborIndex, Neighbors, SearchBackend, create_index, dense_search
from anomalib_exdd.search.exact import direct_distances
from anomalib_exdd.utils.precision import Float32Buffers

from .scoring import PatchDistances

BankPrecision = Literal["float32", "float16"]
Origins = dict[str, list[str]]  # path of a synthetic image -> paths of the real images that it was made from

_BUILDING = threading.Lock()  # one index at a time: first predictions may come from several threads at once


@dataclass(frozen=True)
class BankContent:
    """What a bank holds."""

    features: Tensor  # float32, shape (M, D)
    source: Tensor  # row in `sources` of the image that each entry comes from, int64, shape (M,)
    position: Tensor  # row and column of each patch's centre, in pixels of the pre-processed image, int64, (M, 2)
    sources: list[str]  # paths of the images
    kinds: dict[str, str] = field(default_factory=dict)  # of the defects in those of which it is known


class MemoryBank(DynamicBufferMixin, Float32Buffers):
    """Patch features to search in, with each entry's source image and position.

    Args:
        num_neighbors: Size K of the neighbourhood that the weights of the scores look at, m* included.
        search: Backend of the search; see :func:`anomalib_exdd.search.create_index`.
        precision: How features are stored; distances are computed in float32 from either.
    """

    features: Tensor  # float32 or float16; this, `source`, `position` and `sources` as in `BankContent`
    source: Tensor
    position: Tensor
    neighborhood: Tensor  # for every entry the K entries nearest to it in the bank, itself first, int64, shape (M, K)
    sources: list[str]
    origins: Origins  # what synthetic source images were made from
    kinds: dict[str, str]  # of the defects, such as "scratch", in the source images of which it is known
    _index: NeighborIndex | None

    def __init__(
        self, num_neighbors: int = 3, search: SearchBackend = "auto", precision: BankPrecision = "float32"
    ) -> None:
        super().__init__()
        self._dtype = torch.float16 if precision == "float16" else torch.float32
        self.num_neighbors = num_neighbors
        self.search = search
        self.clear()

    def __len__(self) -> int:
        """Return the number of entries."""
        return self.features.shape[0]

    @property
    def vectors(self) -> Tensor:
        """The features in float32, shape (M, D)."""
        return self.features.float()

    def fill(self, content: BankContent) -> None:
        """Replace the bank's content, on the device where the bank is."""
        device = self.features.device
        self._index = None
        self.features = content.features.to(device, self._dtype).contiguous()
        self.source = content.source.to(device)
        self.position = content.position.to(device)
        self.sources = list(content.sources)
        self.kinds = {path: content.kinds[path] for path in self.sources if content.kinds.get(path)}
        self.neighborhood = self._neighborhoods()

    def add(self, content: BankContent) -> None:
        """Add entries to those that are there; each source is one that the bank does not have yet."""
        device = self.features.device
        self.fill(
            BankContent(
                torch.cat([self.features, content.features.to(device, self._dtype)]),
                torch.cat([self.source, content.source.to(device) + len(self.sources)]),
                torch.cat([self.position, content.position.to(device)]),
                [*self.sources, *content.sources],
                self.kinds | content.kinds,
            )
        )

    def remove(self, source: str) -> int:
        """Drop all entries of a source image, and the image from :attr:`sources`; return the number of entries."""
        if source not in self.sources:
            return 0
        row = self.sources.index(source)
        stays = self.source != row
        dropped = len(self) - int(stays.sum())
        sources = [path for path in self.sources if path != source]
        self.origins.pop(source, None)
        source_M = self.source - (self.source > row).to(self.source.dtype)
        self.fill(BankContent(self.features[stays], source_M[stays], self.position[stays], sources, self.kinds))
        return dropped

    def clear(self) -> None:
        """Empty the bank."""
        device = self.features.device if "features" in self._buffers else None
        self._index = None
        self.sources, self.origins, self.kinds = [], {}, {}
        self.register_buffer("features", torch.empty(0, dtype=self._dtype, device=device))
        for name in ("neighborhood", "source", "position"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=device))

    def nearest(self, query_QD: Tensor, k: int = 1) -> Neighbors:
        """Find the k nearest entries of every query; see :meth:`NeighborIndex.search`."""
        if len(self) == 0:
            msg = "The memory bank is empty. Train the model, or load a trained checkpoint, before predicting."
            raise ValueError(msg)
        if torch.compiler.is_compiling():
            return dense_search(query_QD, self.vectors, k)
        index = self._index
        if index is None:
            with _BUILDING:
                index = self._index = self._index or create_index(self.vectors, self.search)
        return index.search(query_QD, k)

    def distances(self, patches_BPD: Tensor, *, neighborhood: bool, num_ranked: int = 1) -> PatchDistances:
        """Measure how far patches are from the bank.

        Args:
            patches_BPD: Patch features of B images, float32, shape (B, P, D) or (B, h, w, D).
            neighborhood: Whether to measure the neighbourhood of each nearest entry; a bank with fewer than
                ``num_neighbors`` entries has smaller ones.
            num_ranked: How many of the nearest entries to measure; a bank with fewer repeats the last.
        """
        *places, dimension = patches_BPD.shape
        query_QD = patches_BPD.reshape(-1, dimension)
        nearest = self.nearest(query_QD, min(num_ranked, max(1, len(self))))
        entry_Q, around = nearest.indices[:, 0], None
        if neighborhood:
            around = direct_distances(query_QD, self.features, self.neighborhood[entry_Q]).reshape(*places, -1)
        ranked = nearest.distances.reshape(*places, -1)
        if ranked.shape[-1] < num_ranked:
            ranked = torch.cat([ranked, *[ranked[..., -1:]] * (num_ranked - ranked.shape[-1])], dim=-1)
        return PatchDistances(ranked[..., 0], around, dimension, ranked, entry_Q.reshape(places))

    def _neighborhoods(self) -> Tensor:
        """Find each entry's neighbourhood, itself first even where the bank holds duplicates."""
        count = min(self.num_neighbors, len(self))
        itself = torch.arange(len(self), device=self.features.device).unsqueeze(1)
        if count < 2:
            return itself
        # Always by torch: what is stored in a checkpoint should not depend on the backend.
        found = create_index(self.vectors, "torch").search(self.vectors, count).indices
        # Stable: entries that are not the entry itself keep their order, the entry itself moves to the front.
        order = (found != itself).to(torch.int8).argsort(dim=1, stable=True)
        found = found.gather(1, order)
        found[:, :1] = itself  # among more than K duplicates it may not have been found at all
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryBank":
        self._index = None
        super()._apply(fn, recurse)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Return what is saved beside the buffers."""
        return {"sources": self.sources, "origins": self.origins, "kinds": self.kinds}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what was saved beside the buffers."""
        self.sources = list(state["sources"])
        self.origins = dict(state.get("origins", {}))
        self.kinds = dict(state.get("kinds", {}))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._index = None
        if len(self) and self.neighborhood.shape[1] != min(self.num_neighbors, len(self)):
            self.neighborhood = self._neighborhoods()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the search index out: it is rebuilt where it is needed, and FAISS objects cannot be copied."""
        return {**self.__dict__, "_index": None}


class SharedSources:
    """Finds the sources of a bank that share content with an image, by what synthetic images were made from.

    Distances that calibration relies on leave these sources out: a real defect would otherwise be close to its own
    copies in synthetic images, and the calibration would trust such closeness.
    """

    def __init__(self, sources: Sequence[str], origins: Mapping[str, Iterable[str]]) -> None:
        self._origins = origins
        self._contents = [{source, *origins.get(source, ())} for source in sources]

    def rows(self, path: str) -> list[int]:
        """Return the rows of the sources that share content with an image, ascending."""
        content = {path, *self._origins.get(path, ())}
        return [row for row, shown in enumerate(self._contents) if not content.isdisjoint(shown)]
