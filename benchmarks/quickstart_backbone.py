"""Which features to use where no weights can be downloaded: a fixed filter bank or a fixed random network.

    python benchmarks/quickstart_backbone.py [--root DATA --weights FILE] --output NAME

Every candidate trains ExDD on the generated sample, and on a KSDD2-layout folder if one is given, and is scored on the
validation images, raw. ImageNet weights (a local file) are the yardstick, not a candidate.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from anomalib_exdd import register
from anomalib_exdd.comparison.config import ComparisonConfig, MethodConfig
from anomalib_exdd.comparison.data import build_data
from anomalib_exdd.comparison.measure import Predictions, image_metrics, pixel_metrics
from anomalib_exdd.comparison.methods import build_model, resolve_method
from anomalib_exdd.comparison.results import METRICS
from anomalib_exdd.comparison.worker import build_engine
from machine import describe, markdown_table, spread

CANDIDATES: dict[str, dict[str, Any]] = {
    "filter bank": {"backbone": "filter_bank"},
    "random resnet18, layers 2 and 3": {"backbone": "resnet18", "pre_trained": False},
    "random resnet18, layers 1 and 2": {"backbone": "resnet18", "pre_trained": False, "layers": ["layer1", "layer2"]},
}


def measure(
    data: dict[str, Any], image_size: tuple[int, int], arguments: dict[str, Any], seed: int
) -> dict[str, float]:
    """Train ExDD as a run of a comparison does, and return its metrics on the validation images."""
    method = MethodConfig("ExDD", "ExDD", {"negative_ratio": 0.005, **arguments})
    comparison = ComparisonConfig(data, [method], Path(), image_size=image_size)
    run = resolve_method(method, comparison).run_settings(comparison, seed)
    model, datamodule, found = build_model(run), build_data(run["data"]), Predictions(with_maps=True)
    with tempfile.TemporaryDirectory() as folder:
        build_engine(folder, "auto").fit(model=model, datamodule=datamodule)
        loader = datamodule.val_dataloader()
        build_engine(folder, "auto", found).test(model=model, dataloaders=loader, verbose=False)
    assert found.maps is not None  # noqa: S101  ExDD has maps, and all of these images masks
    assert found.masks is not None  # noqa: S101
    return image_metrics(found.scores, found.labels) | pixel_metrics(found.maps, found.masks)


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of resnet18")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the validation split")
    parser.add_argument("--output", type=Path, help="result file without ending; writes NAME.json and NAME.md")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    register()
    candidates = dict(CANDIDATES)
    if options.weights is not None:
        candidates["ImageNet resnet18, layers 2 and 3"] = {"backbone": "resnet18", "weights": str(options.weights)}
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        sets = {"sample": ("SurfaceSample", f"{folder}/sample", (316, 112))}
        if options.root is not None:
            sets[options.root.name] = ("KSDD2", str(options.root), (224, 224))
        for data_name, (class_path, root, image_size) in sets.items():
            data = {"class_path": class_path, "init_args": {"root": root, "num_workers": 2, "val_split_ratio": 0.2}}
            for name, arguments in candidates.items():
                metrics = [measure(data, image_size, arguments, seed) for seed in options.seeds]
                print(data_name, name, metrics, flush=True)
                results.append({"data": data_name, "features": name, "seeds": options.seeds, "metrics": metrics})
                row = {"data": data_name, "features": name}
                row |= {title: spread([100 * m[key] for m in metrics], 1) for key, title in METRICS.items()}
                rows.append(row)
    print(markdown_table(rows))
    if options.output is not None:
        content = {"machine": describe(), "results": results}
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=2, default=str) + "\n")
        facts = "\n".join(f"- {name}: {value}" for name, value in describe().items())
        page = f"# Features without downloaded weights, validation images\n\n{markdown_table(rows)}\n\n{facts}\n"
        options.output.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
