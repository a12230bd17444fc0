"""How much longer does `anomalib predict` take than its model, with and without pictures?

    python benchmarks/predict.py --ckpt_path MODEL.ckpt --data FOLDER --output NAME

Times all of `Engine.predict` on a folder of images, and the calls of the model within: reading, pre-processing, tables
and pictures are what is on top. Loading the model is left out, and so are the imports before it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from anomalib.data import PredictDataset
from lightning.pytorch import seed_everything

from anomalib_exdd import ExDD
from anomalib_exdd.comparison.worker import build_engine
from anomalib_exdd.models.exdd.torch_model import ScoredImages
from machine import describe, markdown_table, save_results


def measure(options: argparse.Namespace, *, pictures: bool) -> dict[str, float]:
    """Predict the folder once, and time it."""
    arguments = {} if pictures else {"visualizer": False}
    model = ExDD.load_from_checkpoint(options.ckpt_path, map_location="cpu", weights_only=False, **arguments)
    model(torch.rand(1, 3, 256, 256))  # the first call builds what later ones need
    score_images, taken = model.model.score_images, []

    def timed(images: torch.Tensor) -> ScoredImages:
        start = time.perf_counter()
        scored = score_images(images)
        taken.append(time.perf_counter() - start)
        return scored

    model.model.score_images = timed  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        dataset = PredictDataset(options.data)
        build_engine(folder, "cpu").predict(model=model, dataset=dataset, return_predictions=False)
        seconds = time.perf_counter() - start
        written = sum(path.stat().st_size for path in Path(folder).rglob("*.png"))
    return {
        "pictures": pictures,
        "images": len(taken),
        "seconds": seconds,
        "model_seconds": sum(taken),
        "picture_bytes": written,
    }


def row(results: list[dict[str, float]]) -> dict[str, str]:
    """Summarise the repeats with or without pictures."""
    ratios = [result["seconds"] / result["model_seconds"] for result in results]
    return {
        "pictures": "yes" if results[0]["pictures"] else "no",
        "images": str(results[0]["images"]),
        "seconds": f"{statistics.median(result['seconds'] for result in results):.1f}",
        "of these the model's": f"{statistics.median(result['model_seconds'] for result in results):.1f}",
        "ratio": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "MB of pictures": f"{statistics.median(result['picture_bytes'] for result in results) / 1e6:.0f}",
    }


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="a trained ExDD")
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    options = parser.parse_args()
    seed_everything(0)
    results = [measure(options, pictures=pictures) for _ in range(options.repeats) for pictures in (False, True)]
    settings = {"data": options.data.name, "repeats": options.repeats}
    save_results(options.output, settings, results)
    table = markdown_table([row([r for r in results if r["pictures"] == pictures]) for pictures in (False, True)])
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    options.output.with_suffix(".md").write_text(
        f"# Time of `anomalib predict` beside its model's\n\n{table}\n\n{facts}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
