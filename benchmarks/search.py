"""How fast is nearest-neighbour search, beside Anomalib's, and how accurate?

    python benchmarks/search.py --output NAME [--root DATA --weights FILE | --features FILE.pt] [--device cuda]

Same queries and bank for everybody, one after the other in every repeat, so that a busy machine disturbs all alike:
Anomalib's `PatchcoreModel.nearest_neighbors`, and our searches `torch` and `faiss` (where it serves the device). Found
neighbours are compared with a search in float64.

Features are synthetic: clusters of Gaussians, close to patch features of a ResNet-18 in the spectrum of their variance
(the j-th largest is proportional to (j + 18)^-2), their distance from the origin and the distances of the nearest
entries, all seen from their spread. `--root` adds real ones of images in KSDD2's layout: layer2 and layer3 of a
ResNet-18, 384 dimensions; for 1536 dimensions, those of 2 x 2 neighbouring patches side by side. Banks are patches of
normal training images, queries patches of test images. Image AP and pixel AP of PatchCore's score are then computed
from banks in full and in half precision as well. `--features` adds those of a file with a dictionary of `bank` and
`queries`, float32, of shapes (M, D) and (Q, D).

Shape suffixes: Q queries, M bank entries, D feature dimension, K neighbours.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision
from torchvision.transforms.v2 import Resize
from tqdm import tqdm

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.models.exdd.memory_bank import BankContent, BankPrecision, MemoryBank
from anomalib_exdd.models.exdd.scoring import PatchDistances, get_scoring
from anomalib_exdd.search import NeighborIndex, Neighbors, create_index
from anomalib_exdd.search.faiss_index import faiss_available, load_faiss
from anomalib_exdd.utils.precision import full_float32
from evidence import Images
from features import Source, patches, real, resnet_like, side_by_side
from machine import describe, markdown_table

BACKENDS: tuple[Literal["torch", "faiss"], ...] = ("torch", "faiss")
POOL = 150_000  # training patches that real banks are selected from


class Clock:
    """Seconds of the wall, or of the processor for a machine that does other work; waits for the accelerator."""

    def __init__(self, *, processor: bool) -> None:
        self.read = time.process_time if processor else time.perf_counter

    def __call__(self, work: Callable[[], Any]) -> float:
        """Measure a piece of work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = self.read()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.read() - start


def oracle(query_QD: Tensor, bank_MD: Tensor, k: int) -> Tensor:
    """Compute the k smallest distances in float64, shape (Q, K)."""
    bank_MD = bank_MD.double()
    centre_D = bank_MD.mean(dim=0)
    bank_MD -= centre_D
    half_norm_M = bank_MD.square().sum(dim=1) / 2
    found = []
    for query in query_QD.split(128):
        centred = query.double() - centre_D
        index = torch.addmm(half_norm_M, centred, bank_MD.T, alpha=-1).topk(k, dim=1, largest=False).indices
        found.append(torch.linalg.vector_norm(centred.unsqueeze(1) - bank_MD[index], dim=-1).sort(dim=1).values)
    return torch.cat(found)


def accuracy(found: Neighbors, query_QD: Tensor, bank_MD: Tensor, true_QK: Tensor) -> tuple[float, float]:
    """Compute recall@1 and the largest relative error of all distances, ties being right."""
    first_QD = bank_MD[found.indices[:, 0]].double()
    first_Q = torch.linalg.vector_norm(query_QD.double() - first_QD, dim=1)
    recall = float((first_Q <= true_QK[:, 0] * (1 + 1e-6)).double().mean())
    true_QK = true_QK[:, : found.distances.shape[1]]
    return recall, float(((found.distances - true_QK).abs() / true_QK.clamp_min(1e-9)).max())


def floors(device: torch.device) -> tuple[float, float]:
    """Measure what the device can do: float32 operations a second in a matrix product, bytes a second in a copy."""
    side = 2048 if device.type == "cpu" else 8192
    clock = Clock(processor=False)
    with full_float32(device):
        matrix = torch.randn(side, side, device=device)
        product = torch.empty_like(matrix)
        seconds = min(clock(lambda: torch.mm(matrix, matrix, out=product)) for _ in range(6))
    source = torch.randn(1 << 26, device=device)
    target = torch.empty_like(source)
    copying = min(clock(lambda: target.copy_(source)) for _ in range(6))
    return 2 * side**3 / seconds, 2 * source.nbytes / copying


class Entrant(NamedTuple):
    """A search that takes part."""

    name: str
    search: Callable[[Tensor, int], Neighbors]
    build_seconds: float = 0.0
    built: NeighborIndex | None = None


