"""The folder that a synthesis writes: at any moment it holds finished images and knows which are missing.

Every file is written beside its place and renamed. The record of an image is written last: an image without one is not
finished and is made again. Processes share nothing but this folder, and each touches the files of its own images only.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anomalib_exdd.utils.files import PARTIAL_FILES, write_file

from .manifest import (
    FORMAT,
    MANIFEST_NAME,
    START_NAME,
    TABLE_NAME,
    Record,
    check_format,
    manifest_csv,
    manifest_json,
    read_json,
    to_json,
)
from .review import REVIEW_NAME, empty_review
from .synthesizer import Mask, Pixels

logger = logging.getLogger(__name__)

MAX_COUNT = 100_000  # five digits name an image, as in KSDD2
ACCEPTED, REJECTED, PREVIEWS, RECORDS = "train", "rejected", "previews", "records"
PAGE_NAME, SHEET_NAME = "index.html", "contact_sheet.png"  # for people, made from the rest
_FOLDERS = (ACCEPTED, REJECTED, PREVIEWS, RECORDS)
_MOST_DIFFERENCES = 5  # named in a message


@dataclass(frozen=True)
class RunFolder:
    """A folder of synthetic images in the making.

    Attributes:
        root: The folder.
    """

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
        """Begin here, or go on with what is here; one process does this before any other writes.

        A finished folder may be extended by a larger count.

        Args:
            settings: Everything that the images depend on, as JSON can hold it.
            count: How many images are wanted.
            versions: Versions of the libraries that take part.
            command: Command that makes the images, for messages.
            overwrite: Remove what an earlier synthesis has written here.

        Raises:
            ValueError: If the folder holds something else, images of other settings, or more images than wanted.
        """
        self._check_is_ours()
        if overwrite:
            self._clear()
        path = self.root / START_NAME
        start = {"format": FORMAT, "count": count, "command": command, "versions": versions, "settings": settings}
        if path.is_file() and not overwrite:
            before = self.start()
            self._check_same(before, start)
            if before["versions"] != versions:
                logger.warning(
                    "`%s` was begun with other versions of libraries: %s. Its images may differ from the new ones.",
                    self.root,
                    "; ".join(differences(before["versions"], versions)),
                )
            if before["count"] == count:
                return
            # The folder is not finished any more; versions stay those of the first images.
            (self.root / MANIFEST_NAME).unlink(missing_ok=True)
            start["versions"] = before["versions"]
        for name in _FOLDERS:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(start))

    def start(self) -> dict[str, Any]:
        """Return what is known about the run: `count`, `settings`, `versions`, `command`.

        Raises:
            ValueError: If the file was damaged or written by another version.
        """
        path = self.root / START_NAME
        content = read_json(path)
        check_format(content, path)
        return dict(content)

    def is_finished(self, index: int) -> bool:
        """Tell whether an image is there with everything that belongs to it."""
        path = self._record_path(index)
        if not path.is_file():
            return False
        try:
            record = Record.from_dict(read_json(path), path)
        except ValueError as error:
            logger.warning("%s The image is made again.", error)
            return False
        return all((self.root / name).is_file() for name in (record.image, record.mask))

    def clean(self, index: int) -> None:
        """Remove everything of an image, such as what an interruption has left, the record first."""
        name = f"{index:05d}"
        files = [f"{RECORDS}/{name}.json", f"{PREVIEWS}/{name}.jpg"]
        files += [f"{folder}/{name}{end}.png" for folder in (ACCEPTED, REJECTED) for end in ("", "_GT")]
        for path in (self.root / file for file in files):
            path.unlink(missing_ok=True)

    def store(self, record: Record, image: Pixels, mask: Mask, preview: bytes | None) -> None:
        """Write an image with its mask, its preview and, last of all, its record.

        Args:
            record: How it was made; names the files.
            image: The image, `[H, W, 3]`.
            mask: Its mask, `[H, W]`.
            preview: Small picture of it, a JPEG, if there is one.
        """
        write_file(self.root / record.image, encode_png(image))
        write_file(self.root / record.mask, encode_png(np.where(mask, 255, 0).astype(np.uint8)))
        if preview is not None:
            write_file(self.root / PREVIEWS / f"{record.index:05d}.jpg", preview)
        write_file(self._record_path(record.index), record.to_json())

    def finish(self) -> list[Record]:
        """Write manifest and review, when all images are there; one process does this after all others.

        Returns:
            Records of all images, in their order.

        Raises:
            ValueError: If images are missing.
        """
        start = self.start()
        paths = [self._record_path(index) for index in range(start["count"])]
        if missing := [path for path in paths if not path.is_file()]:
            msg = (
                f"{len(missing)} of {len(paths)} images in `{self.root}` are missing, such as number "
                f"{missing[0].stem}. Run the same command again: it makes what is missing."
            )
            raise ValueError(msg)
        records = [Record.from_dict(read_json(path), path) for path in paths]
        self._report_revisions(records)
        for path in self.root.rglob(PARTIAL_FILES):  # left by processes that were killed
            path.unlink()
        write_file(self.root / TABLE_NAME, manifest_csv(records))
        if not (self.root / REVIEW_NAME).exists():
            write_file(self.root / REVIEW_NAME, empty_review(record.image for record in records))
        write_file(self.root / MANIFEST_NAME, manifest_json(start, records))
        return records

    def _report_revisions(self, records: Sequence[Record]) -> None:
        """Warn if a model was another one after an interruption: an unbroken run would have made other images."""
        for model in sorted({record.model for record in records if record.model}):
            revisions = sorted({str(record.revision) for record in records if record.model == model})
            if len(revisions) > 1:
                logger.warning(
                    "The images in `%s` were made with %d revisions of `%s`: %s. Fix one of them in the synthesizer's "
                    "settings, or synthesize again with --overwrite, to have all images of one model.",
                    self.root,
                    len(revisions),
                    model,
                    ", ".join(revisions),
                )

    def _record_path(self, index: int) -> Path:
        return self.root / RECORDS / f"{index:05d}.json"

    def _check_is_ours(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            msg = f"The output `{self.root}` is a file. Name a folder."
            raise ValueError(msg)
        if not self.root.is_dir() or (self.root / START_NAME).is_file():
            return
        # An interruption may have left empty folders, and a file that was being written.
        others = [
            path
            for path in self.root.iterdir()
            if not path.match(PARTIAL_FILES) and (path.name not in _FOLDERS or _holds_files(path))
        ]
        if others:
            msg = (
                f"The output folder `{self.root}` holds something else than synthetic images, such as "
                f"`{min(others).name}`. Name a folder that is empty or does not exist."
            )
            raise ValueError(msg)

    def _clear(self) -> None:
        """Remove what a synthesis writes, and nothing else; the first file stays until it is replaced.

        The review goes with its images: its decisions would be taken for decisions about the new ones.
        """
        for name in (MANIFEST_NAME, TABLE_NAME, REVIEW_NAME, PAGE_NAME, SHEET_NAME):
            (self.root / name).unlink(missing_ok=True)
        for name in reversed(_FOLDERS):
            if (self.root / name).is_dir():
                shutil.rmtree(self.root / name)

    def _check_same(self, before: dict[str, Any], start: dict[str, Any]) -> None:
        fix = "Give another --output, or --overwrite to remove the images that are there."
        if before["settings"] != start["settings"]:
            found = differences(before["settings"], start["settings"])
            more = f" and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
            msg = (
                f"The output folder `{self.root}` holds images of other settings: "
                f"{'; '.join(found[:_MOST_DIFFERENCES])}{more}. {fix}"
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
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name the entries of two nested values that differ, each with both of its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys: Sequence[str] = sorted({*before, *now})
        parts = [(f"{name}.{key}" if name else key, before.get(key), now.get(key)) for key in keys]
        return [line for key, old, new in parts for line in differences(old, new, key)]
    return [] if before == now else [f"`{name}` was {before!r} and is {now!r} now"]


def _holds_files(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
