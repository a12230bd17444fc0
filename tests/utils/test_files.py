"""Files and folders are complete or absent, at every moment and with several writers."""

import hashlib
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anomalib_exdd.utils.files import (
    PARTIAL_FILES,
    sha256_of_file,
    write_atomically,
    write_file,
    write_folder_atomically,
)


@pytest.mark.parametrize("content", ["ä\r\nb\n", b"\x00\xff", ""])
def test_content_is_written_as_it_is(tmp_path: Path, content: str | bytes) -> None:
    write_file(tmp_path / "a.txt", content)
    assert (tmp_path / "a.txt").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with write_atomically(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path
        assert partial.suffix == ".csv"  # some libraries choose the format by it
        assert partial.match(PARTIAL_FILES)
        assert not path.match(PARTIAL_FILES)
    assert path.read_text() == "new"


def write_half(path: Path, error: type[BaseException]) -> None:
    with write_atomically(path) as partial:
        partial.write_text("half")
        raise error


def fill(path: Path, after: Callable[[], None]) -> None:
    with write_folder_atomically(path) as folder:
        (folder / "a.txt").write_text("a")
        after()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    for path in (tmp_path / "old", tmp_path / "new"):
        (tmp_path / "old").write_text("old")
        with pytest.raises(error):
            write_half(path, error)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "old")]


def test_a_file_that_nothing_was_written_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "a"):
        pass


def test_of_several_writers_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    contents = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_file(path, content), contents))
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "parent" / "folder"
    if exists:
        path.mkdir(parents=True)
    with write_folder_atomically(path) as folder:
        (folder / "a.txt").write_text("a")
        assert not (path / "a.txt").exists()
    assert (path / "a.txt").read_text() == "a"
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask


def test_an_interrupted_folder_is_not_there(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "folder", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder"

    def fill_first() -> None:
        path.mkdir()
        (path / "mine.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="filled by another process"):
        fill(path, fill_first)
    assert [child.name for child in tmp_path.rglob("*")] == ["folder", "mine.txt"]


@pytest.mark.parametrize("size", [0, 5, (1 << 20) + 3])
def test_hash_of_a_file(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
