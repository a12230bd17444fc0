"""Large images in bounded memory: the backbone sees one tile at a time, everything else works on the whole image.

Tiles overlap, and every patch is taken from the tile in which it lies farthest from the edge: with enough overlap the
padding at a tile's edges does not reach it, and the features are those of the whole image. Tiles start where a cell of
the coarsest layer does, so that all grids stay aligned.

Shape suffixes: B images, C channels, H x W pixels, D features, h x w patches.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor

from .features import PatchFeatureExtractor

Coarse = TypeVar("Coarse")
Fine = TypeVar("Fine")
Tree = TypeVar("Tree")


class Span(NamedTuple):
    """A tile along one axis, in pixels: from ``start`` to ``stop``; patches are taken from ``first`` to ``last``."""

    start: int
    stop: int
    first: int
    last: int

    def cells(self, stride: int, origin: int = 0) -> slice:
        """Return the cells of a grid, which starts at ``origin``, that are taken from the tile."""
        return slice((self.first - origin) // stride, -((origin - self.last) // stride))


def spans(length: int, size: int, overlap: int, step: int) -> list[Span]:
    """Cover one axis with as few tiles as the overlap allows, evenly spaced.

    Args:
        length: Pixels of the image along the axis.
        size: Pixels of a tile; the last one has up to ``step - 1`` more.
        overlap: Pixels that neighbouring tiles share at least, below ``size``.
        step: Tiles start at multiples of it; divides ``size`` and ``overlap``.
    """
    if length <= size:
        return [Span(0, length, 0, length)]
    room = (length - size) // step  # of the last tile's start, in steps
    gaps = -(-room // ((size - overlap) // step)) or 1
    starts = sorted({step * (room * number // gaps) for number in range(gaps + 1)})
    stops = [start + size for start in starts[:-1]] + [length]
    middles = [(start + stop) // (2 * step) * step for start, stop in zip(starts[1:], stops, strict=False)]
    return [Span(*each) for each in zip(starts, stops, [0, *middles], [*middles, length], strict=True)]


class Tiling:
    """Extracts features of images by tiles of ``size`` x ``size`` pixels, which share ``overlap`` pixels at least.

    Raises:
        ValueError: If the backbone cannot work on tiles, or not on these.
    """

    def __init__(self, extractor: PatchFeatureExtractor, size: int, overlap: int) -> None:
        if not extractor.reductions or not extractor.padded:
            cause = f"the backbone {extractor.backbone_name!r}" if extractor.padded else "scoring 'published'"
            msg = f"Argument `tile_size` is {size}, but {cause} relates every patch to the whole image: leave it out."
            raise ValueError(msg)
        self.size, self.overlap = size, overlap
        self.stride, self.step = extractor.reductions[0], max(extractor.reductions)
        if not 0 <= overlap < size or size % self.step or overlap % self.step:
            msg = (
                "Arguments `tile_size` and `tile_overlap` have to be multiples of the coarsest layer's reduction "
                f"{self.step}, the overlap smaller, but got {size} and {overlap}."
            )
            raise ValueError(msg)

    def apply(
        self,
        extract: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        images_BCHW: Tensor,
        work: Callable[[Tensor, Tensor | None], tuple[Coarse, Fine]],
    ) -> tuple[Coarse, Fine]:
        """Extract features tile by tile, and put together what is computed from them.

        Args:
            extract: Returns the features of tiles, shape (B, D, h, w), and fine ones, shape (B, F, 2 h, 2 w), or None.
            images_BCHW: Normalised images.
            work: Takes such features of a part of the images, and returns for each of the two grids a tensor with the
                channels last, None, or a named tuple of these. The same is returned for whole images.
        """
        height, width = images_BCHW.shape[-2:]
        axes = [spans(length, self.size, self.overlap, self.step) for length in (height, width)]
        strides = (self.stride, self.stride // 2)
        whole: list[Any] = []  # on the two grids
        for row, column in product(*axes):
            maps = extract(images_BCHW[..., row.start : row.stop, column.start : column.stop])
            own: list[Any] = [
                None if each is None else each[..., row.cells(stride, row.start), column.cells(stride, column.start)]
                for each, stride in zip(maps, strides, strict=True)
            ]
            found = work(*own)
            for grid, (part, stride) in enumerate(zip(found, strides, strict=True)):
                if len(whole) == grid:  # the first tile
                    size = (-(-height // stride), -(-width // stride))
                    whole.append(mapped(lambda new, n=size: new.new_empty(len(new), *n, *new.shape[3:]), part))
                place = (slice(None), row.cells(stride), column.cells(stride))
                mapped(lambda all_of_it, new, at=place: all_of_it[at].copy_(new), whole[grid], part)
        return whole[0], whole[1]


def mapped(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Apply a function to the tensors of a nested named tuple, together with those of others; the rest stays."""
    if isinstance(tree, Tensor):
        return cast("Tree", function(tree, *others))
    if isinstance(tree, tuple):
        return type(tree)(*(mapped(function, *parts) for parts in zip(tree, *others, strict=True)))
    return tree
