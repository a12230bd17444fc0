"""The page in a real browser, and `POST /predict` beside it."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the extra `station` is not installed")

import httpx
import uvicorn

from anomalib_exdd.commands.banks import load_checkpoint
from anomalib_exdd.models.callbacks.prediction_row import predict_file
from anomalib_exdd.station import server
from anomalib_exdd.station.station import Station
from browser import Browser

NUMBERS = range(20000, 20012)
Serve = Callable[..., tuple[str, Station]]


@pytest.fixture
def serve(trained: Path, tmp_path: Path) -> Iterator[Serve]:
    """Return a function that serves a station in a thread, and gives its address."""
    running = []

    def start(password: str | None = None) -> tuple[str, Station]:
        shutil.copy(trained, tmp_path / "model.ckpt")
        station = Station(tmp_path / "model.ckpt", tmp_path / "record.db")
        app = server.make_app(station, password)
        running.append(uvicorn.Server(uvicorn.Config(app, port=0, log_level="error")))
        thread = threading.Thread(target=running[-1].run, daemon=True)
        thread.start()
        while not running[-1].started:
            time.sleep(0.05)
        port = running[-1].servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}", station

    yield start
    for each in running:
        each.should_exit = True


def send(address: str, path: Path, **options: Any) -> httpx.Response:
    return httpx.post(f"{address}/predict", files={"image": (path.name, path.read_bytes())}, timeout=120, **options)


def test_clients_at_once_get_the_rows_of_the_command(serve: Serve, surfaces: Path) -> None:
    """The rows of `predict_file`, which are those of `predictions.json`: see the tests of predictions."""
    address, station = serve()
    paths = [surfaces / "test" / f"{number}.png" for number in NUMBERS]
    with ThreadPoolExecutor(8) as executor:
        answers = list(executor.map(lambda path: send(address, path), paths * 2))
    assert {answer.status_code for answer in answers} == {200}
    for path, answer in zip(paths * 2, answers, strict=True):
        row, expected = answer.json(), json.loads(json.dumps(predict_file(station.model, path)[0].to_dict()))
        assert row["path"].endswith(path.name)
        assert {k: v for k, v in row.items() if k not in {"path", "seconds"}} == {
            k: v for k, v in expected.items() if k not in {"path", "seconds"}
        }
    assert len(list(station.record.events("prediction"))) == 24


def test_bad_input_gets_a_clear_error(serve: Serve, surfaces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, station = serve()
    image = surfaces / "test" / "20000.png"
    broken = image.read_bytes()[:2000]
    post = f"{address}/predict"
    for request, status, message in (
        ({"files": {"image": ("broken.png", broken)}}, 400, "broken.png` cannot be decoded"),
        ({"files": {"photo": ("a.png", b"")}}, 400, "form field `image`"),
        ({"content": b"x"}, 400, "form field `image`"),
        ({"content": iter([b"x"])}, 411, "Content-Length"),
        ({"files": {"image": b"1", "more": b"2"}}, 400, "Too many files"),
    ):
        answer = httpx.post(post, **request)
        assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert not station.folder.exists() or not list(station.folder.iterdir())
    monkeypatch.setattr(server, "MOST_BYTES", 1000)
    assert send(address, image).status_code == 413


def test_who_comes_when_too_many_wait_is_told_so(serve: Serve, surfaces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_WAITING", 2)
    address, station = serve()
    image = surfaces / "test" / "20000.png"
    with ThreadPoolExecutor(6) as executor:
        with station.lock:
            answers = [executor.submit(send, address, image) for _ in range(6)]
            while sum(answer.done() for answer in answers) < 4:
                time.sleep(0.05)
        codes = sorted(answer.result().status_code for answer in answers)
    assert codes == [200, 200, 503, 503, 503, 503]


def test_with_a_password_page_and_interface_ask_for_it(serve: Serve, surfaces: Path) -> None:
    address, _ = serve("secret")
    image = surfaces / "test" / "20000.png"
    assert send(address, image).status_code == 401
    assert send(address, image, auth=("review", "guess")).status_code == 401
    assert send(address, image, auth=("review", "secret")).status_code == 200
    assert httpx.get(f"{address}/config").status_code == 401
    with httpx.Client(base_url=address) as client:
        assert client.post("/login", data={"username": "review", "password": "guess"}).status_code == 400
        assert client.post("/login", data={"username": "review", "password": "secret"}).status_code == 200
        assert client.get("/config").status_code == 200


def press(browser: Browser, name: str) -> None:
    browser.run(
        f"[...document.querySelectorAll('button')].find((each) => each.textContent.trim() === '{name}').click()"
    )


def text(browser: Browser, selector: str, part: str) -> str:
    texts = f"[...document.querySelectorAll('{selector}')].map((each) => each.innerText)"
    found: str = browser.wait_for(f"{texts}.find((each) => each.includes('{part}'))")
    return found


@pytest.mark.parametrize("width", [pytest.param(1280, id="desktop"), pytest.param(390, id="phone")])
def test_a_defect_is_confirmed_and_undone(browser: Browser, serve: Serve, surfaces: Path, width: int) -> None:
    address, station = serve()
    for number in NUMBERS:
        station.predict(surfaces / "test" / f"{number}.png")
    queue = station.queue()
    browser.open(address, width=width)
    text(browser, ".verdict", Path(queue[0].path).name)
    assert browser.run("document.documentElement.scrollWidth") == width
    browser.wait_for("[...document.images].length > 12 && [...document.images].every((each) => each.complete)")
    assert not [each for each in browser.requests() if not each.startswith((address, "blob:"))], "works offline"

    place, row = next((place, row) for place, row in enumerate(queue) if row.num_regions)
    browser.run(f"document.querySelectorAll('.grid-wrap button')[{place}].click()")
    shown = text(browser, ".verdict", Path(row.path).name)
    assert f"Probability of a defect {100 * (row.probability or 0):.1f} %" in shown
    assert str(row.decision).capitalize() in shown
    expected = [name for _, name in station.view(row.path).tiles]
    captions = "[...document.querySelectorAll('.tiles .caption-label')].map((each) => each.textContent.trim())"
    browser.wait_for(f"JSON.stringify({captions}) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")
    press(browser, "Defect")
    changed = text(browser, ".changed", "Training images whose")
    now = predict_file(load_checkpoint(station.checkpoint), Path(row.path))[0]
    assert f"{row.probability:.3f} → {now.probability:.3f}" in changed
    assert row.path in station.model.model.positive_bank.sources
    text(browser, ".verdict", Path(station.queue()[0].path).name)
    press(browser, "Undo")
    text(browser, ".changed", "Forget")
    assert row.path not in station.model.model.positive_bank.sources
    browser.run("[...document.querySelectorAll('button[role=tab]')].find((tab) => tab.innerText === 'Drift').click()")
    text(browser, ".prose", "Evidence of drift")


def test_what_is_painted_is_what_is_taught(browser: Browser, serve: Serve, surfaces: Path) -> None:
    address, station = serve()
    row = station.predict(surfaces / "test" / "20000.png")
    browser.open(address)
    text(browser, ".verdict", "20000.png")
    browser.wait_for("document.querySelector('canvas')?.getBoundingClientRect().width > 100")
    time.sleep(4)  # until the editor has drawn the image; it tells nobody when
    measure = "(({ x, y, width, height }) => [x, y, width, height])(%s.getBoundingClientRect())"
    left, top, across, down = browser.run(measure % "document.querySelector('canvas')")
    x, y = left + across / 2, top + down / 2
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    for kind, moved in (("mousePressed", 0), ("mouseMoved", 4), ("mouseMoved", 8), ("mouseReleased", 8)):
        time.sleep(0.3)  # as slow as a hand
        mouse = {"button": "left", "buttons": 1, "clickCount": 1}
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y + moved, **mouse)
    time.sleep(2)
    press(browser, "Defect")
    text(browser, ".changed", "Training images whose")
    bank = station.model.model.positive_bank
    position = bank.position[bank.source == bank.sources.index(row.path)].float()
    away = (position - position.new_tensor([316 / 2, 112 / 2])).abs().amax(dim=0)
    assert (away <= position.new_tensor([24, 16])).all(), "a brush's width around the middle of the image"


def test_dropped_images_are_predicted_and_recorded(browser: Browser, serve: Serve, surfaces: Path) -> None:
    address, station = serve()
    browser.open(address)
    text(browser, ".verdict", "Nothing to review")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    field = browser.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
    files = [str(surfaces / "test" / f"{number}.png") for number in (20000, 20003)]
    browser.call("DOM.setFileInputFiles", nodeId=field, files=files)
    text(browser, ".verdict", "Probability of a defect")
    assert len(station.queue()) == 2
    for row in station.queue():
        assert Path(row.path).parent == station.folder
    press(browser, "Not sure")
    text(browser, ".changed", "Recorded: not sure")
    assert [event.content["answer"] for event in station.record.events("answer")] == ["not sure"]
