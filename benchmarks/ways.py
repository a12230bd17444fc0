"""What each way of making the search fast brings: how long ExDD takes without it.

    python benchmarks/ways.py --root DATA --weights FILE --output NAME

One ExDD with a ResNet-18 is trained at its default ratios. Copies of it that lack one way each are timed in one
process, one after the other in every repeat, on the same images.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from anomalib_exdd.models.exdd import torch_model
from anomalib_exdd.models.exdd.torch_model import ExDDModel
from anomalib_exdd.search import Neighbors, torch_index
from inference import seconds, trained
from machine import describe, known_results, markdown_table, save_results


def plain_top_k(score_QM: Tensor, count: int) -> Neighbors:
    """Find the smallest scores among all columns at once."""
    return Neighbors(*score_QM.topk(count, dim=1, largest=False))


# What is replaced in which module.
WAYS: dict[str, tuple[Any, str, Any] | None] = {
    "all of them": None,
    "products in bfloat16, re-ranked": (torch_index, "bfloat16_is_fast", lambda: False),
    "top-k by groups of columns": (torch_index, "smallest", plain_top_k),
    "a few images at a time": (torch_model, "_CPU_IMAGES", 1 << 20),
    "torch instead of FAISS": None,
}


def variants(model: ExDDModel) -> dict[str, tuple[ExDDModel, tuple[Any, str, Any] | None]]:
    """Return a copy of the model for each way, and what is to be replaced while it works."""
    found = {}
    for name, replaced in WAYS.items():
        own = copy.deepcopy(model)
        for bank in (own.negative_bank, own.positive_bank):
            bank.search = "faiss" if "FAISS" in name else "torch"
        found[name] = (own, replaced)
    return found


def without(replaced: tuple[Any, str, Any] | None, work: Callable[[], Any]) -> float:
    """Time a piece of work while something is replaced."""
    with ExitStack() as stack:
        if replaced is not None:
            stack.enter_context(mock.patch.object(*replaced))
        return seconds(work)


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[632, 224], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    options = parser.parse_args()
    options.normal, options.defective, options.device, options.backbone = 120, 20, "cpu", "resnet18"
    options.batch = max(options.batches)
    settings = {
        "data": f"{options.root.name}, {options.normal} normal and {options.defective} defective training images",
        "image size": str(list(options.image_size)),
        "repeats": f"{options.repeats}; ratios within a repeat: median (10 % to 90 %)",
    }
    results: list[dict[str, Any]] = known_results(options.output, settings)
    if not results:
        model, images = trained(options)
        works = variants(model.model.eval())
        with torch.inference_mode():
            for batch in options.batches:
                timed = {
                    name: partial(without, replaced, partial(own, images[:batch]))
                    for name, (own, replaced) in works.items()
                }
                for clock in timed.values():
                    clock()
                results += [
                    {"batch": batch, **{name: clock() for name, clock in timed.items()}} for _ in range(options.repeats)
                ]
        save_results(options.output, settings, results)
    table = []
    for name in WAYS:
        row = {"way": name}
        for batch in dict.fromkeys(result["batch"] for result in results):
            own = [result for result in results if result["batch"] == batch]
            times = [1e3 * result[name] / batch for result in own]
            row[f"without it, ms an image, batch {batch}"] = f"{statistics.median(times):.1f}"
            ratios = sorted(result[name] / result["all of them"] for result in own)
            low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
            row[f"times ExDD, batch {batch}"] = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
        table.append(row)
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    page = f"# What each way of making the search fast brings\n\n{markdown_table(table)}\n\n{facts}\n"
    options.output.with_suffix(".md").write_text(page)
    print(markdown_table(table))


if __name__ == "__main__":
    main()
