"""ExDD with both banks against Anomalib's Patchcore with its one: fit, memory, throughput, latency.

    python benchmarks/end_to_end.py --root DATA --weights FILE --output NAME [--ratios 0.01 0.1] [--device cuda]

Both see the same images, backbone, weights, input size and coreset ratio; ExDD also learns from the defective images,
which Patchcore leaves out. Every measurement is a process of its own, the two alternate, and ratios are taken within a
repeat. Throughput and latency are those of the model alone (pre-processed test images in, scores and maps out); fit is
all of `Engine.fit`, loading and validation included. Peak memory is the process's, less what it held before the fit.
The same command goes on where it was interrupted.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from machine import describe, known_results, markdown_table, save_results

NAMES = ("patchcore", "exdd")
BATCH = 32
MEASURES = {
    "fit_seconds": ("fit, s", False),
    "peak_bytes": ("peak memory, MB", False),
    "images_per_second": (f"images / s, batch {BATCH}", True),
    "latency": ("latency, ms", False),
}
"""Measure -> its title, and whether more is better."""


def subset(root: Path, folder: Path, normal: int, defective: int) -> Path:
    """Link some training images and all test images into a folder of KSDD2's layout."""
    for split, counts in (("train", (normal, defective)), ("test", (10**9, 10**9))):
        (folder / split).mkdir(parents=True)
        taken = [0, 0]
        for image in sorted(path for path in (root / split).iterdir() if not path.stem.endswith("_GT")):
            mask = image.with_name(f"{image.stem}_GT.png")
            is_defective = mask_shows(mask)
            if taken[is_defective] < counts[is_defective]:
                taken[is_defective] += 1
                for path in (image, mask):
                    (folder / split / path.name).symlink_to(path.resolve())
    return folder


def mask_shows(path: Path) -> bool:
    """Tell whether a mask shows a defect."""
    from PIL import Image  # noqa: PLC0415

    with Image.open(path) as mask:
        return mask.convert("L").getbbox() is not None


