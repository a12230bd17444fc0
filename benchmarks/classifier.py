"""Is ExDD worth it beside a plain classifier? Both from the same labels, with 5, 25 and 100 defective images.

    python benchmarks/classifier.py --root DATA --weights FILE --output NAME

DATA is a folder in KSDD2's layout. Both methods share backbone, weights, input size, training, validation and test
images; a seed decides the defective images, the validation split, and what is random in a method. ExDD also uses the
masks of the defective training images; `exdd_labels` does not. The classifier is trained with the preset `diag` for
`--epochs`. Its best epoch is chosen on validation images; where these have no defect, because none of a few was held
out, the last one is taken. Scores are raw. Results are written as they come; the same command goes on where it was
interrupted.
"""

import argparse
import copy
import logging
import statistics
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from tqdm import tqdm

from accuracy import data, evaluator, exdd, fit, spread, test
from anomalib_exdd import KSDD2, DefectClassifier, ExDD
from machine import describe, known_results, markdown_table, save_results

METRICS = {
    "image_AUPR": "image AP",
    "image_AUROC": "image AUROC",
    "pixel_AUPR": "pixel AP",
    "pixel_AUROC": "pixel AUROC",
}
METHODS = ("classifier", "exdd", "exdd_labels")
NOT_SETTINGS = {"root", "weights", "output", "seeds", "defects", "methods", "workers"}
"""Options that do not change the result of a cell, or that are part of its key."""


def classifier(options: argparse.Namespace, seed: int) -> DefectClassifier:
    """Return an untrained classifier."""
    return DefectClassifier(
        backbone=options.backbone,
        preset="diag",
        weights=options.weights,
        image_size=tuple(options.image_size),
        learning_rate=options.learning_rate,
        patience=options.patience,
        freeze_batch_norm=not options.train_batch_norm,
        seed=seed,
        post_processor=False,
        visualizer=False,
        evaluator=evaluator(),
    )


def run_cell(options: argparse.Namespace, method: str, defects: int, seed: int) -> dict[str, Any]:
    """Train and test one method with so many defective training images."""
    seed_everything(seed, verbose=False)
    cell = copy.copy(options)
    cell.num_defects = defects
    datamodule: KSDD2 = data(cell, seed)
    model: DefectClassifier | ExDD
    trainer: dict[str, Any] = {"enable_model_summary": False}
    if method == "classifier":
        model = classifier(options, seed)
        datamodule.train_batch_size = options.batch_size
        trainer["max_epochs"] = options.epochs
    else:
        arguments = {"positive_patches": "farthest"} if method == "exdd_labels" else {}
        model = exdd(options, seed, **arguments)
    seconds = fit(model, datamodule, **trainer)
    metrics, image_seconds = test(model, datamodule, options.split)
    key = {"method": method, "defects": defects, "seed": seed}
    return {**key, "metrics": metrics, "fit_seconds": seconds, "image_seconds": image_seconds}


def table(results: list[dict[str, Any]]) -> str:
    """Summarise the seeds, one row a cell."""
    rows = []
    for defects in sorted({result["defects"] for result in results}):
        for method in METHODS:
            ours = [r for r in results if (r["defects"], r["method"]) == (defects, method)]
            if not ours:
                continue
            row = {"defects": str(defects), "method": method, "seeds": str(len(ours))}
            row |= {title: spread([100 * r["metrics"][m] for r in ours], 1) for m, title in METRICS.items()}
            row["fit s"] = spread([r["fit_seconds"] for r in ours], 0)
            row["ms / image"] = spread([1000 * r["image_seconds"] for r in ours], 0)
            rows.append(row)
    return markdown_table(rows)


def differences(results: list[dict[str, Any]]) -> str:
    """Compare each ExDD with the classifier of the same seed and the same defects."""
    rows = []
    found = {(r["method"], r["defects"], r["seed"]): r["metrics"] for r in results}
    for defects in sorted({result["defects"] for result in results}):
        for method in METHODS[1:]:
            pairs = [
                (metrics, found["classifier", defects, seed])
                for (name, count, seed), metrics in found.items()
                if (name, count) == (method, defects) and ("classifier", defects, seed) in found
            ]
            if not pairs:
                continue
            row = {"defects": str(defects), "difference": f"{method} - classifier", "seeds": str(len(pairs))}
            for metric, title in METRICS.items():
                values = [100 * (ours[metric] - theirs[metric]) for ours, theirs in pairs]
                row[title] = f"{statistics.mean(values):+.1f} ({min(values):+.1f} to {max(values):+.1f})"
            rows.append(row)
    return markdown_table(rows) if rows else "Nothing to compare yet."


def save(output: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the results so far; the old files stay until the new ones are complete."""
    save_results(output, settings, results)
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    title = f"# Classifier and ExDD from the same labels, {settings['data']}, {settings['split']} images"
    about = "Mean and standard deviation over seeds, in percent; then the differences seed by seed, mean and extremes."
    partial = output.with_suffix(".md.partial")
    partial.write_text(f"{title}\n\n{about}\n\n{table(results)}\n\n{differences(results)}\n\n{facts}\n")
    partial.replace(output.with_suffix(".md"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, help="local weights of the backbone; without, timm's ImageNet weights")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[224, 224], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--defects", type=int, nargs="+", default=[5, 25, 100], help="numbers of defective images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["classifier", "exdd"])
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--workers", type=int, default=2)
    training = parser.add_argument_group("classifier")
    training.add_argument("--epochs", type=int, default=20)
    training.add_argument("--batch-size", type=int, default=32)
    training.add_argument("--learning-rate", type=float, default=1e-4)
    training.add_argument("--patience", type=int, help="epochs without improvement to stop after; never by default")
    training.add_argument(
        "--train-batch-norm", action="store_true", help="train batch statistics too: not with folded batch norms"
    )
    banks = parser.add_argument_group("ExDD")
    banks.add_argument("--layers", nargs="+", default=["layer2", "layer3"])
    banks.add_argument("--ratio", type=float, default=0.01, help="coreset ratio of normal patches")
    banks.add_argument("--num-neighbors", type=int, default=3)
    banks.add_argument("--projected-dimension", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True, help="result file without ending; writes .json and .md")
    return parser.parse_args()


def main() -> None:
    """Run every cell that is not there yet and write it down."""
    options = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    weights = options.weights.name if options.weights else "timm"
    settings = {"data": options.root.name, "weights": weights}
    settings |= {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    results = known_results(options.output, settings)
    done = {(result["method"], result["defects"], result["seed"]) for result in results}
    cells = [(m, d, s) for s in options.seeds for d in options.defects for m in options.methods]
    for cell in tqdm([cell for cell in cells if cell not in done], unit="training"):
        result = run_cell(options, *cell)
        results.append(result)
        save(options.output, settings, results)
        shown = "  ".join(f"{title} {100 * result['metrics'][m]:.1f}" for m, title in METRICS.items())
        tqdm.write(f"{cell[0]:11s} {cell[1]:3d} defects, seed {cell[2]}: {shown}, fit {result['fit_seconds']:.0f} s")
    print(f"{table(results)}\n\n{differences(results)}")


if __name__ == "__main__":
    main()