def entrants(bank_MD: Tensor, clock: Clock) -> list[Entrant]:
    """Prepare all searches of a bank."""
    theirs = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False).eval()
    theirs.memory_bank = bank_MD

    def search(query_QD: Tensor, k: int) -> Neighbors:
        return Neighbors(*(part.reshape(-1, k) for part in theirs.nearest_neighbors(query_QD, k)))

    found = [Entrant("Anomalib", search)]
    for name in BACKENDS:
        if name == "faiss" and not faiss_available():
            continue
        built: list[NeighborIndex] = []
        try:
            seconds = clock(partial(lambda name, built: built.append(create_index(bank_MD, name)), name, built))
        except ValueError as refusal:  # FAISS without its GPU flavour
            print(refusal)
            continue
        found.append(Entrant(name, built[0].search, seconds, built[0]))
    return found


def measure(
    data: Source, dimension: int, size: int, options: argparse.Namespace, peak: tuple[float, float]
) -> list[Any]:
    """Measure all searches in one bank."""
    device = torch.device(options.device)
    bank_MD, query_QD = (part.to(device) for part in data.draw(size, options.queries))
    clock = Clock(processor=options.processor_time)
    all_entrants = entrants(bank_MD, clock)
    true_QK = oracle(query_QD, bank_MD, max(options.neighbors))
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for name, search, build, index in all_entrants:
        work = 2 * len(query_QD) * size * dimension / peak[0]
        for k in options.neighbors:
            recall, error = accuracy(search(query_QD, k), query_QD, bank_MD, true_QK)  # warms up as well
            results[name, k] = {
                "data": data.name,
                "dimension": dimension,
                "size": size,
                "queries": len(query_QD),
                "k": k,
                "search": name,
                "method": index.description.split(":")[0] if index else "",
                "recall": recall,
                "error": error,
                "build": build,
                "floor": max(work, 4 * dimension * (size + len(query_QD)) / peak[1]),
                "seconds": [],
            }
    for _ in range(options.repeats):
        for name, search, _, _ in all_entrants:
            for k in options.neighbors:
                results[name, k]["seconds"].append(clock(partial(search, query_QD, k)))
    for (name, k), result in results.items():
        result["speedup"] = ratios(results["Anomalib", k]["seconds"], result["seconds"])
        result["to_first_k"] = ratios(result["seconds"], results[name, options.neighbors[0]]["seconds"])
    return list(results.values())


def ratios(upper: list[float], lower: list[float]) -> list[float]:
    """Divide repeat by repeat."""
    return [up / low for up, low in zip(upper, lower, strict=True)]


def row(result: dict[str, Any], first_k: int) -> dict[str, str]:
    """Format one result."""

    def median(values: list[float], digits: int) -> str:
        low, high = (f"{bound(values):.{digits}f}" for bound in (min, max))
        return f"{statistics.median(values):.{digits}f} ({low} to {high})"

    return {
        "features": result["data"],
        "d": str(result["dimension"]),
        "m": str(result["size"]),
        "k": str(result["k"]),
        "search": ": ".join(filter(None, (result["search"], result["method"]))),
        "ms": f"{1e3 * statistics.median(result['seconds']):.1f}",
        "times Anomalib's speed": median(result["speedup"], 2),
        f"time to k = {first_k}": f"{statistics.median(result['to_first_k']):.2f}",
        "recall@1": f"{100 * result['recall']:.3f} %",
        "largest relative error": f"{result['error']:.1e}",
        "index built in": f"{result['build']:.1f} s",
        "arithmetic floor, ms": f"{1e3 * result['floor']:.1f}",
    }


