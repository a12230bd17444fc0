"""How fast `POST /predict` of `anomalib review` answers, with one client and several at once, on this machine.

    python benchmarks/load.py --data FOLDER --weights FILE --output NAME

FOLDER is a set in KSDD2's layout. A model is trained on it, `anomalib review` serves it in a process of its own, and
clients send its test images. Memory is that of the server's process; answers are compared with `predictions.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from anomalib.engine import Engine

from anomalib_exdd import KSDD2, ExDD
from evidence import IMAGE_SIZES
from machine import describe, markdown_table

CLIENTS = (1, 4, 16, 16)  # twice: memory must not go on growing
REQUESTS = 300
PORT = 7871


def memory(process: int) -> float:
    """Return the memory of a process in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def send(client: httpx.Client, path: Path) -> tuple[float, dict[str, Any]]:
    """Send an image; return seconds and answer."""
    start = time.perf_counter()
    answer = client.post("/predict", files={"image": (path.name, path.read_bytes())})
    answer.raise_for_status()
    return time.perf_counter() - start, answer.json()


def train(data: Path, weights: Path, root: Path) -> tuple[Path, dict[str, Any]]:
    """Train a model and predict the test images; return its checkpoint and the rows of `predictions.json` by name."""
    model = ExDD(backbone="resnet18", weights=weights, image_size=IMAGE_SIZES[data.name], visualizer=False)
    engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, logger=False)
    engine.fit(model=model, datamodule=KSDD2(data, num_workers=0))
    engine.predict(model=model, data_path=data / "test", return_predictions=False)
    (table,) = root.rglob("predictions.json")
    rows = json.loads(table.read_text())["predictions"]
    return Path(str(engine.best_model_path)), {Path(row["path"]).name: row for row in rows}


def measure(client: httpx.Client, clients: int, paths: list[Path], process: int) -> tuple[dict[str, str], list[Any]]:
    """Send images from several clients at once; return the figures and the answers."""
    before, start = memory(process), time.perf_counter()
    with ThreadPoolExecutor(clients) as executor:
        answers = list(executor.map(send, [client] * len(paths), paths))
    seconds = time.perf_counter() - start
    waits = np.quantile([each for each, _ in answers], [0.5, 0.95])
    row = {
        "clients": str(clients),
        "images per second": f"{len(paths) / seconds:.1f}",
        "median, ms": f"{1000 * waits[0]:.0f}",
        "95 %, ms": f"{1000 * waits[1]:.0f}",
        "memory before, MB": f"{before:.0f}",
        "after, MB": f"{memory(process):.0f}",
    }
    return row, [answer for _, answer in answers]


def main() -> None:
    """Train, serve, send, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a set in KSDD2's layout")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    options = parser.parse_args()
    rows, different = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, expected = train(options.data, options.weights, Path(temporary))
        command = ["review", "--ckpt_path", str(checkpoint), "--record", f"{temporary}/record.db", "--port", str(PORT)]
        script = "from anomalib_exdd.cli import main; main()"
        server = subprocess.Popen([sys.executable, "-c", script, *command])
        paths = [options.data / "test" / name for name in expected]
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as client:
                while True:
                    try:
                        send(client, paths[0])
                        break
                    except httpx.ConnectError:
                        time.sleep(1)
                sent = [paths[number % len(paths)] for number in range(REQUESTS)]
                for clients in CLIENTS:
                    row, answers = measure(client, clients, sent, server.pid)
                    rows.append(row)
                    for path, answer in zip(sent, answers, strict=True):
                        wanted = expected[path.name]
                        different += any(answer[name] != wanted[name] for name in wanted.keys() - {"path", "seconds"})
        finally:
            server.terminate()
            server.wait()
    settings = {"set": options.data.name, "requests": REQUESTS, "answers unlike predictions.json": different}
    content = {"machine": describe(), "settings": settings, "results": rows}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    text = f"# `POST /predict` under load\n\n{markdown_table(rows)}\n\n{facts}\n"
    options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
