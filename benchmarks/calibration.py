"""How the calibrated score grows with the number of defective training images, and what it makes of unknown defects.

    python benchmarks/calibration.py --root DATA --weights FILE --output NAME [--figure FILE]

Features are extracted once and the negative bank is built once; every draw of defective training images then builds its
own positive bank and calibration. Three tables, on the test images:

- `defects`: with N defective training images, five draws each, beside `normal` and `paper` from the same banks;
- `unseen`: all defective training images but those of one class, tested on that class (`sources.csv` names them);
- `weak`: the same draws without masks (`positive_patches: farthest`).

With `--split validation` a part of the training images takes the place of the test images: that is where a choice may
be made.

Results are written as they come; the same command goes on where it was interrupted.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchvision.transforms.v2 import Resize
from tqdm import tqdm

from accuracy import spread
from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.data.splits import draw
from anomalib_exdd.models.exdd.bank_builder import BankBuilder
from anomalib_exdd.models.exdd.scoring import PatchDistances, get_scoring
from machine import describe, known_results, markdown_table, save_results

COUNTS = (0, 1, 2, 5, 10, 25, 50, 100)
METRICS = {"image_AUROC": "image AUROC", "image_AP": "image AP", "pixel_AP": "pixel AP"}
NEIGHBORHOOD = 3
METHODS = ("normal", "paper", "calibrated")
HELD_OUT = 0.3  # share of the training images that choices are made on


class Images:
    """Features, labels and masks of one split, by path."""

    def __init__(self, model: ExDD, data: KSDD2, split: str) -> None:
        features, masks, labels = [], [], []
        self.paths: list[str] = []
        self.kinds: list[str] = []
        pre_processor: Any = model.pre_processor
        torch.manual_seed(0)
        loader = data.test_dataloader() if split == "test" else data.train_dataloader()
        with torch.inference_mode():
            for batch in tqdm(loader, f"Features of {split} images", leave=False):
                features.append(model.model.embed(pre_processor(batch.image)))
                masks.append(batch.gt_mask.bool())
                labels.append(batch.gt_label.bool())
                self.paths += batch.image_path
                self.kinds += batch.kinds
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        self.paths, self.kinds = [self.paths[i] for i in order], [self.kinds[i] for i in order]
        self.features_NDhw, self.mask_NHW = torch.cat(features)[order], torch.cat(masks)[order]
        self.label_N = torch.cat(labels)[order]

    def subset(self, rows: list[int]) -> "Images":
        """Return some of the images."""
        found = copy.copy(self)
        found.paths, found.kinds = [self.paths[row] for row in rows], [self.kinds[row] for row in rows]
        found.features_NDhw, found.mask_NHW = self.features_NDhw[rows], self.mask_NHW[rows]
        found.label_N = self.label_N[rows]
        return found

    def held_out(self, share: float) -> tuple["Images", "Images"]:
        """Split the images: those left, and a share of each kind, drawn by name."""
        held: list[int] = []
        for defective in (False, True):
            rows = self.rows(defective=defective)
            names = [Path(self.paths[row]).name for row in rows]
            chosen = draw(names, round(share * len(rows)), seed=0, purpose="validation of a study")
            held += [rows[index] for index in chosen]
        left = sorted(set(range(len(self.paths))) - set(held))
        return self.subset(left), self.subset(sorted(held))

    def rows(self, *, defective: bool) -> list[int]:
        """Return the rows of the normal or of the defective images."""
        return [row for row, label in enumerate(self.label_N.tolist()) if label == defective]


class Study:
    """One negative bank, and everything that is measured with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        size = tuple(options.image_size)
        self.model = ExDD(
            backbone="resnet18", weights=options.weights, image_size=size, negative_ratio=options.ratio
        ).eval()
        data = KSDD2(options.root, num_workers=2, augmentations=Resize(size, antialias=True))  # masks as well
        data.setup()
        start = time.perf_counter()
        self.train = Images(self.model, data, "train")
        self.build_seconds = time.perf_counter() - start
        if options.split == "validation":
            self.train, self.test = self.train.held_out(HELD_OUT)
        else:
            self.test = Images(self.model, data, "test")
        self.size = size
        self.builder = self._builder("mask")
        start = time.perf_counter()
        self._add_normal(self.builder)
        self.builder.build_negative_bank()
        self.model.model.negative_bank.look_around(NEIGHBORHOOD)  # for `normal` and `paper`
        self.build_seconds += time.perf_counter() - start
        self.negative = self._distances(self.model.model.negative_bank)
        self.known: dict[tuple[str, str | None], dict[str, float]] = {}

    def _builder(self, positive_patches: str) -> BankBuilder:
        settings = SimpleNamespace(**{**self.model.settings, "positive_patches": positive_patches})
        return BankBuilder(self.model.model, settings)

    def _add_normal(self, builder: BankBuilder) -> None:
        blank = torch.zeros(3, *self.size)
        for row in self.train.rows(defective=False):
            builder.add_normal(self.train.paths[row], blank, self.train.features_NDhw[row])

    def _distances(self, bank: Any) -> PatchDistances:
        """Measure the test patches' distances to a bank."""
        found = []
        for features in self.test.features_NDhw.split(16):
            patches = features.flatten(2).transpose(1, 2).contiguous()
            found.append(bank.distances(patches, neighborhood=True, num_ranked=3))
        columns = [torch.cat([getattr(each, name) for each in found]) for name in ("nearest", "neighborhood", "ranked")]
        return PatchDistances(columns[0], columns[1], found[0].dimension, columns[2])

    def run(self, rows: list[int], positive_patches: str = "mask", only: str | None = None) -> dict[str, Any]:
        """Build the positive bank from some defective training images; score the test images by every method.

        Args:
            rows: Rows of the defective training images.
            positive_patches: How defect patches are chosen.
            only: Class of the defective test images to look at; all by default.

        Returns:
            Metrics of every method, seconds that the calibration took, and its weights.
        """
        model, builder = self.model.model, self._builder(positive_patches)
        builder.negative = self.builder.negative
        model.positive_bank.clear()
        blank = torch.zeros(3, *self.size)
        for row in rows:
            mask_HW = self.train.mask_NHW[row] if positive_patches == "mask" else None
            builder.add_defective(self.train.paths[row], blank, self.train.features_NDhw[row], mask_HW)
        builder.build_positive_bank()
        model.positive_bank.look_around(NEIGHBORHOOD)
        start = time.perf_counter()
        builder.fill_calibration_set()
        self.model.calibrate()
        seconds = time.perf_counter() - start
        positive = self._distances(model.positive_bank) if rows else None
        keep = torch.tensor(
            [
                only is None or not label or name == only
                for label, name in zip(self.test.label_N, self.test.kinds, strict=True)
            ]
        )
        result: dict[str, Any] = {
            "seconds": seconds,
            "weights": model.calibration.weights.tolist(),
            "entries": len(model.positive_bank),
        }
        for method in METHODS if positive_patches == "mask" and only is None else ("normal", "calibrated"):
            name = method if rows or method == "calibrated" else "normal"
            key = (name, only)  # `normal` depends on the negative bank alone
            if name == "calibrated" or key not in self.known:
                self.known[key] = self._metrics(name, positive, keep)
            result[method] = self.known[key]
            if name == "paper":
                del self.known[key]
        return result

    def _metrics(self, method: str, positive: PatchDistances | None, keep: Tensor) -> dict[str, float]:
        rule = get_scoring(method, self.model.model.calibration.coefficients)
        score_N = rule.image(self.negative, positive)[keep]
        label_N = self.test.label_N[keep]
        grid = self.test.features_NDhw.shape[-2:]
        values_NP = rule.map_values(rule.patch(self.negative, positive))[keep]
        maps = [
            self.model.model.anomaly_map(chunk.reshape(-1, 1, *grid), self.size)[:, 0] for chunk in values_NP.split(64)
        ]
        masks = self.test.mask_NHW[keep]
        return {
            "image_AUROC": float(binary_auroc(score_N, label_N)),
            "image_AP": float(binary_average_precision(score_N, label_N.int())),
            "pixel_AP": float(binary_average_precision(torch.cat(maps).flatten(), masks.flatten().int())),
        }


