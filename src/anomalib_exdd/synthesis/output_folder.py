"""The folder of a run: at any moment it holds finished images and tells which are missing.

Every file is written beside its place and renamed. The record of an image is written last: an image without one is not
finished and is made again. Processes share nothing but this folder, and each touches the files of its own images only.
"""

import io
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomalib_exdd.utils.files import PARTIAL_FILES, write_file

from .base import Mask, Pixels
from .manifest import (
    ACCEPTED,
    FORMAT,
    MANIFEST_NAME,
    PREVIEWS,
    RECORDS,
    REJECTED,
    REVIEW_NAME,
    START_NAME,
    TABLE_NAME,
    Record,
    empty_review,
    load_json,
    manifest_csv,
    manifest_json,
    read_json,
    to_json,
)

logger = logging.getLogger(__name__)

MAX_COUNT = 100_000  # five digits name an image, as in KSDD2
PAGE_NAME, SHEET_NAME = "index.html", "contact_sheet.png"
FOLDERS = (ACCEPTED, REJECTED, PREVIEWS, RECORDS)
MOST_DIFFERENCES = 5  # named in a message


@dataclass(frozen=True)
class OutputFolder:
    """A folder of synthetic images that is being written."""

    root: Path

    def open(
        self,
        settings: dict[str, Any],
        count: int,
        *,
        versions: dict[str, str],
        command: str = "",
        overwrite: bool = False,
    ) -> None:
        """Create the folder, or go on with it; one process does this before any other writes.

        A finished folder may be extended by a larger count.

        Args:
            settings: Everything that the images depend on, as plain values.
            count: How many images are wanted.
            versions: Versions of the libraries that take part.
            command: Command that makes the images, for messages.
            overwrite: Remove the images, the review and the reports that are there.

        Raises:
            ValueError: If the folder holds something else, images of other settings, or more images than wanted.
        """
        self._check_content()
        path = self.root / START_NAME
        start = {"format": FORMAT, "count": count, "command": command, "versions": versions, "settings": settings}
        if overwrite:
            for name in (MANIFEST_NAME, TABLE_NAME, REVIEW_NAME, PAGE_NAME, SHEET_NAME):
                (self.root / name).unlink(missing_ok=True)
            for name in reversed(FOLDERS):
                if (self.root / name).is_dir():
                    shutil.rmtree(self.root / name)
        elif path.is_file():
            before = read_json(path)
            self._check_same(before, start)
            if before["versions"] != versions:
                found = "; ".join(differences(before["versions"], versions))
                logger.warning("`%s` was begun with other versions of libraries: %s.", self.root, found)
            if before["count"] == count:
                return
            # The folder is not finished any more; versions stay those of the first images.
            (self.root / MANIFEST_NAME).unlink(missing_ok=True)
            start["versions"] = before["versions"]
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(start))

    def is_finished(self, index: int) -> bool:
        """Return whether an image is there with its mask and its record."""
        path = self._record_path(index)
        if not path.is_file():
            return False
        try:
            record = Record.from_dict(load_json(path), path)
        except ValueError as error:
            logger.warning("%s The image is made again.", error)
            return False
        return all((self.root / name).is_file() for name in (record.image, record.mask))

    def clean(self, index: int) -> None:
        """Remove all files of an image, the record first."""
        files = [f"{RECORDS}/{index:05d}.json", f"{PREVIEWS}/{index:05d}.jpg"]
        files += [f"{folder}/{index:05d}{end}.png" for folder in (ACCEPTED, REJECTED) for end in ("", "_GT")]
        for path in (self.root / file for file in files):
            path.unlink(missing_ok=True)

    def store(self, record: Record, image: Pixels, mask: Mask, preview: bytes) -> None:
        """Write an image with its mask, its preview (a JPEG) and, last of all, its record."""
        write_file(self.root / record.image, encode_png(image))
        write_file(self.root / record.mask, encode_png(np.where(mask, 255, 0).astype(np.uint8)))
        write_file(self.root / PREVIEWS / f"{record.index:05d}.jpg", preview)
        write_file(self._record_path(record.index), to_json(asdict(record)))

    def finish(self) -> list[Record]:
        """Write manifest and review, when all images are there; one process does this after all others.

        Raises:
            ValueError: If images are missing.
        """
        start = read_json(self.root / START_NAME)
        paths = [self._record_path(index) for index in range(start["count"])]
        if missing := [path for path in paths if not path.is_file()]:
            msg = f"{len(missing)} of {len(paths)} images in `{self.root}` are missing. Run the same command again."
            raise ValueError(msg)
        records = [Record.from_dict(load_json(path), path) for path in paths]
        self._warn_of_revisions(records)
        for path in self.root.rglob(PARTIAL_FILES):  # left by processes that were killed
            path.unlink()
        write_file(self.root / TABLE_NAME, manifest_csv(records))
        if not (self.root / REVIEW_NAME).exists():
            write_file(self.root / REVIEW_NAME, empty_review(record.image for record in records))
        write_file(self.root / MANIFEST_NAME, manifest_json(start, records))
        return records

    def _warn_of_revisions(self, records: Sequence[Record]) -> None:
        """Warn if the model changed between two runs: an unbroken run would have made other images."""
        for model in sorted({record.model for record in records if record.model}):
            revisions = sorted({str(record.revision) for record in records if record.model == model})
            if len(revisions) > 1:
                message = (
                    "`%s` holds images of %d revisions of `%s`: %s. Set `revision` and use --overwrite to have one."
                )
                logger.warning(message, self.root, len(revisions), model, ", ".join(revisions))

    def _record_path(self, index: int) -> Path:
        return self.root / RECORDS / f"{index:05d}.json"

    def _check_content(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            msg = f"The output `{self.root}` is a file. Name a folder."
            raise ValueError(msg)
        if not self.root.is_dir() or (self.root / START_NAME).is_file():
            return
        # An interruption may have left empty folders, and a file that was being written.
        for path in sorted(path for path in self.root.iterdir() if not path.match(PARTIAL_FILES)):
            if path.name not in FOLDERS or (path.is_dir() and any(path.iterdir())):
                msg = (
                    f"The output folder `{self.root}` holds something else than synthetic images, such as "
                    f"`{path.name}`. Name a folder that is empty or does not exist."
                )
                raise ValueError(msg)

    def _check_same(self, before: dict[str, Any], start: dict[str, Any]) -> None:
        fix = "Give another --output, or --overwrite to remove the images that are there."
        if before["settings"] != start["settings"]:
            found = differences(before["settings"], start["settings"])
            more = f" and {len(found) - MOST_DIFFERENCES} more" if len(found) > MOST_DIFFERENCES else ""
            msg = (
                f"The output folder `{self.root}` holds images of other settings: "
                f"{'; '.join(found[:MOST_DIFFERENCES])}{more}. {fix}"
            )
            raise ValueError(msg)
        if before["count"] > start["count"]:
            msg = (
                f"The output folder `{self.root}` was begun for {before['count']} images, but `count` is "
                f"{start['count']} now. SyntheticDefects can train with fewer (its own `count`). {fix}"
            )
            raise ValueError(msg)


def encode_png(pixels: Pixels) -> bytes:
    """Encode an image `[H, W, 3]` or a mask `[H, W]`, uint8, as PNG: the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name the entries of two nested values that differ, each with both of its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys: Sequence[str] = sorted({*before, *now})
        parts = [(f"{name}.{key}" if name else key, before.get(key), now.get(key)) for key in keys]
        return [line for key, old, new in parts for line in differences(old, new, key)]
    return [] if before == now else [f"`{name}` was {before!r} and is {now!r} now"]
