"""Writing files and folders so that they are complete or absent, and hashing files.

Everything is written beside its place and renamed at the end: an interruption leaves what was there before.
"""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_FILES = ".*.partial*"
"""Pattern of the names of files that are being written, or that a killed process has left."""


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Give a hidden path of the same folder and suffix to write to; it becomes ``path`` at the end of the block."""
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically; text is encoded in UTF-8, its line feeds are kept as they are."""
    with write_atomically(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def write_folder_atomically(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes ``path``, which may be an empty folder, at the end of the block.

    Raises:
        FileExistsError: If another process has filled ``path`` by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.partial-", dir=path.parent) as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        try:
            if path.is_dir():
                path.rmdir()  # elsewhere than on POSIX it would be in the way
            folder.rename(path)
        except OSError as error:
            if not path.is_dir():
                raise
            msg = f"While the folder `{path}` was written, it was filled by another process. Remove it, or use it."
            raise FileExistsError(msg) from error


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
