"""The folder of a run: at any moment it holds finished images and tells which are missing.

Every file is written beside its place and renamed. The record of an image is written last: an image without one is not
finished and is made again. Processes share nothing but this folder, and each touches the files of its own images only.
"""

import io
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomalib_exdd.utils.files import PARTIAL_FILES, write_file

from .base import Mask, Pixels
from .manifest import (
    FOLDERS,
    FORMAT,
    MANIFEST_NAME,
    RECORDS,
    REVIEW_NAME,
    START_NAME,
    TABLE_NAME,
    Record,
    empty_review,
    manifest_csv,
    manifest_json,
    read_json,
    to_json,
)

logger = logging.getLogger(__name__)

MAX_COUNT = 100_000  # five digits name an image, as in KSDD2
PAGE_NAME, SHEET_NAME = "index.html", "contact_sheet.png"


@dataclass(frozen=True)
class OutputFolder:
    """A folder of synthetic images that is being written."""

    root: Path

    def open(
        self,
        settings: dict[str, Any],
        count: int,
        versions: dict[str, str],
        command: str = "",
        *,
        overwrite: bool = False,
    ) -> None:
        """Create the folder, or go on with it; one process does this before any other writes.

        Images depend on `settings` alone, plain values: a finished folder may be extended by a larger `count`.
        `versions` of libraries and the `command` are for messages. With `overwrite`, what is there is removed first.

        Raises:
            ValueError: If the folder holds something else, images of other settings, or more images than wanted.
        """
        path = self.root / START_NAME
        start = {"format": FORMAT, "count": count, "command": command, "versions": versions, "settings": settings}
        if not path.is_file():
            if others := [other.name for other in self.root.glob("*") if not other.match(PARTIAL_FILES)]:
                found = f"something else than synthetic images, such as `{min(others)}`"
                msg = f"The output folder `{self.root}` holds {found}. Name one that is empty or does not exist."
                raise ValueError(msg)
        elif overwrite:
            for name in FOLDERS:
                shutil.rmtree(self.root / name, ignore_errors=True)
            for name in (MANIFEST_NAME, TABLE_NAME, REVIEW_NAME, PAGE_NAME, SHEET_NAME):
                (self.root / name).unlink(missing_ok=True)
        else:
            before = read_json(path)
            self._check_same(before, start)
            if before["versions"] != versions:
                found = "; ".join(differences(before["versions"], versions))
                logger.warning("`%s` was begun with other versions of libraries: %s.", self.root, found)
            start["versions"] = before["versions"]  # of the first images
            if count > before["count"]:
                (self.root / MANIFEST_NAME).unlink(missing_ok=True)  # the folder is not finished any more
            else:
                start = before
        self.root.mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(start))
        for name in FOLDERS:
            (self.root / name).mkdir(exist_ok=True)

    def is_finished(self, index: int) -> bool:
        """Return whether an image is there with its mask and its record."""
        try:
            record = Record(**json.loads(self._record_path(index).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # there is none, or a power failure has emptied it
            return False
        return all((self.root / name).is_file() for name in (record.image, record.mask))

    def store(self, record: Record, image: Pixels, mask: Mask, preview: bytes) -> None:
        """Write an image with its mask, its preview (a JPEG) and, last of all, its record."""
        write_file(self.root / record.image, encode_png(image))
        write_file(self.root / record.mask, encode_png(np.where(mask, 255, 0).astype(np.uint8)))
        write_file(self.root / record.preview, preview)
        write_file(self._record_path(record.index), to_json(asdict(record)))

    def finish(self) -> list[Record]:
        """Write manifest and review, when all images are there; one process does this after all others."""
        start = read_json(self.root / START_NAME)
        paths = [self._record_path(index) for index in range(start["count"])]
        records = [Record(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]
        for path in self.root.rglob(PARTIAL_FILES):  # left by processes that were killed
            path.unlink()
        write_file(self.root / TABLE_NAME, manifest_csv(records))
        if not (self.root / REVIEW_NAME).exists():
            write_file(self.root / REVIEW_NAME, empty_review([record.image for record in records]))
        write_file(self.root / MANIFEST_NAME, manifest_json(start, records))
        return records

    def _record_path(self, index: int) -> Path:
        return self.root / RECORDS / f"{index:05d}.json"

    def _check_same(self, before: dict[str, Any], start: dict[str, Any]) -> None:
        fix = "Give another --output, or --overwrite to remove the images that are there."
        if found := differences(before["settings"], start["settings"]):
            msg = f"The output folder `{self.root}` holds images of other settings: {'; '.join(found)}. {fix}"
            raise ValueError(msg)
        if before["count"] > start["count"]:
            numbers = f"{before['count']} images, but `count` is {start['count']} now"
            msg = f"The output folder `{self.root}` was begun for {numbers}. {fix} Training can take fewer (`count`)."
            raise ValueError(msg)


def encode_png(pixels: Pixels) -> bytes:
    """Encode an image `[H, W, 3]` or a mask `[H, W]`, uint8, as PNG: the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name the entries of two nested values that differ, each with both of its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        parts = [differences(before.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [line for part in parts for line in part]
    return [] if before == now else [f"`{name}` was {before!r} and is {now!r} now"]
