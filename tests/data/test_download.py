import hashlib
import io
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anomalib_exdd.data import KSDD2, download, ksdd2
from anomalib_exdd.data.download import Archive

COUNTS = {"train": (5, 3), "test": (2, 1)}


def zip_of(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


@pytest.fixture
def published(make_ksdd2: Callable[..., Path], file_server: Any, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """A small data set on a local server in the place of the official one."""
    source = make_ksdd2("source", *COUNTS.values())
    file_server.content = zip_of(source)
    shutil.rmtree(source)
    archive = Archive(
        name="KSDD2",
        url=file_server.url,
        hashsum=hashlib.sha256(file_server.content).hexdigest(),
        filename="KolektorSDD2.zip",
        num_bytes=len(file_server.content),
        licence="CC BY-NC-SA 4.0",
    )
    monkeypatch.setattr(ksdd2, "KSDD2_ARCHIVE", archive)
    return archive


def assert_complete(root: Path) -> None:
    data = KSDD2(root, num_workers=0)
    data.setup()
    assert len(data.train_data) + len(data.val_data) == 8
    assert len(data.test_data) == 3


def save_archive(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    path = folder / "KolektorSDD2.zip"
    path.write_bytes(content)
    return path


def neighbours(root: Path) -> list[str]:
    return sorted(path.name for path in root.parent.iterdir())


def test_downloads_into_a_missing_folder(published: Archive, tmp_path: Path) -> None:
    root = tmp_path / "a" / "KSDD2"
    KSDD2(root).prepare_data()

    assert_complete(root)
    assert neighbours(root) == ["KSDD2"], "archive and temporary folder are gone"
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


@pytest.mark.parametrize(("is_there", "state"), [(False, "does not exist"), (True, "is empty")])
def test_download_is_announced_with_the_way_to_stop_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_there: bool, state: str
) -> None:
    def stop(*_arguments: Any, **_settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "urlopen", stop)
    monkeypatch.chdir(tmp_path)
    if is_there:
        Path("KSDDD2").mkdir()
    with pytest.raises(KeyboardInterrupt):
        KSDD2("KSDDD2").prepare_data()

    root = tmp_path.resolve() / "KSDDD2"
    announcement = (
        f"The folder `{root}` {state}, so KSDD2 (853 MB, licence CC BY-NC-SA 4.0 (no commercial use)) is downloaded to "
        "it now. If you meant another folder, stop with Ctrl+C, set `root` to that folder, and delete "
        f"`{root.parent / 'KolektorSDD2.zip.part'}`, which holds what has arrived."
    )
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [announcement]
    assert root.exists() == is_there


def test_downloads_into_an_empty_folder_behind_a_link(published: Archive, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "KSDD2"
    link.symlink_to(tmp_path / "disk")
    KSDD2(link).prepare_data()

    assert link.is_symlink()
    assert_complete(link)


def test_file_in_the_place_of_the_root(published: Archive, tmp_path: Path) -> None:
    (tmp_path / "KSDD2").write_text("x")
    data = KSDD2(tmp_path / "KSDD2")
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match="KSDD2` is a file"):
        data.setup()


def test_existing_data_are_left_alone(published: Archive, file_server: Any, make_ksdd2: Callable[..., Path]) -> None:
    root = make_ksdd2()
    before = sorted(root.rglob("*"))
    KSDD2(root).prepare_data()
    assert sorted(root.rglob("*")) == before
    assert file_server.requested_ranges == []


@pytest.mark.parametrize("inside", [True, False])
def test_own_archive_is_used_and_kept(
    published: Archive, file_server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, inside: bool
) -> None:
    root = tmp_path / "data" / "KSDD2"
    archive = save_archive(root if inside else root.parent, file_server.content)
    KSDD2(root).prepare_data()

    assert_complete(root)
    assert archive.read_bytes() == file_server.content
    assert file_server.requested_ranges == []
    assert f"KSDD2 (CC BY-NC-SA 4.0) is unpacked from `{archive.resolve()}`" in caplog.text
    assert "Ctrl+C" not in caplog.text, "nothing is downloaded"


@pytest.mark.parametrize("inside", [True, False])
def test_own_archive_with_another_hash_is_refused(
    published: Archive, file_server: Any, tmp_path: Path, inside: bool
) -> None:
    root = tmp_path / "data" / "KSDD2"
    archive = save_archive(root if inside else root.parent, file_server.content + b"x")
    with pytest.raises(ValueError, match=rf"KolektorSDD2\.zip` .*is not the published.*SHA-256 {published.hashsum}"):
        KSDD2(root).prepare_data()

    assert not (root / "train").exists()
    assert archive.exists()


def test_offline(published: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(published, "url", "http://127.0.0.1:9/archive.zip")
    with pytest.raises(ConnectionError) as raised:
        KSDD2(tmp_path / "KSDD2").prepare_data()
    message = str(raised.value)
    assert "To do it by hand, download http://127.0.0.1:9/archive.zip" in message
    assert str(tmp_path / "KolektorSDD2.zip") in message
    assert published.hashsum in message
    assert not (tmp_path / "KSDD2").exists()


def test_what_has_arrived_is_kept_for_the_next_start(published: Archive, file_server: Any, tmp_path: Path) -> None:
    root = tmp_path / "KSDD2"
    file_server.breaks_after = [1000, 700]
    for arrived in (1000, 1700):
        with pytest.raises(ConnectionError, match=r"broke off.*kept.*put it, as it is, at `.*KolektorSDD2\.zip`"):
            KSDD2(root).prepare_data()
        assert not root.exists()
        assert (tmp_path / "KolektorSDD2.zip.part").stat().st_size == arrived

    KSDD2(root).prepare_data()
    assert_complete(root)
    assert file_server.requested_ranges == [None, "bytes=1000-", "bytes=1700-"]
    assert neighbours(root) == ["KSDD2"]


def test_server_without_ranges_starts_anew(published: Archive, file_server: Any, tmp_path: Path) -> None:
    file_server.supports_ranges = False
    (tmp_path / "KolektorSDD2.zip.part").write_bytes(b"x" * 1000)
    KSDD2(tmp_path / "KSDD2").prepare_data()
    assert_complete(tmp_path / "KSDD2")


@pytest.mark.parametrize("change", [lambda content: content[:-1] + b"x", lambda content: content + b"x" * 2000])
def test_another_file_than_the_published_is_refused(
    published: Archive, file_server: Any, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    correct, file_server.content = file_server.content, change(file_server.content)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"zip\.part` .*is not the published archive of KSDD2\. Delete it"):
            KSDD2(tmp_path / "KSDD2").prepare_data()
        assert [path.name for path in tmp_path.iterdir()] == ["KolektorSDD2.zip.part"]

    (tmp_path / "KolektorSDD2.zip.part").unlink()
    file_server.content = correct
    KSDD2(tmp_path / "KSDD2").prepare_data()
    assert_complete(tmp_path / "KSDD2")


def test_interrupted_unpacking_leaves_no_folder(
    published: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(_archive: zipfile.ZipFile, folder: Path) -> None:
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "extractall", interrupt)
    with pytest.raises(KeyboardInterrupt):
        KSDD2(tmp_path / "KSDD2").prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == ["KolektorSDD2.zip.part"]
