"""Downloading and unpacking a data set so that a folder is either complete or not there at all.

Anomalib's own helper checks the hash of a fresh download only, and extracts into the final folder, where an interrupted
extraction looks like a data set.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen
from zipfile import ZipFile

from tqdm import tqdm

from anomalib_exdd.utils.files import sha256_of_file, write_folder_atomically

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 30


@dataclass
class Archive:
    """A published zip archive; ``hashsum`` is its SHA-256."""

    name: str
    url: str
    hashsum: str
    filename: str
    num_bytes: int
    licence: str

    def by_hand(self, root: Path) -> str:
        """Tell how to get the archive for the folder ``root`` without this program, for messages."""
        return (
            f"To do it by hand, download {self.url} on any machine and put it, as it is, at "
            f"`{root.parent / self.filename}` (SHA-256 {self.hashsum}, {self.num_bytes} bytes)."
        )


def fetch_folder(archive: Archive, root: Path) -> None:
    """Download, verify and unpack an archive, so that ``root`` appears only when it is complete.

    The root must not exist, or be empty but for the archive, which is used and kept there or beside the root. A
    broken-off download is kept as ``*.part`` beside the root and resumed next time.

    Raises:
        ConnectionError: If the download fails.
        ValueError: If the archive is not the published one.
    """
    root = Path(os.path.realpath(root))  # a link to an empty disk stays a link
    root.parent.mkdir(parents=True, exist_ok=True)
    own = [path for path in (root / archive.filename, root.parent / archive.filename) if path.is_file()]
    path = own[0] if own else root.parent / f"{archive.filename}.part"
    if own:
        logger.info("%s (%s) is unpacked from `%s` to `%s`.", archive.name, archive.licence, path, root)
    elif _size(path) < archive.num_bytes:
        _download(archive, root, path)
    if (found := sha256_of_file(path)) != archive.hashsum:
        msg = (
            f"The file `{path}` ({_size(path)} bytes, SHA-256 {found}) is not the published archive of {archive.name}. "
            f"Delete it, and it is downloaded anew. {archive.by_hand(root)}"
        )
        raise ValueError(msg)
    with write_folder_atomically(root) as unpacked:
        with ZipFile(path) as content:
            content.extractall(unpacked)
        if path.parent == root:
            path.replace(unpacked / path.name)
    if not own:
        path.unlink()


def _download(archive: Archive, root: Path, part: Path) -> None:
    """Write what the server sends to a partial file, from where that file ends if the server can do so."""
    # A warning, because Python shows nothing below it by default, and the folder may be a typing error.
    logger.warning(
        "The folder `%s` %s, so %s (%.0f MB, licence %s) is downloaded to it now. If you meant another folder, stop "
        "with Ctrl+C, set `root` to that folder, and delete `%s`, which holds what has arrived.",
        *(root, "is empty" if root.is_dir() else "does not exist"),
        *(archive.name, archive.num_bytes / 1e6, archive.licence, part),
    )
    start = _size(part)
    request = Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310 (a constant)
    reason = "the server broke off"
    try:
        with urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
            resumes = response.status == HTTPStatus.PARTIAL_CONTENT  # otherwise the server sends the whole file
            progress = {"desc": archive.name, "total": archive.num_bytes, "initial": start if resumes else 0}
            with part.open("ab" if resumes else "wb") as file, tqdm.wrapattr(response, "read", **progress) as stream:
                shutil.copyfileobj(stream, file)
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        reason = str(error)
    if _size(part) < archive.num_bytes:
        msg = (
            f"{archive.name} cannot be downloaded from {archive.url} ({reason}). What has arrived is kept: start again "
            f"to go on from there. {archive.by_hand(root)}"
        )
        raise ConnectionError(msg)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
