"""Downloading and unpacking a data set so that a folder is either complete or not there at all.

Anomalib's own helper checks the hash of a fresh download only, and extracts into the final folder: an archive that lies
there already is trusted, and an interrupted extraction looks like a data set. Here the hash is always checked, and the
archive is unpacked beside its place.
"""

from __future__ import annotations

import glob
import http.client
import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from anomalib.data.utils import DownloadInfo
from tqdm import tqdm

from anomalib_exdd.utils.files import sha256_of_file, write_folder_atomically

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
_ATTEMPTS = 3
_TIMEOUT_SECONDS = 30
_UNPACKED_RATIO = 1.05  # images hardly compress: an archive unpacks to little more than its own size
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass
class Archive(DownloadInfo):  # type: ignore[misc]
    """A published zip archive; ``hashsum`` is its SHA-256."""

    md5: str = ""  # for those who check it by hand
    num_bytes: int = 0
    licence: str = ""

    @property
    def file_name(self) -> str:
        """File name of the archive."""
        return str(self.filename or self.url.rsplit("/", maxsplit=1)[-1])

    def by_hand(self, root: Path) -> str:
        """Tell how to get the archive for the folder ``root`` without this program, for messages."""
        return (
            f"To do it by hand, download {self.url} on any machine and put it, as it is, at "
            f"`{root.parent / self.file_name}` (SHA-256 {self.hashsum}, MD5 {self.md5}, {self.num_bytes} bytes)."
        )


def fetch_folder(archive: Archive, root: Path, check: Callable[[Path], None]) -> None:
    """Download, verify and unpack an archive, so that ``root`` appears only when it is complete.

    An archive that lies in the root or beside it is used, after its hash has been checked, and kept; one that was
    downloaded here is deleted afterwards. A broken-off download is kept as ``*.part`` and resumed next time.

    Args:
        archive: What to fetch.
        root: Folder to create; it must not exist, or be empty but for the archive.
        check: Called with the unpacked folder before it is renamed; raises if something is missing.

    Raises:
        ConnectionError: If the download fails.
        OSError: If the disk is too small.
        ValueError: If the archive is not the published one, or cannot be unpacked.
    """
    root = Path(os.path.realpath(root))  # a link to an empty disk stays a link
    root.parent.mkdir(parents=True, exist_ok=True)
    found = [path for path in (root / archive.file_name, root.parent / archive.file_name) if path.is_file()]
    for left in root.parent.glob(f"{glob.escape(root.name)}.partial-*"):
        logger.warning("`%s` may be what a killed run has left. If no other run is unpacking, delete it.", left)
    if found:
        _verify(archive, found[0], root)
    still_to_come = 0 if found else archive.num_bytes - _size(_partial_path(archive, root))
    _check_disk_space(archive, root, still_to_come + int(archive.num_bytes * _UNPACKED_RATIO))
    _announce(archive, root, found)
    path = found[0] if found else download(archive, root)
    with write_folder_atomically(root) as unpacked:
        unpack(path, unpacked)
        check(unpacked)
        others = [other.name for other in root.iterdir() if other != path] if root.is_dir() else []
        if others:
            msg = (
                f"While the data set was unpacked, `{others[0]}` appeared in `{root}`. Start again, or remove it first."
            )
            raise FileExistsError(msg)
        if path.parent == root:
            path.replace(unpacked / path.name)
    if not found:
        path.unlink()


def download(archive: Archive, root: Path) -> Path:
    """Download an archive beside the folder ``root``, resuming what an earlier attempt left; return its path.

    Raises:
        ConnectionError: If the server cannot be reached, or breaks off too often.
        ValueError: If the server sends another file than the published one.
    """
    target, part = root.parent / archive.file_name, _partial_path(archive, root)
    resumed = _size(part) > 0
    for _ in range(_ATTEMPTS):
        before = _size(part)
        try:
            transfer(archive, part)
        except _NETWORK_ERRORS as error:
            if _size(part) > before:
                continue  # something arrived: ask for the rest
            msg = f"{archive.name} cannot be downloaded from {archive.url} ({error}). {archive.by_hand(root)}"
            raise ConnectionError(msg) from error
        if _size(part) < archive.num_bytes:
            continue  # the server broke off
        if _size(part) == archive.num_bytes and sha256_of_file(part) == archive.hashsum:
            part.replace(target)
            return target
        part.unlink()
        if not resumed:
            msg = (
                f"The server at {archive.url} sent another file than the published {archive.name}: its size or its "
                f"SHA-256 differ. {archive.by_hand(root)}"
            )
            raise ValueError(msg)
        resumed = False  # the old beginning may not have belonged to this file: once more from zero
    msg = (
        f"The download of {archive.name} from {archive.url} broke off {_ATTEMPTS} times. What has arrived is kept: "
        f"start again to go on from there. {archive.by_hand(root)}"
    )
    raise ConnectionError(msg)


def transfer(archive: Archive, part: Path) -> None:
    """Write what the server sends to the partial file, from where that file ends if the server can do so."""
    if not archive.url.startswith(("https://", "http://")):
        msg = f"The address of {archive.name} has to start with https:// or http://, but it is {archive.url}."
        raise ValueError(msg)
    start = _size(part)
    if start >= archive.num_bytes:
        return  # all there; the caller checks the hash
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(archive.url, headers=headers)  # noqa: S310 (checked above)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server sends the whole file
        bar = tqdm(desc=archive.name, total=archive.num_bytes, initial=start, unit="B", unit_scale=True, miniters=1)
        with bar, part.open("ab" if start else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > archive.num_bytes:
                    return  # too long already; the caller refuses it


def unpack(path: Path, folder: Path) -> None:
    """Unpack a verified zip archive into an existing folder."""
    try:
        with ZipFile(path) as archive:
            archive.extractall(folder)
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        msg = f"The archive `{path}` cannot be unpacked ({error}). Delete it, and it is downloaded anew."
        raise ValueError(msg) from error


def _verify(archive: Archive, path: Path, root: Path) -> None:
    found = sha256_of_file(path)
    if found != archive.hashsum:
        msg = (
            f"The file `{path}` ({path.stat().st_size} bytes, SHA-256 {found}) is not the published archive of "
            f"{archive.name} ({archive.num_bytes} bytes, SHA-256 {archive.hashsum}). Delete it, and it is downloaded "
            f"anew. {archive.by_hand(root)}"
        )
        raise ValueError(msg)


def _partial_path(archive: Archive, root: Path) -> Path:
    return root.parent / f"{archive.file_name}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _announce(archive: Archive, root: Path, found: list[Path]) -> None:
    """Log what happens now, under which licence, and before a download how to stop it."""
    if found:
        logger.info("%s (%s) is unpacked from `%s` to `%s`.", archive.name, archive.licence, found[0], root)
        return
    # A warning, because Python shows nothing below it by default, and the folder may be a typing error.
    logger.warning(
        "The folder `%s` %s, so %s (%.0f MB) is downloaded to it now. Its licence is %s. If you meant another folder, "
        "stop with Ctrl+C, set `root` to that folder, and delete `%s`, which holds what has arrived.",
        root,
        "is empty" if root.is_dir() else "does not exist",
        archive.name,
        archive.num_bytes / 1e6,
        archive.licence,
        _partial_path(archive, root),
    )


def _check_disk_space(archive: Archive, root: Path, needed: int) -> None:
    free = shutil.disk_usage(root.parent).free
    if free < needed:
        msg = (
            f"Downloading and unpacking {archive.name} at `{root.parent}` needs {needed / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB are free. Make room, or choose another `root`."
        )
        raise OSError(msg)
