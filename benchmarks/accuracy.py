"""Detection and localisation of every scoring of ExDD, and of Anomalib's own Patchcore, on a KSDD2-layout folder.

    python benchmarks/accuracy.py --root DATA --weights FILE --backbone resnet18 --image-size 224 224 --output NAME

All methods share backbone, weights, layers, input size, coreset ratio and training images, and are scored raw, before
Anomalib's normalisation clips at the largest validation score. A seed decides the validation split, the projections and
the coresets' first centres. With `--split validation`, methods are compared on the validation images instead: that is
where a choice may be made. Results are written as they come; the same command goes on where it was interrupted.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from anomalib import metrics
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from anomalib.models import Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, seed_everything

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.comparison.measure import unit_interval
from anomalib_exdd.models.exdd.features import PatchFeatureExtractor
from machine import describe, markdown_table

METRICS = ("image_AUROC", "image_AUPR", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO")
TITLES = ("image AUROC", "image AP", "pixel AUROC", "pixel AP", "AUPRO")
SHARING_BANKS = {"calibrated": "calibrated", "normal": "normal", "paper": "paper", "ratio": "ratio"}
"""ExDD scorings that need the same features, hence the same banks: method -> image scoring."""


@dataclass
class Result:
    """What one method reached with one seed."""

    method: str
    seed: int
    metrics: dict[str, float]
    negative: int
    positive: int
    fit_seconds: float
    image_seconds: float = field(default=0.0)


class ForwardTimer(Callback):
    """Times the model on test batches, without loading, metrics or pictures."""

    def __init__(self) -> None:
        self.seconds, self.images, self._start = 0.0, 0, 0.0

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kw: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._start
        self.images += len(batch.image)


class _OfRawScores:
    """A ranking metric of scores of any range, which torchmetrics would tie where they are large."""

    fields: list[str]

    def update(self, batch: Any) -> None:
        """Take in a batch, its scores brought to 0..1 in the same order."""
        scores, labels = self.fields
        mapped = {scores: unit_interval(getattr(batch, scores).float()), labels: getattr(batch, labels)}
        super().update(SimpleNamespace(**mapped))  # type: ignore[misc]


class AUROC(_OfRawScores, metrics.AUROC):  # type: ignore[misc]
    """Anomalib's, of raw scores."""


class AUPR(_OfRawScores, metrics.AUPR):  # type: ignore[misc]
    """Anomalib's, of raw scores."""


def evaluator() -> Evaluator:
    """Return the metrics of the table, on raw scores."""
    image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
    pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_"}
    return Evaluator(test_metrics=[AUROC(**image), AUPR(**image), AUROC(**pixel), AUPR(**pixel), AUPRO(**pixel)])


def data(options: argparse.Namespace, seed: int) -> KSDD2:
    """Return the data of one seed."""
    return KSDD2(
        options.root,
        seed=seed,
        num_workers=options.workers,
        num_defects=options.num_defects,
        val_split_ratio=0.2,
    )


def engine(folder: str, *callbacks: Callback, accelerator: str = "auto", **arguments: Any) -> Engine:
    """Return an engine that writes into a temporary folder; further arguments are the trainer's."""
    return Engine(
        default_root_dir=folder,
        accelerator=accelerator,
        callbacks=[*callbacks],
        devices=1,
        logger=False,
        enable_progress_bar=False,
        barebones=False,
        **arguments,
    )


def exdd(options: argparse.Namespace, seed: int, **arguments: Any) -> ExDD:
    """Return an ExDD with the options' backbone and the same coreset ratio for both banks' negatives as Patchcore."""
    return ExDD(
        backbone=options.backbone,
        layers=options.layers,
        weights=options.weights,
        image_size=tuple(options.image_size),
        negative_ratio=options.ratio,
        negative_minimum=1,
        num_neighbors=options.num_neighbors,
        projected_dimension=options.projected_dimension,
        seed=seed,
        post_processor=False,
        visualizer=False,
        evaluator=evaluator(),
        **arguments,
    )


def patchcore(options: argparse.Namespace) -> Patchcore:
    """Return Anomalib's Patchcore with the same pre-processing and weights."""
    model = Patchcore(
        backbone=options.backbone,
        layers=options.layers,
        pre_trained=options.weights is None,
        coreset_sampling_ratio=options.ratio,
        num_neighbors=options.num_neighbors,
        pre_processor=PreProcessor(ExDD.configure_pre_processor(tuple(options.image_size)).transform),
        post_processor=False,
        visualizer=False,
        evaluator=evaluator(),
    )
    if options.weights is not None:
        ours = PatchFeatureExtractor(options.backbone, options.layers, weights=options.weights)
        ours.load_weights()
        model.model.feature_extractor.load_state_dict(ours.backbone.state_dict())
    return model


def fit(model: AnomalibModule, datamodule: KSDD2, **arguments: Any) -> float:
    """Train a model, with further arguments for the trainer; return the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        engine(folder, **arguments).fit(model=model, datamodule=datamodule)
        return time.perf_counter() - start


def test(model: AnomalibModule, datamodule: KSDD2, split: str) -> tuple[dict[str, float], float]:
    """Return a trained model's metrics and the seconds it takes for an image."""
    timer = ForwardTimer()
    datamodule.setup("test")
    loader = datamodule.val_dataloader() if split == "validation" else datamodule.test_dataloader()
    with tempfile.TemporaryDirectory() as folder:
        # Augmentations (the resize) belong to the data module's trainer; it stays attached from fit.
        (metrics,) = engine(folder, timer).test(model=model, dataloaders=loader, verbose=False)
    return {name: float(metrics[name]) for name in METRICS}, timer.seconds / timer.images


