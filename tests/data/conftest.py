"""Tiny made-up images in the layouts that the data modules read."""

import http.server
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from made_up_images import labels_of, save_image, save_mask, save_pairs


@pytest.fixture
def make_ksdd2(tmp_path: Path) -> Callable[..., Path]:
    """Build a folder in KSDD2's layout."""

    def make(
        name: str = "KSDD2",
        train: tuple[int, int] = (12, 6),
        test: tuple[int, int] = (3, 2),
    ) -> Path:
        root = tmp_path / name
        save_pairs(root / "train", 10000, labels_of(*train))
        save_pairs(root / "test", 20000, labels_of(*test))
        return root

    return make


@pytest.fixture
def write_split() -> Callable[..., Path]:
    """Write a `split_weakly_N.pyb` file that releases the first defective training images."""

    def write(root: Path, number: int, released: int | None = None) -> Path:
        count = number if released is None else released
        train, test = [], []
        for path in sorted((root / "train").glob("?????.png")):
            mask = Image.open(path.with_name(f"{path.stem}_GT.png"))
            is_defect = mask.getbbox() is not None
            # Like the published files, which also mark normal images.
            train.append((int(path.stem), count > 0 if is_defect else True))
            count -= is_defect
        test.extend((int(path.stem), True) for path in sorted((root / "test").glob("?????.png")))
        path = root / f"split_weakly_{number}.pyb"
        path.write_bytes(pickle.dumps((train, test)))
        return path

    return write


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Normal and defective images in folders of their own, with masks `<name>_mask.png`."""
    root = tmp_path / "parts"
    for number in range(10):
        save_image(root / "good" / f"g{number}.png")
    for number in range(6):
        save_image(root / "bad" / f"b{number}.jpg")
        save_mask(root / "masks" / f"b{number}_mask.png", defect=True)
    return root


@dataclass
class FileServer:
    """What a local server sends, and what it was asked for."""

    content: bytes = b""
    url: str = ""
    supports_ranges: bool = True
    breaks_after: list[int] = field(default_factory=list)  # bytes sent per request before the connection is cut
    requested_ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """Serve one file on this machine, with ranges and with connections that break off."""
    state = FileServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requested_ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.supports_ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(state.content) - start))
            self.end_headers()
            limit = state.breaks_after.pop(0) if state.breaks_after else len(state.content)
            self.wfile.write(state.content[start:][:limit])

        def log_message(self, *_args: object) -> None:
            """Keep quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/archive.zip"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    """Let the package's messages reach `caplog`, whatever other tests have set."""
    caplog.set_level(logging.INFO, logger="anomalib_exdd")
