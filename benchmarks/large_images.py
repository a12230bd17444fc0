"""Memory and time of scoring one large image, as a whole and in tiles, and how far tiles are from the whole.

    python benchmarks/large_images.py --output NAME [--size 2000 8000 --backbone resnet18 --weights FILE]

Every row is a process of its own, which makes the image up, fills both banks with random features and scores the image
once, from its pixels to the map. Memory is the largest that the process held, less what it held with the model and the
image in place; to read it takes Linux.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_exdd.models.exdd.boundary import HIDDEN, MAX_FOLDS, LearntBoundary
from anomalib_exdd.models.exdd.memory_bank import BankContent
from anomalib_exdd.models.exdd.torch_model import ExDDModel
from machine import describe, markdown_table, save_results
from memory import Peak

ENTRIES = 2000  # of each bank
TILINGS = [(None, 0), (512, 256), (1024, 256), (2000, 256), (1024, 128), (1024, 0)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Score the image once in this process, and compare the features at a seam with those of a strip without one."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = model_of(options, options.tile)
    image = surface(*options.size)
    peak = Peak()
    peak.reset()
    start = time.perf_counter()
    with torch.inference_mode():
        model.score_images(image)
    found = {"seconds": time.perf_counter() - start, "peak": peak.read(), "error": 0.0}
    if options.tile:
        strip = image[..., :512, : 2 * options.tile - options.overlap]  # two tiles wide
        with torch.inference_mode():
            whole = model_of(options, None).embed(strip)
            error = (model.embed(strip) - whole).norm(dim=1).max()
            found["error"] = float(error / (whole[..., 1:] - whole[..., :-1]).norm(dim=1).mean())
    return found


def model_of(options: argparse.Namespace, tile: int | None) -> ExDDModel:
    """Build a model as after training: full banks, a boundary and a refinement of the map."""
    tiles: dict[str, Any] = {"tile_size": tile, "tile_overlap": options.overlap}
    weights: dict[str, Any] = {"weights": options.weights, "pre_trained": False}
    model = ExDDModel(options.backbone, ["layer2", "layer3"], **weights, **tiles)
    with torch.inference_mode():
        features, fine = model.feature_extractor.extract(surface(64, 64))
    for bank in (model.negative_bank, model.positive_bank):
        nowhere = torch.zeros(ENTRIES, dtype=torch.int64)
        rows = torch.randn(ENTRIES, features.shape[1]) * features.std() + features.mean()
        bank.fill(BankContent(rows, nowhere, torch.zeros(ENTRIES, 2, dtype=torch.int64), ["made up"]))
    for network, inputs, folds in ((model.boundary, features, MAX_FOLDS), (model.refinement, fine, 2)):
        assert inputs is not None  # noqa: S101  ResNets have a fine layer
        fill(network, inputs.shape[1], folds)
    return model


def fill(network: LearntBoundary, inputs: int, folds: int) -> None:
    """Give a network random weights in the shapes that training gives it."""
    network.weight_in, network.bias_in = torch.randn(inputs, folds * HIDDEN) / inputs, torch.zeros(folds * HIDDEN)
    network.weight_out, network.bias_out = torch.randn(folds, HIDDEN), torch.zeros(folds)


def surface(height: int, width: int) -> torch.Tensor:
    """Make a rough surface up, float32, shape (1, 3, H, W)."""
    coarse = torch.rand(1, 1, height // 32 + 1, width // 32 + 1, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(coarse, size=(height, width), mode="bilinear").expand(1, 3, height, width).clone()
    return image.add_(torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(1)), alpha=0.1)


def row(result: dict[str, Any]) -> dict[str, str]:
    """Write a result as a row of the table."""
    tile = result["tile"]
    return {
        "tiles": "none" if tile is None else f"{tile} x {tile}",
        "overlap": "" if tile is None else str(result["overlap"]),
        "peak memory, GB": f"{result['peak'] / 1e9:.2f}",
        "seconds": f"{result['seconds']:.0f}",
        "largest error at seams": "" if tile is None else f"{result['error']:.5f}",
    }


def main() -> None:
    """Measure all tilings, and write down what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[2000, 8000], help="height and width of the image")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", type=Path, help="file of its weights; random by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="result file without ending")
    parser.add_argument("--tile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--overlap", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.overlap is not None:
        print(json.dumps(measure(options)))
        return
    results = []
    for tile, overlap in TILINGS:
        command = [sys.executable, *sys.argv, "--overlap", str(overlap), *(["--tile", str(tile)] if tile else [])]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append({"tile": tile, "overlap": overlap, **json.loads(output.splitlines()[-1])})
        print(row(results[-1]), flush=True)
    settings = {
        "image": f"{options.size[0]} x {options.size[1]}",
        "backbone": f"{options.backbone}, {'random' if options.weights is None else options.weights.name}",
        "banks": f"{ENTRIES:,} / {ENTRIES:,} entries, made up",
        "threads used": options.threads,
        "error": "distance of a patch's features from those without tiles / mean distance of neighbouring patches",
    }
    save_results(options.output, settings, results)
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    page = f"# One large image\n\n{markdown_table([row(result) for result in results])}\n\n{facts}\n"
    options.output.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