class Results:
    """The results so far, and the files that keep them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.output: Path | None = options.output
        paths = {"data": options.root.name, "weights": options.weights.name if options.weights else "timm"}
        left_out = {"root", "weights", "output", "methods", "seeds", "workers"}
        self.settings = paths | {n: str(value) for n, value in vars(options).items() if n not in left_out}
        self.all: list[Result] = []
        self.machine = describe()
        if self.output is not None and self.output.with_suffix(".json").is_file():
            content = json.loads(self.output.with_suffix(".json").read_text())
            if content["settings"] != self.settings:
                msg = f"{self.output}.json has results of other settings. Give another --output, or remove the file."
                raise SystemExit(msg)
            self.all = [Result(**result) for result in content["results"]]
            self.machine = content["machine"]

    def has(self, method: str, seed: int) -> bool:
        """Tell whether a method's result is there."""
        return any((result.method, result.seed) == (method, seed) for result in self.all)

    def add(self, result: Result) -> None:
        """Print a result and write all of them down."""
        self.all.append(result)
        self.machine = describe()
        values = "  ".join(f"{name} {100 * result.metrics[name]:.2f}" for name in METRICS)
        print(f"seed {result.seed}  {result.method:10s} {values}  fit {result.fit_seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Write all results down, if there is a place for them; the old file stays until the new one is complete."""
        if self.output is None:
            return
        content = {"machine": self.machine, "settings": self.settings, "results": [vars(each) for each in self.all]}
        facts = "\n".join(f"- {name}: {value}" for name, value in {**self.machine, **self.settings}.items())
        title = f"# Accuracy on {self.settings['data']}, {self.settings['split']} images"
        for suffix, text in (
            (".json", json.dumps(content, indent=2)),
            (".md", f"{title}\n\n{markdown_table(table(self.all))}\n\n{facts}"),
        ):
            partial = self.output.with_suffix(suffix + ".partial")
            partial.write_text(text + "\n")
            partial.replace(self.output.with_suffix(suffix))


def run_seed(options: argparse.Namespace, seed: int, results: Results) -> None:
    """Train and test every method with one seed."""
    if "patchcore" in options.methods and not results.has("patchcore", seed):
        seed_everything(seed, verbose=False)
        baseline, datamodule = patchcore(options), data(options, seed)
        seconds = fit(without_defects(baseline), datamodule)
        metrics, image_seconds = test(baseline, datamodule, options.split)
        entries = len(baseline.model.memory_bank)
        results.add(Result("patchcore", seed, metrics, entries, 0, seconds, image_seconds))
    for scorings in (SHARING_BANKS, {"published": "published"}):
        wanted = {n: i for n, i in scorings.items() if n in options.methods and not results.has(n, seed)}
        fitted: ExDD | None = None
        for name, image_scoring in wanted.items():
            model = exdd(options, seed, scoring=name, image_scoring=image_scoring)
            if fitted is None:
                datamodule = data(options, seed)
                seconds = fit(model, datamodule)
                fitted = model
            else:  # another score of the same banks
                model.model.load_state_dict(fitted.model.state_dict())
            metrics, image_seconds = test(model, datamodule, options.split)
            negative, positive = len(model.model.negative_bank), len(model.model.positive_bank)
            results.add(Result(name, seed, metrics, negative, positive, seconds, image_seconds))


def without_defects(model: Patchcore) -> Patchcore:
    """Make Patchcore skip the defective training images, which it must not learn as normal."""
    step = model.training_step

    def normal_only(batch: Any, *args: Any, **kwargs: Any) -> Any:
        normal = ~batch.gt_label.bool()
        batch.image = batch.image[normal]
        return step(batch, *args, **kwargs)

    model.training_step = normal_only  # type: ignore[method-assign]
    return model


def spread(values: list[float], digits: int) -> str:
    """Format the mean and the sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(results: list[Result]) -> list[dict[str, str]]:
    """Summarise the seeds, one row a method."""
    rows = []
    for method in dict.fromkeys(result.method for result in results):
        ours = [result for result in results if result.method == method]
        row = {"method": method}
        row |= {t: spread([100 * r.metrics[m] for r in ours], 1) for m, t in zip(METRICS, TITLES, strict=True)}
        row["bank neg. / pos."] = f"{ours[0].negative} / {ours[0].positive}"
        row["fit s"] = spread([result.fit_seconds for result in ours], 0)
        row["ms / image"] = spread([1000 * result.image_seconds for result in ours], 0)
        rows.append(row)
    return rows


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, help="local weights of the backbone; without, timm's ImageNet weights")
    parser.add_argument("--backbone", default="wide_resnet50_2")
    parser.add_argument("--layers", nargs="+", default=["layer2", "layer3"])
    parser.add_argument("--image-size", type=int, nargs=2, default=[632, 224], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--ratio", type=float, default=0.02, help="coreset ratio of normal patches")
    parser.add_argument("--num-neighbors", type=int, default=3, help="neighbourhood of the weights, for all methods")
    parser.add_argument(
        "--projected-dimension", type=int, default=128, help="of ExDD's coreset selection; Patchcore's is its own"
    )
    parser.add_argument("--num-defects", type=int, help="defective training images to use; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--workers", type=int, default=2)
    methods = ["patchcore", *SHARING_BANKS, "published"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--output", type=Path, help="result file without ending; writes NAME.json and NAME.md")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = Results(options)
    for seed in options.seeds:
        run_seed(options, seed, results)
    results.write()
    print(markdown_table(table(results.all)))


if __name__ == "__main__":
    main()