def jobs(study: Study) -> list[dict[str, Any]]:
    """List everything that is to be measured."""
    train = study.train
    defective = train.rows(defective=True)
    names = [Path(train.paths[row]).name for row in defective]
    found: list[dict[str, Any]] = []
    for part, counts in (("defects", COUNTS), ("weak", (5, 25, 100))):
        for count in sorted({min(count, len(defective)) for count in counts}):
            for seed in range(1 if count in {0, len(defective)} else 5):
                chosen = draw(names, count, seed=seed, purpose="calibration study")
                rows = [defective[index] for index in chosen]
                patches = "mask" if part == "defects" else "farthest"
                found.append({"part": part, "key": count, "seed": seed, "rows": rows, "positive_patches": patches})
    for name in sorted({train.kinds[row] for row in defective} - {""}):
        rows = [row for row in defective if train.kinds[row] != name]
        found.append({"part": "unseen", "key": name, "seed": 0, "rows": rows, "only": name})
    return found


def tables(results: list[dict[str, Any]]) -> str:
    """Summarise the results: one table a part."""
    titles = {
        "defects": "## With N defective training images",
        "weak": "## Without masks (`positive_patches: farthest`)",
        "unseen": "## Defects of a class that training has not seen",
    }
    pages = []
    for part, title in titles.items():
        rows = []
        keys = dict.fromkeys(result["key"] for result in results if result["part"] == part)
        for key in keys:
            ours = [result for result in results if (result["part"], result["key"]) == (part, key)]
            for method in [method for method in METHODS if method in ours[0]]:
                row = {"unseen class" if part == "unseen" else "defects": str(key), "score": method}
                row |= {t: spread([100 * r[method][m] for r in ours], 1) for m, t in METRICS.items()}
                rows.append(row)
        if rows:
            pages.append(f"{title}\n\n{markdown_table(rows)}")
    return "\n\n".join(pages)


