"""A loader for prediction: reads a folder of thousands of images, skips broken files and masks beside images.

`anomalib predict --data images/` builds a :class:`anomalib.data.PredictDataset`, which stops at the first file that it
cannot read, clips 16-bit images to white, and predicts masks as if they were images. :func:`replace_loader` puts
:class:`PredictLoader` in the place of a loader of such a data set.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from PIL import Image
from torch.utils.data import DataLoader, SequentialSampler
from torchvision.transforms.v2 import Transform

from .file_discovery import COMMON_MASK_SUFFIXES, named_like_masks
from .reading import DECODING_ERRORS, WHITE_LEVEL, inspect_image, is_deep, map_files, read_image

READING_THREADS = 4
_BLACK, _WHITE = 8, 247  # of 255
_MASK_SHARE = 0.99  # of a mask's pixels are black or white; the rest is a softened edge


class UnreadableFile(NamedTuple):
    """A file that cannot be read as an image, and the reason in one line."""

    path: str
    reason: str


class PredictLoader:
    """Reads images in a few threads and yields them in batches, in their order, without stopping at broken files.

    It is no :class:`torch.utils.data.DataLoader`, which has to have an item for every index, and an unreadable file
    makes none. Only the current batch and a few images ahead are in memory.

    Args:
        files: The images; masks among them are left out.
        batch_size: Images in a batch.
        process: Number of this process, and how many there are. Each reads a contiguous part of the files.
        first_transform: The data set's own transform, applied to every image.

    Attributes:
        masks: Masks that lie beside their images and are not predicted.
        resize: Further transform, applied in the reading threads. It gives images of a batch the same size.
        white_level: The number that is white in images of more than 8 bits.
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
        self.files = images[len(images) * rank // world_size : len(images) * (rank + 1) // world_size]
        self.batch_size = batch_size
        self.first_transform = first_transform
        self.resize: Transform | None = None
        self.white_level = WHITE_LEVEL
        self._unreadable: list[UnreadableFile] = []

    def __len__(self) -> int:
        """Number of batches if every file can be read."""
        # At least one, also where there are more processes than images: Lightning leaves a loop without batches out,
        # and would never come to the end at which the processes meet.
        return max(1, math.ceil(len(self.files) / self.batch_size))

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield batches of the images that can be read."""
        self._unreadable = []
        images = self._read_all()
        while items := list(islice(images, self.batch_size)):
            yield cast("ImageBatch", ImageBatch.collate(items))

    def take_unreadable(self) -> list[UnreadableFile]:
        """Return the files that could not be read since the last call."""
        taken, self._unreadable = self._unreadable, []
        return taken

    def _read_all(self) -> Iterator[ImageItem]:
        threads = min(READING_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as executor:
            # Not `executor.map`, which would read the whole folder as fast as it can and keep it.
            files = iter(self.files)
            ahead = deque(executor.submit(self._read, path) for path in islice(files, threads))
            while ahead:
                read = ahead.popleft().result()
                ahead.extend(executor.submit(self._read, path) for path in islice(files, 1))
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


def is_replaceable(loader: Any) -> bool:
    """Tell whether a loader goes once through a :class:`anomalib.data.PredictDataset`, and not a subclass of it."""
    return (
        isinstance(loader, DataLoader)
        and type(loader.dataset) is PredictDataset
        and isinstance(loader.sampler, SequentialSampler)
        and loader.batch_size is not None
    )


def replace_loader(loader: Any, process: tuple[int, int] = (0, 1)) -> Any:
    """Return a :class:`PredictLoader` of the same files but hidden ones, or the loader itself if it is of another kind.

    ``process`` is the number of this process, and how many there are.
    """
    if not is_replaceable(loader):
        return loader
    dataset = loader.dataset
    files = dataset.image_filenames
    visible = [path for path in files if not path.name.startswith(".")]  # macOS leaves `._image.jpg` behind
    return PredictLoader(visible or files, loader.batch_size, process, dataset.transform)


def leave_out_masks(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Separate images from the masks that lie beside them, as in KSDD2 (``10000.png``, ``10000_GT.png``).

    A defective part must not be skipped because of its name: a file counts as a mask only if it also looks like one. It
    has no colours, is black and white, and as large as the image whose name it has. The order of the files is kept.
    """
    pairs = named_like_masks(files, COMMON_MASK_SUFFIXES)
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
        return False  # reported when it is read
    if pixels.ndim == 3:
        visible = pixels[..., 3] > 127
        if (pixels[..., :3] != pixels[..., :1])[visible].any():
            return False
        pixels = np.where(visible, pixels[..., 0], 0)
    elif pixels.max() > 255:
        pixels = pixels * 255 / pixels.max()
    return bool(((pixels <= _BLACK) | (pixels >= _WHITE)).mean() >= _MASK_SHARE)