def measure(name: str, ratio: float, options: argparse.Namespace) -> dict[str, float]:
    """Fit one model in this process and time it."""
    from anomalib_exdd import ExDD, register  # noqa: PLC0415  the children only
    from anomalib_exdd.comparison.config import ComparisonConfig, MethodConfig  # noqa: PLC0415
    from anomalib_exdd.comparison.data import build_data, without_defective_training_images  # noqa: PLC0415
    from anomalib_exdd.comparison.methods import build_model, resolve_method  # noqa: PLC0415
    from anomalib_exdd.comparison.worker import build_engine  # noqa: PLC0415
    from anomalib_exdd.models.exdd.boundary import LearntBoundary  # noqa: PLC0415
    from anomalib_exdd.models.exdd.training import BankBuilder  # noqa: PLC0415

    register()
    arguments = {
        "exdd": {"negative_ratio": ratio, "negative_minimum": 1, "pre_trained": options.weights is not None},
        "patchcore": {"coreset_sampling_ratio": ratio, "num_neighbors": 3},
    }
    method = MethodConfig(name, {"exdd": "ExDD", "patchcore": "Patchcore"}[name], arguments[name])
    described = {"root": str(options.root), "num_workers": 2, "val_split_ratio": 0.2}
    comparison = ComparisonConfig(
        {"class_path": "KSDD2", "init_args": described},
        [method],
        Path(),
        image_size=tuple(options.image_size),
        backbone=options.backbone,
        layers=["layer2", "layer3"],
        weights=options.weights,
    )
    run = resolve_method(method, comparison).run_settings(comparison, 0)
    model: Any = build_model(run)
    data = build_data(run["data"])
    if not run["uses_defects"]:
        without_defective_training_images(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calibration = Stopwatch(BankBuilder, "fill_calibration_set"), Stopwatch(ExDD, "calibrate")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build_engine(folder, "gpu" if options.device == "cuda" else "cpu").fit(model=model, datamodule=data)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    network = model.model.eval().to(options.device)
    tests = [data.test_data[index] for index in range(0, len(data.test_data), max(1, len(data.test_data) // BATCH))]
    images = data.test_data.collate_fn(tests[:BATCH]).image.to(options.device)
    batch = model.pre_processor.to(options.device)(images)
    entries = len(network.memory_bank) if name == "patchcore" else len(network.negative_bank)
    with torch.inference_mode():
        network(batch)  # the first builds what later ones need
        networks = Stopwatch(LearntBoundary, "forward")
        seconds_of_batches = [timed(network, batch, options.device) for _ in range(5)]
        throughput = len(batch) / statistics.median(seconds_of_batches)
        networks_share = networks.seconds / sum(seconds_of_batches)
        latency = statistics.median(timed(network, batch[i : i + 1], options.device) for i in range(len(batch)))
    return {
        "entries": entries,
        "fit_seconds": seconds,
        "calibration_seconds": sum(each.seconds for each in calibration),
        "peak_bytes": peak * 1024,
        "networks_share": networks_share,  # of inference: the learnt boundary and the refinement of the map
        "images_per_second": throughput,
        "latency": latency,
    }


class Stopwatch:
    """Adds up the seconds that calls of a method take."""

    def __init__(self, owner: type, name: str) -> None:
        self.seconds = 0.0
        method = getattr(owner, name)

        def measured(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments, **keywords)
            self.seconds += time.perf_counter() - start
            return result

        setattr(owner, name, measured)


def timed(network: Any, batch: torch.Tensor, device: str) -> float:
    """Return the seconds that a batch takes."""
    start = time.perf_counter()
    network(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_a_process(name: str, ratio: float, root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Measure one model in a process of its own."""
    arguments = ["--root", root, "--backbone", options.backbone, "--device", options.device]
    arguments += [] if options.weights is None else ["--weights", options.weights]
    arguments += ["--image-size", *options.image_size, "--child", name, "--ratios", ratio]
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:10s} ratio {ratio}: {found}", flush=True)
    return found


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Summarise the repeats of every ratio: values of both, and how many times better ExDD is."""
    table = []
    for ratio in dict.fromkeys(result["ratio"] for result in results):
        repeats = [result for result in results if result["ratio"] == ratio]
        names = [name for name in NAMES if name in repeats[0]]
        for key, (title, more_is_better) in MEASURES.items():
            scale = {"peak_bytes": 1e-6, "latency": 1e3}.get(key, 1.0)
            values = {name: [scale * result[name][key] for result in repeats] for name in names}
            row = {"bank": f"{repeats[0]['exdd']['entries']:,.0f}", "measure": title}
            row |= {name: f"{statistics.median(values[name]):.1f}" for name in names}
            if len(names) > 1:
                gains = [b / a if more_is_better else a / b for a, b in zip(*values.values(), strict=True)]
                row["times better"] = f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
            table.append(row)
    return table


def shares(results: list[dict[str, float]]) -> dict[str, str]:
    """State which share of the fit boundary and calibration take, and of inference the networks."""

    def percent(values: list[float]) -> str:
        return f"{100 * statistics.median(values):.1f} % ({100 * min(values):.1f} to {100 * max(values):.1f})"

    return {
        "boundary and calibration, of ExDD's fit": percent(
            [result["calibration_seconds"] / result["fit_seconds"] for result in results]
        ),
        "networks, of its inference": percent([result["networks_share"] for result in results]),
    }


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument(
        "--weights",
        type=Path,
        help="local weights; without, and with `--methods exdd`: random",
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[224, 224], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--normal", type=int, default=120, help="normal training images")
    parser.add_argument("--defective", type=int, default=20, help="defective training images, for ExDD alone")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.01, 0.1], help="coreset ratios")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="result file without ending")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.ratios[0], options)))
        return
    settings = {
        "data": f"{options.root.name}, {options.normal} normal and {options.defective} defective training images",
        "backbone": options.backbone,
        "image size": str(list(options.image_size)),
        "device": options.device,
    }
    results = known_results(options.output, settings)
    with tempfile.TemporaryDirectory() as folder:
        root = subset(options.root, Path(folder) / options.root.name, options.normal, options.defective)
        for ratio in options.ratios:
            for repeat in range(options.repeats):
                if any((result["ratio"], result["repeat"]) == (ratio, repeat) for result in results):
                    continue
                found = {name: in_a_process(name, ratio, root, options) for name in options.methods}
                results.append({"ratio": ratio, "repeat": repeat, **found})
                if options.output is not None:
                    write(options.output, settings, results)
    print(markdown_table(rows(results)))


def write(output: Path, settings: dict[str, str], results: list[dict[str, Any]]) -> None:
    """Write the results so far."""
    machine = describe()
    found = {**machine, **settings, **shares([result["exdd"] for result in results])}
    facts = "\n".join(f"- {name}: {value}" for name, value in found.items())
    page = f"# ExDD with both banks against Anomalib's Patchcore\n\n{markdown_table(rows(results))}\n\n{facts}\n"
    output.with_suffix(".md").write_text(page)
    save_results(output, settings, results)


if __name__ == "__main__":
    main()