def summary(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Put the means of the first table side by side, one row for each number of defective training images."""
    rows = []
    for key in dict.fromkeys(result["key"] for result in results if result["part"] == "defects"):
        ours = [result for result in results if (result["part"], result["key"]) == ("defects", key)]
        row = {"defects": str(key)}
        for metric, title in METRICS.items():
            means = [f"{statistics.mean(100 * result[method][metric] for result in ours):.1f}" for method in METHODS]
            row[f"{title}: {' / '.join(METHODS)}"] = " / ".join(means)
        rows.append(row)
    return rows


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the metrics over the number of defective training images."""
    import matplotlib as mpl  # noqa: PLC0415  only where a figure is asked for

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    _, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    colours = {"normal": "#666666", "paper": "#c05a00", "calibrated": "#0060a8"}
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for method in METHODS:
            keys = sorted({result["key"] for result in results if result["part"] == "defects"})
            values = [
                [100 * r[method][metric] for r in results if (r["part"], r["key"]) == ("defects", key)] for key in keys
            ]
            middle = [statistics.mean(v) for v in values]
            where = range(len(keys))
            panel.plot(where, middle, "o-", color=colours[method], label=method, markersize=4)
            panel.fill_between(
                where, [min(v) for v in values], [max(v) for v in values], color=colours[method], alpha=0.15
            )
        panel.set_xticks(range(len(keys)), [str(key) for key in keys])
        panel.set_title(title)
        panel.set_xlabel("defective training images")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("%")
    panels[0].legend()
    plt.savefig(path, dpi=110)


def main() -> None:
    """Run the study and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[224, 224])
    parser.add_argument("--ratio", type=float, default=0.01, help="coreset ratio of normal patches")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    parser.add_argument("--figure", type=Path, help="picture of the first table")
    options = parser.parse_args()
    settings = {"data": options.root.name, "image_size": options.image_size, "ratio": options.ratio}
    if options.split != "test":
        settings["split"] = options.split
    results = known_results(options.output, settings)
    study = Study(options)
    for job in jobs(study):
        name = {"part": job["part"], "key": job["key"], "seed": job["seed"]}
        if any(all(result[k] == v for k, v in name.items()) for result in results):
            continue
        result = study.run(job["rows"], job.get("positive_patches", "mask"), job.get("only"))
        results.append({**name, **result})
        shown = {m: [round(100 * v, 1) for v in result[m].values()] for m in METHODS if m in result}
        print(name, shown, f"{result['seconds']:.1f} s", [round(w, 1) for w in result["weights"]], flush=True)
        save_results(options.output, settings, results)
    with_masks = [result for result in results if result["part"] == "defects"]
    full = [result["seconds"] for result in with_masks if result["key"] == max(COUNTS)] or [results[-1]["seconds"]]
    times = {
        "training without calibration": f"{study.build_seconds:.0f} s (features and negative bank)",
        "calibration with all images": f"{statistics.mean(full):.1f} s, "
        f"{100 * statistics.mean(full) / study.build_seconds:.1f} % of it",
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings, **times}.items())
    page = f"# The calibrated score on {settings['data']}, {options.split} images\n\n{tables(results)}\n\n{facts}\n"
    options.output.with_suffix(".md").write_text(page)
    short = options.output.with_name(f"{options.output.name}_summary")
    title = f"# The calibrated score on {settings['data']}, {options.split} images, means of the draws"
    short.with_suffix(".md").write_text(f"{title}\n\n{markdown_table(summary(results))}\n\n{facts}\n")
    content = {"machine": describe(), "settings": settings, "times": times, "summary": summary(results)}
    short.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(tables(results))
    if options.figure is not None:
        figure(results, options.figure)


if __name__ == "__main__":
    main()