def scores(model: ExDD, bank_MD: Tensor, test: Images, options: argparse.Namespace) -> list[dict[str, str]]:
    """Compare PatchCore's score on test images, from banks in full and in half precision."""
    rows = torch.arange(0, len(test.label_N), max(1, len(test.label_N) // options.scored_images))
    device = torch.device(options.device)
    nothing = torch.zeros(len(bank_MD), dtype=torch.int64)
    rule = get_scoring("normal")
    table, nearest = [], []
    precisions: tuple[BankPrecision, ...] = ("float32", "float16")
    for precision in precisions:
        bank = MemoryBank(3, "torch", precision).to(device)
        bank.fill(BankContent(bank_MD, nothing, nothing.expand(2, -1).T, ["train"]))
        image, maps, distances = [], [], []
        for chunk in tqdm(rows.split(4), f"Scores, {precision}", leave=False):
            features_NPD = test.features_NDhw[chunk].flatten(2).transpose(1, 2).contiguous().to(device)
            found: PatchDistances = bank.distances(features_NPD, neighborhood=True)
            image.append(rule.image(found, None).cpu())
            values = rule.map_values(rule.patch(found, None)).reshape(-1, 1, *test.features_NDhw.shape[-2:])
            maps.append(model.model.anomaly_map(values.cpu(), tuple(options.image_size))[:, 0])
            distances.append(found.nearest.cpu())
        nearest.append(torch.cat(distances))
        aps = [(torch.cat(image), test.label_N[rows]), (torch.cat(maps).flatten(), test.mask_NHW[rows].flatten())]
        image_ap, pixel_ap = (100 * float(binary_average_precision(score, label.int())) for score, label in aps)
        table.append({"bank": precision, "images": str(len(rows)), "patches": str(nearest[-1].numel())})
        table[-1] |= {"image AP": f"{image_ap:.3f}", "pixel AP": f"{pixel_ap:.3f}"}
        table[-1]["largest relative error"] = f"{float((nearest[-1] / nearest[0].clamp_min(1e-9) - 1).max()):.1e}"
    return table


def gather(options: argparse.Namespace) -> tuple[dict[int, list[Source]], list[dict[str, str]]]:
    """List the features to measure with, by dimension, and compare scores if there are images."""
    sources = {dimension: [resnet_like(dimension)] for dimension in options.dimensions}
    scored: list[dict[str, str]] = []
    if options.features:
        given = torch.load(options.features, weights_only=True)
        data = real(given["bank"].float(), given["queries"].float(), options.features.name)
        sources.setdefault(given["bank"].shape[1], []).append(data)
    if options.root:
        size = tuple(options.image_size)
        model = ExDD(backbone="resnet18", weights=options.weights, image_size=size).eval()
        images = KSDD2(options.root, num_workers=2, augmentations=Resize(size, antialias=True))  # masks as well
        images.setup()
        train, test = (Images(model, images, split) for split in ("train", "test"))
        normal_NDhw, name = train.features_NDhw[train.rows(defective=False)], f"real, {options.root.name}"
        data = real(patches(normal_NDhw, POOL), patches(test.features_NDhw, POOL), name)
        if normal_NDhw.shape[1] in sources:
            sources[normal_NDhw.shape[1]].append(data)
        if 4 * normal_NDhw.shape[1] in sources:
            bank_ND = patches(side_by_side(normal_NDhw), POOL)
            query_ND = patches(side_by_side(test.features_NDhw[::8]), POOL // 10)
            sources[bank_ND.shape[1]].append(real(bank_ND, query_ND, f"{name}, 2 x 2 patches"))
        if data.largest >= max(options.sizes) and options.scored_images:
            scored = scores(model, data.draw(max(options.sizes), 0)[0], test, options)
    return sources, scored


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[384, 1536])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 92_000], help="bank sizes")
    parser.add_argument("--queries", type=int, default=2212)
    parser.add_argument("--neighbors", type=int, nargs="+", default=[1, 5], help="numbers of neighbours k")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="processor threads; PyTorch's default otherwise")
    parser.add_argument("--processor-time", action="store_true", help="measure the process, not the wall")
    parser.add_argument("--root", type=Path, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[224, 224])
    parser.add_argument("--scored-images", type=int, default=200, help="test images of the table of scores; 0: none")
    parser.add_argument("--features", type=Path, help="file of features: {'bank': (M, D), 'queries': (Q, D)}")
    parser.add_argument("--output", type=Path, help="result file without ending; writes NAME.json and NAME.md")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        if faiss_available():
            load_faiss().omp_set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        sources, scored = gather(options)
        print(markdown_table(scored) if scored else "", flush=True)
        peak = floors(torch.device(options.device))
        for dimension, found in sources.items():
            for data in found:
                for size in options.sizes:
                    if size > data.largest:
                        print(f"{data.name}, {dimension} dimensions: {data.largest} patches are too few for {size}.")
                        continue
                    new = measure(data, dimension, size, options, peak)
                    print(markdown_table([row(result, options.neighbors[0]) for result in new]), flush=True)
                    results += new
    if options.output is not None:
        write(options, results, scored, peak)


def write(
    options: argparse.Namespace, results: list[Any], scored: list[dict[str, str]], peak: tuple[float, float]
) -> None:
    """Write the result files."""
    settings = {
        "queries": options.queries,
        "repeats": options.repeats,
        "time": "of the process" if options.processor_time else "of the wall",
        "threads used": torch.get_num_threads(),
        "device": options.device,
        "measured peak": f"{peak[0] / 1e9:.0f} GFLOP/s in float32 products, {peak[1] / 1e9:.0f} GB/s in copies",
    }
    page = (
        f"# Search beside Anomalib's, {options.queries} queries, median of {options.repeats} repeats (extremes)\n\n"
        f"{markdown_table([row(result, options.neighbors[0]) for result in results])}\n\n"
        "The floor is the time of the matrix products alone at the measured peak of float32, or of reading the bank; "
        "products in bfloat16 go below it.\n\n"
    )
    if scored:
        page += f"## PatchCore's score, a bank of {max(options.sizes)} real patches\n\n{markdown_table(scored)}\n\n"
    page += "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items()) + "\n"
    options.output.with_suffix(".md").write_text(page)
    content = {"machine": describe(), "settings": settings, "results": results, "scores": scored}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
