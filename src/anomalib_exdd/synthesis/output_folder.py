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
from .manifest import FOLDERS, MANIFEST_NAME, RECORDS, REPORTS, START_NAME, Record, read_json, to_json, write_manifest

logger = logging.getLogger(__name__)

MAX_COUNT = 100_000  # five digits name an image, as in KSDD2


@dataclass(frozen=True)
class OutputFolder:
    """A folder of synthetic images that is being written."""

    root: Path

    def open(self, start: dict[str, Any], *, overwrite: bool = False) -> None:
        """Create the folder, or go on with it; one process does this before any other writes.

        `start` is the content of `synthesis.json`, see `SynthesisRun.open`. Images depend on its `settings` alone: a
        finished folder may be extended by a larger `count`. With `overwrite`, what an earlier run has made is removed.
        A ValueError refuses a folder of something else, of other settings, or with more images than wanted.
        """
        path = self.root / START_NAME
        if not path.is_file():
            if others := [other.name for other in self.root.glob("*") if not other.match(PARTIAL_FILES)]:
                what = f"something else than synthetic images, such as `{min(others)}`"
                msg = f"The output folder `{self.root}` holds {what}. Name one that is empty or does not exist."
                raise ValueError(msg)
        elif overwrite:
            for name in FOLDERS:
                shutil.rmtree(self.root / name, ignore_errors=True)
            for name in REPORTS:
                (self.root / name).unlink(missing_ok=True)
        else:
            before = read_json(path)
            self._check_same(before, start)
            start = {**start, "versions": before["versions"]}  # of the first images
            if start["count"] > before["count"]:
                (self.root / MANIFEST_NAME).unlink(missing_ok=True)  # the folder is not finished any more
        self.root.mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(start))
        for name in FOLDERS:
            (self.root / name).mkdir(exist_ok=True)

    def _check_same(self, before: dict[str, Any], start: dict[str, Any]) -> None:
        found = differences(before["settings"], start["settings"])
        if before["count"] > start["count"]:
            found.append(f"`count` was {before['count']} and is {start['count']} now")
        if found:
            fix = "Give another --output, or --overwrite to remove the images that are there."
            msg = f"The output folder `{self.root}` holds images of other settings: {'; '.join(found)}. {fix}"
            raise ValueError(msg)
        if found := differences(before["versions"], start["versions"]):
            logger.warning("`%s` was begun with other versions of libraries: %s.", self.root, "; ".join(found))

    def is_finished(self, index: int) -> bool:
        """Return whether an image is there with its mask and its record."""
        try:
            record = self._read(index)
        except (OSError, ValueError, TypeError):  # there is none, or a power failure has emptied it
            return False
        return all((self.root / name).is_file() for name in (record.image, record.mask))

    def store(self, record: Record, image: Pixels, mask: Mask, preview: bytes) -> None:
        """Write an image with its mask, its preview (a JPEG) and, last of all, its record."""
        for name, pixels in ((record.image, image), (record.mask, mask.astype(np.uint8) * 255)):
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "PNG", compress_level=4)
            write_file(self.root / name, encoded.getvalue())
        write_file(self.root / record.preview, preview)
        write_file(self.root / RECORDS / f"{record.index:05d}.json", to_json(asdict(record)))

    def finish(self) -> list[Record]:
        """Write manifest and review, when all images are there; one process does this after all others."""
        start = read_json(self.root / START_NAME)
        records = [self._read(index) for index in range(start["count"])]
        for path in self.root.rglob(PARTIAL_FILES):  # left by processes that were killed
            path.unlink()
        write_manifest(self.root, start, records)
        return records

    def _read(self, index: int) -> Record:
        return Record(**json.loads((self.root / RECORDS / f"{index:05d}.json").read_text(encoding="utf-8")))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name the entries of two nested values that differ, each with both of its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        parts = [differences(before.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [line for part in parts for line in part]
    return [] if before == now else [f"`{name}` was {before!r} and is {now!r} now"]
