"""How time and memory grow with images, resolution and bank.

    python benchmarks/growth.py --root DATA --weights FILE --output NAME [--figure FILE]

Trains ExDD with a ResNet-18, each time in a process of its own: at one resolution with more and more normal images, and
with the same images at more and more pixels. The slopes are exponents: time ~ size ^ slope between the two largest.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from end_to_end import in_a_process, subset
from machine import describe, known_results, markdown_table, save_results

IMAGES = (70, 140, 280, 560)  # of 2212 patches, a fifth of them kept for validation: up to a million
SIDES = (224, 320, 448, 640)
PIXELS = (632, 224)
MEASURES = {"fit_seconds": "fit, s", "peak_bytes": "peak memory, MB", "latency": "latency, ms", "entries": "bank"}
SCALES = {"peak_bytes": 1e-6, "latency": 1e3}


def patches(result: dict[str, Any]) -> int:
    """Return the number of normal patches of a training."""
    height, width = result["size"]
    return round(0.8 * result["normal"]) * (height // 8) * (width // 8)


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Format the trainings of one series, with the slopes between the last two."""
    table = [
        {
            "normal images": str(result["normal"]),
            "pixels": "{} x {}".format(*result["size"]),
            "patches": f"{patches(result):,}",
            **{title: f"{SCALES.get(key, 1) * result[key]:,.0f}" for key, title in MEASURES.items()},
        }
        for result in results
    ]
    if len(results) > 1:
        before, last = results[-2:]
        growth = math.log(patches(last) / patches(before))
        slopes = {title: f"{math.log(last[key] / before[key]) / growth:.2f}" for key, title in MEASURES.items()}
        table.append({"normal images": "slope", "pixels": "", "patches": "1", **slopes})
    return table


def figure(series: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw fit, memory and latency over the patches of a training."""
    keys = ("fit_seconds", "peak_bytes", "latency")
    _, axes = plt.subplots(1, len(keys), figsize=(12, 3.6), layout="constrained")
    for axis, key in zip(axes, keys, strict=True):
        for name, results in series.items():
            values = [SCALES.get(key, 1) * result[key] for result in results]
            axis.loglog([patches(result) for result in results], values, marker="o", label=name)
        axis.set(xlabel="normal patches", title=MEASURES[key])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend()
    plt.savefig(path, dpi=110)


def main() -> None:
    """Run the trainings and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--ratio", type=float, default=0.01, help="coreset ratio")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    parser.add_argument("--figure", type=Path, help="picture of the curves")
    options = parser.parse_args()
    options.backbone, options.device = "resnet18", "cpu"
    jobs = [("images", normal, PIXELS) for normal in IMAGES] + [("resolution", 120, (side, side)) for side in SIDES]
    settings = {"data": options.root.name, "backbone": options.backbone, "coreset ratio": options.ratio}
    results = known_results(options.output, settings)
    for name, normal, size in jobs[len(results) :]:
        with tempfile.TemporaryDirectory() as folder:
            root = subset(options.root, Path(folder) / options.root.name, normal, 20)
            options.image_size = size
            found = in_a_process("exdd", options.ratio, root, options)
        results.append({"series": name, "normal": normal, "size": list(size), **found})
        save_results(options.output, settings, results)
    series = {name: [result for result in results if result["series"] == name] for name in ("images", "resolution")}
    tables = "\n\n".join(f"## More {name}\n\n{markdown_table(rows(found))}" for name, found in series.items())
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    options.output.with_suffix(".md").write_text(f"# Growth of time and memory\n\n{tables}\n\n{facts}\n")
    print(tables)
    if options.figure is not None:
        figure(series, options.figure)


if __name__ == "__main__":
    main()
