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

from accuracy import METRICS, TITLES, evaluator, fit, spread, test
from anomalib_exdd import KSDD2, ExDD, SurfaceSample
from machine import describe, markdown_table

CANDIDATES: dict[str, dict[str, Any]] = {
    "filter bank": {"backbone": "filter_bank"},
    "random resnet18, layers 2 and 3": {"backbone": "resnet18", "pre_trained": False},
    "random resnet18, layers 1 and 2": {"backbone": "resnet18", "pre_trained": False, "layers": ["layer1", "layer2"]},
}


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of resnet18")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the validation split")
    parser.add_argument("--output", type=Path, help="result file without ending; writes NAME.json and NAME.md")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    candidates = dict(CANDIDATES)
    if options.weights is not None:
        candidates["ImageNet resnet18, layers 2 and 3"] = {"backbone": "resnet18", "weights": options.weights}
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        sets: dict[str, tuple[type[KSDD2], Path, tuple[int, int]]] = {
            "sample": (SurfaceSample, Path(folder) / "sample", (316, 112))
        }
        if options.root is not None:
            sets[options.root.name] = (KSDD2, options.root, (224, 224))
        for data_name, (data_class, root, image_size) in sets.items():
            for name, arguments in candidates.items():
                metrics: list[dict[str, float]] = []
                for seed in options.seeds:
                    data = data_class(root, seed=seed, num_workers=2, val_split_ratio=0.2)
                    model = ExDD(
                        image_size=image_size,
                        post_processor=False,
                        visualizer=False,
                        evaluator=evaluator(),
                        seed=seed,
                        negative_ratio=0.005,
                        **arguments,
                    )
                    fit(model, data)
                    metrics.append(test(model, data, "validation")[0])
                    print(data_name, name, seed, metrics[-1], flush=True)
                results.append({"data": data_name, "features": name, "seeds": options.seeds, "metrics": metrics})
                row = {"data": data_name, "features": name}
                row |= {t: spread([100 * m[k] for m in metrics], 1) for k, t in zip(METRICS, TITLES, strict=True)}
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
