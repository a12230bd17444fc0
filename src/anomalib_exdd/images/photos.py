"""Photos to predict: a folder of thousands, in which masks may lie beside images and some files may be broken.

`anomalib predict --data photos/` builds a :class:`anomalib.data.PredictDataset`, which stops at the first file that it
cannot read, clips 16-bit images to white, and predicts masks as if they were images. :func:`tolerant` puts
:class:`PhotoLoader` in the place of a loader of such a data set.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, SequentialSampler
from torchvision.transforms.v2 import Transform

from .decoding import DECODING_ERRORS, is_deep
from .reading import WHITE_LEVEL, inspect_image, map_files, read_image
from .sources import COMMON_MASK_SUFFIXES, named_like_masks

_READING_THREADS = 4
_BLACK, _WHITE = 8, 247  # of 255
_MASK_SHARE = 0.99  # of a mask's pixels are black or white; the rest is a softened edge


class UnreadableFile(NamedTuple):
    """A file that is no image, or a broken one.

    Attributes:
        path: The file.
        reason: What is wrong with it, in one line.
    """

    path: str
    reason: str


class PhotoLoader:
    """Reads photos in a few threads and hands them out in batches, in their order, without stopping at broken files.

    It stands where a :class:`torch.utils.data.DataLoader` would. It is none, because an unreadable file makes no item,
    and a data loader has to have one for every index. Only the batch in work and a few photos ahead are in memory.

    Args:
        files: The photos.
        batch_size: Photos in a batch.
        process: Number of this process, and how many there are. Each reads a stretch of the files of its own.
        first_transform: Transform of the photos' owner, applied to every photo.

    Attributes:
        masks: Masks that lie beside their images and are not predicted.
        resize: Further transform, applied in the reading threads. It gives photos of a batch the same size.
        white_level: The number that is white in photos of more than 8 bits.
    """

    def __init__(
        self,
        files: Sequence[Path],
        batch_size: int = 1,
        process: tuple[int, int] = (0, 1),
        first_transform: Transform | None = None,
    ) -> None:
        images, self.masks = leave_out_masks(files)
        rank, world_size = process
        self.total = len(images)
        self.files = images[len(images) * rank // world_size : len(images) * (rank + 1) // world_size]
        self.batch_size = batch_size
        self.first_transform = first_transform
        self.resize: Transform | None = None
        self.white_level = WHITE_LEVEL
        self._unreadable: list[UnreadableFile] = []
        # At least one, also where there are more processes than photos: Lightning leaves a loop without batches out,
        # and would never come to the end at which the processes meet.
        self._num_batches = max(1, math.ceil(len(self.files) / batch_size))

    def __len__(self) -> int:
        """Number of batches if every file can be read."""
        return self._num_batches

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield batches of the photos that can be read."""
        self._unreadable = []
        items: list[ImageItem] = []
        for item in self._items():
            items.append(item)
            if len(items) == self.batch_size:
                yield cast("ImageBatch", ImageBatch.collate(items))
                items = []
        if items:
            yield cast("ImageBatch", ImageBatch.collate(items))

    def take_unreadable(self) -> list[UnreadableFile]:
        """Return the files that could not be read since the last call."""
        taken, self._unreadable = self._unreadable, []
        return taken

    def _items(self) -> Iterator[ImageItem]:
        threads = min(_READING_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as executor:
            ahead: deque[Any] = deque()
            files = iter(self.files)
            while True:
                # Not `executor.map`, which would read the whole folder as fast as it can and keep it.
                while len(ahead) <= threads and (path := next(files, None)) is not None:
                    ahead.append(executor.submit(self._read, path))
                if not ahead:
                    return
                read = ahead.popleft().result()
                if isinstance(read, UnreadableFile):
                    self._unreadable.append(read)
                else:
                    yield read

    def _read(self, path: Path) -> ImageItem | UnreadableFile:
        try:
            image: torch.Tensor = read_image(path, self.white_level)
        except ValueError as error:
            return UnreadableFile(str(path), " ".join(str(error).split()))
        for transform in (self.first_transform, self.resize):
            if transform is not None:
                image = transform(image)
        return ImageItem(image=image, image_path=str(path))


def has_photos(loader: Any) -> bool:
    """Tell whether a loader goes once through photos that Anomalib has listed."""
    return (
        isinstance(loader, DataLoader)
        and type(loader.dataset) is PredictDataset
        and isinstance(loader.sampler, SequentialSampler)
        and loader.batch_size is not None
    )


def tolerant(loader: Any, process: tuple[int, int] = (0, 1)) -> Any:
    """Return a loader of the same photos that does not stop at broken files.

    Args:
        loader: What Anomalib predicts from. Only a data loader that goes once through a
            :class:`anomalib.data.PredictDataset` is replaced; data sets of one's own are left as they are. Hidden files
            are left out.
        process: Number of this process, and how many there are.
    """
    if not has_photos(loader):
        return loader
    dataset = loader.dataset
    files = dataset.image_filenames
    visible = [path for path in files if not path.name.startswith(".")]  # macOS leaves `._photo.jpg` behind
    return PhotoLoader(visible or files, loader.batch_size, process, dataset.transform)


def leave_out_masks(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Tell images from the masks that lie beside them, as in KSDD2 (``10000.png``, ``10000_GT.png``).

    A defective part must never be passed over because of its name: a file counts as a mask only if it also looks like
    one. It has no colours, is black and white, and as large as the image whose name it bears.

    Args:
        files: Image files.

    Returns:
        The images and the masks, in the order of ``files``.
    """
    pairs = named_like_masks(files, [suffix for suffix in COMMON_MASK_SUFFIXES if suffix])
    candidates = list(pairs)
    found = map_files(lambda path: _looks_like_mask(path, pairs[path]), candidates, "Looking for masks")
    masks = {path for path, is_mask in zip(candidates, found, strict=True) if is_mask}
    return [path for path in files if path not in masks], [path for path in files if path in masks]


def _looks_like_mask(path: Path, images: Sequence[Path]) -> bool:
    try:
        if inspect_image(path) not in {inspect_image(image) for image in images}:
            return False
        with Image.open(path) as image:
            pixels = np.asarray(image if is_deep(image) else image.convert("RGBA"), dtype=np.float64)
    except DECODING_ERRORS:
        return False  # whoever reads it says what is wrong with it
    if pixels.ndim == 3:
        visible = pixels[..., 3] > 127
        if (pixels[..., :3] != pixels[..., :1])[visible].any():
            return False
        pixels = np.where(visible, pixels[..., 0], 0)
    elif pixels.max() > 255:
        pixels = pixels * 255 / pixels.max()
    return bool(((pixels <= _BLACK) | (pixels >= _WHITE)).mean() >= _MASK_SHARE)
