"""How long does one image, or a batch, take: beside the features alone, Anomalib's Patchcore, and other work.

    python benchmarks/inference.py --root DATA [--weights FILE] --backbone resnet18 --image-size 632 224 --output NAME

One ExDD is trained at its default ratios; Anomalib's `PatchcoreModel` gets the same negative bank. All are timed in one
process, one after the other in every repeat, on pre-processed test images:

- `features`: the backbone and what makes patches of it, which no scoring can do without;
- `ExDD`: the whole model, two banks, boundary and map included;
- `Patchcore`: Anomalib's whole model, with the one bank;
- `noise`: ExDD on images of noise, unlike anything in the banks;
- `busy`: ExDD and the features beside a process that keeps as many threads busy with matrix products.

Without weights the networks are random: sizes and arithmetic are those of a trained one, but their features are closer
to each other, which makes the search of ExDD slower.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch import Tensor

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.comparison.worker import build_engine
from end_to_end import subset
from machine import describe, known_results, markdown_table, save_results

BUSY = "import torch; torch.set_num_threads({}); a = torch.randn(1024, 1024)\nwhile True: a @ a"


def seconds(work: Callable[[], Any]) -> float:
    """Time a piece of work."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def trained(options: argparse.Namespace) -> tuple[ExDD, Tensor]:
    """Train a model at its default ratios, and pre-process some test images."""
    size = (options.image_size[0], options.image_size[1])
    model = ExDD(backbone=options.backbone, weights=options.weights, pre_trained=bool(options.weights), image_size=size)
    with tempfile.TemporaryDirectory() as folder:
        root = subset(options.root, Path(folder) / "data", options.normal, options.defective)
        data = KSDD2(root, num_workers=2)
        build_engine(folder, "gpu" if options.device == "cuda" else "cpu").fit(model=model, datamodule=data)
        data.setup("test")
        tests = [data.test_data[row] for row in range(0, len(data.test_data), len(data.test_data) // options.batch)]
        images = data.test_data.collate_fn(tests[: options.batch]).image
    return model, model.pre_processor(images).to(options.device)


def measure(options: argparse.Namespace, size: int) -> list[dict[str, float]]:
    """Time everything with batches of one size."""
    model, images = trained(options)
    ours = model.model.eval().to(options.device)
    theirs = PatchcoreModel(["layer2", "layer3"], options.backbone, pre_trained=False).eval().to(options.device)
    theirs.memory_bank = ours.negative_bank.vectors
    batch = images[:size]
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0)).to(batch)
    works: dict[str, Callable[[], Any]] = {
        "features": lambda: ours.extract(batch),
        "ExDD": lambda: ours(batch),
        "Patchcore": lambda: theirs(batch),
        "noise": lambda: ours(noise),
    }
    banks = {"negative bank": len(ours.negative_bank), "positive bank": len(ours.positive_bank)}
    found: list[dict[str, float]] = [{} for _ in range(options.repeats)]
    with torch.inference_mode():
        for work in works.values():
            work()
        for result in found:
            result |= {"batch": size, **banks, **{name: seconds(work) for name, work in works.items()}}
        command = [sys.executable, "-c", BUSY.format(torch.get_num_threads())]
        with subprocess.Popen(command) as busy:
            time.sleep(5)
            for result in found:
                result |= {f"{name}, busy": seconds(works[name]) for name in ("features", "ExDD")}
            busy.kill()
    return found


def row(results: list[dict[str, float]]) -> dict[str, str]:
    """Summarise the repeats of a batch size: times an image, and ratios with their extremes."""

    def ratio(upper: str, lower: str) -> str:
        values = sorted(result[upper] / result[lower] for result in results)
        low, middle, high = values[len(values) // 10], statistics.median(values), values[-1 - len(values) // 10]
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    size = results[0]["batch"]
    table = {"batch": f"{size:.0f}", "banks": f"{results[0]['negative bank']:.0f} + {results[0]['positive bank']:.0f}"}
    for name in ("features", "ExDD", "Patchcore"):
        table[f"{name}, ms an image"] = f"{1e3 * statistics.median(result[name] for result in results) / size:.1f}"
    return table | {
        "ExDD / features": ratio("ExDD", "features"),
        "Patchcore / ExDD": ratio("Patchcore", "ExDD"),
        "noise / usual": ratio("noise", "ExDD"),
        "ExDD, busy / alone": ratio("ExDD, busy", "ExDD"),
        "features, busy / alone": ratio("features, busy", "features"),
    }


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, help="local weights; without: random")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[632, 224], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--normal", type=int, default=120, help="normal training images")
    parser.add_argument("--defective", type=int, default=20, help="defective training images")
    parser.add_argument("--batch", type=int, default=32, help="images of the larger batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    options = parser.parse_args()
    settings = {
        "data": f"{options.root.name}, {options.normal} normal and {options.defective} defective training images",
        "backbone": options.backbone + ("" if options.weights else ", random"),
        "image size": str(list(options.image_size)),
        "device": options.device,
        "repeats": f"{options.repeats}; ratios within a repeat: median (10 % to 90 %)",
    }
    results = known_results(options.output, settings)
    for size in (1, options.batch):
        if all(result["batch"] != size for result in results):
            results += measure(options, size)
            save_results(options.output, settings, results)
    table = markdown_table([row([r for r in results if r["batch"] == size]) for size in (1, options.batch)])
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    options.output.with_suffix(".md").write_text(f"# Time of inference\n\n{table}\n\n{facts}\n")
    print(table)


if __name__ == "__main__":
    main()
