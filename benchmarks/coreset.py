"""Speed of the coreset selection against Anomalib's: the same points, the same dimension, the same start.

    python benchmarks/coreset.py --output NAME [--figure FILE] [--features FILE.pt] [--device cuda]

Runs of the two alternate, and ratios are taken within a repeat. Without `--features` the points are made up: clusters
of low intrinsic dimension, as patch features are. Both selections are compared: the same set, or the same radius at
ties. `--largest` adds a run of ours alone, where Anomalib's would take hours. `--figure` draws the cost against N.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from anomalib.models.components.sampling import KCenterGreedy
from torch import Tensor

from anomalib_exdd.coreset import greedy_k_center
from features import made_up
from machine import describe, markdown_table


def anomalibs(points_ND: Tensor, count: int, first: int) -> list[int]:
    """Select with Anomalib's loop, without its projection and from a given start."""
    selection = KCenterGreedy(points_ND, (count + 0.5) / len(points_ND))
    start = torch.tensor([first], device=points_ND.device)
    with (
        patch.object(selection.model, "fit"),
        patch.object(selection.model, "transform", lambda embedding: embedding),
        patch("torch.randint", return_value=start),
    ):
        found: list[int] = selection.select_coreset_idxs()
    return found


def radius(points_ND: Tensor, chosen: list[int]) -> float:
    """Return the distance of the farthest point to its nearest centre, by direct differences."""
    centres = points_ND[torch.tensor(chosen, device=points_ND.device)]
    rows = max(1, (1 << 24) // len(centres))
    return max(
        float(torch.cdist(block, centres, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).max())
        for block in points_ND.split(rows)
    )


def timed(device: str, function: Any, *arguments: Any, **named: Any) -> tuple[Any, float]:
    """Return a function's result and the seconds it took."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*arguments, **named)
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def compare(points_ND: Tensor, share: float, repeats: int, device: str) -> dict[str, Any]:
    """Run both on the same points; return seconds, ratios and whether they agree."""
    count = round(share * len(points_ND))
    first = int(np.random.default_rng(0).integers(len(points_ND)))
    ours: list[float] = []
    theirs: list[float] = []
    chosen: list[int] = []
    their_choice: list[int] = []
    for _ in range(repeats):
        selected, seconds = timed(device, greedy_k_center, points_ND, count, seed=0)
        chosen = selected.tolist()
        ours.append(seconds)
        their_choice, seconds = timed(device, anomalibs, points_ND, count, first)
        theirs.append(seconds)
        print(f"N {len(points_ND)}, k {count}: ours {ours[-1]:.2f} s, Anomalib's {seconds:.1f} s", flush=True)
    radii = radius(points_ND, chosen), radius(points_ND, their_choice)
    return {
        "points": len(points_ND),
        "dimension": points_ND.shape[1],
        "centres": count,
        "ours": ours,
        "anomalib": theirs,
        "common": len(set(chosen) & set(their_choice)) / count,
        "radius_ratio": radii[0] / radii[1],
    }


def row(result: dict[str, Any]) -> dict[str, str]:
    """Format one result."""
    ours, theirs = result["ours"], result["anomalib"]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)] if theirs else []
    return {
        "points": f"{result['points']:,}",
        "dimension": str(result["dimension"]),
        "centres": f"{result['centres']:,}",
        "ours, s": f"{statistics.median(ours):.2f} ({min(ours):.2f} to {max(ours):.2f})",
        "Anomalib, s": f"{statistics.median(theirs):.1f}" if theirs else "not run",
        "times faster": f"{statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})" if ratios else "",
        "same choices": f"{100 * result['common']:.2f} %" if theirs else "",
        "radius, ours / theirs": f"{result['radius_ratio']:.6f}" if theirs else "",
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds against the number of points."""
    import matplotlib as mpl  # noqa: PLC0415  for this only

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("anomalib", "Anomalib's KCenterGreedy"), ("ours", "anomalib-exdd")):
        known = [result for result in results if result[name]]
        seconds = [statistics.median(result[name]) for result in known]
        axes.plot([result["points"] for result in known], seconds, "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="points N (1 % of them selected)", ylabel="seconds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 40_000, 160_000], help="numbers of points")
    parser.add_argument("--dimension", type=int, default=128, help="of made-up points")
    parser.add_argument("--features", type=Path, help="tensor of shape (N, D) instead, saved by torch.save")
    parser.add_argument("--share", type=float, default=0.01, help="share of the points to select")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest", type=int, default=1_000_000, help="points of a run of ours alone; 0 for none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    parser.add_argument("--figure", type=Path, help="picture of the seconds against N")
    options = parser.parse_args()
    results = []
    given = None if options.features is None else torch.load(options.features, weights_only=True).to(options.device)
    greedy_k_center(made_up(5000, options.dimension, options.device), 50)  # warm up
    for size in options.sizes:
        points = made_up(size, options.dimension, options.device) if given is None else given[:size].contiguous()
        results.append(compare(points, options.share, options.repeats, options.device))
    if options.largest:
        points = made_up(options.largest, options.dimension, options.device)
        count = round(options.share * options.largest)
        seconds = [timed(options.device, greedy_k_center, points, count, seed=0)[1] for _ in range(options.repeats)]
        result = {"points": options.largest, "dimension": options.dimension, "centres": count, "ours": seconds}
        results.append(result | {"anomalib": [], "common": 0.0, "radius_ratio": 0.0})
    data = "made-up clusters" if options.features is None else options.features.name
    machine = describe() | {"device": options.device, "points": data}
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    page = f"# Greedy k-center selection\n\n{markdown_table([row(result) for result in results])}\n\n{facts}\n"
    options.output.with_suffix(".json").write_text(
        json.dumps({"machine": machine, "results": results}, indent=2) + "\n"
    )
    options.output.with_suffix(".md").write_text(page)
    print(page)
    if options.figure is not None:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
