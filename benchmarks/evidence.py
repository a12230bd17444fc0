"""What each kind of evidence is worth, on all development sets, over the number of defective training images.

    python benchmarks/evidence.py --data DATA --weights FILE --output NAME [--split validation] [--figure FILE]

DATA holds the sets in KSDD2's layout, a folder each. Features are extracted once a set and the negative bank is built
once; every draw of defective training images then builds its own positive bank, boundary and calibration. Rules:

- `patchcore`, `paper`, `ratio`: PatchCore's score on the same bank, the paper's, and the plain ratio of distances;
- `N`, `K`, `H`: unfamiliar, known kind by neighbours, known kind by the learnt boundary, each alone;
- `combined`: what ExDD uses by default; `patch map`: the same score with the map of patches, as before the refinement.

Parts: `defects`, with N defective training images, several draws each; `unseen`, all of them but those of one kind,
tested on that kind (`sources.csv` names them). With `--split validation` a part of the training images takes the place
of the test images: that is where choices are made. Results are written as they come; the same command goes on where it
was interrupted.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchvision.transforms.v2 import Resize
from tqdm import tqdm

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.data.splits import draw
from anomalib_exdd.models.exdd.calibration import Piece
from anomalib_exdd.models.exdd.scoring import CALIBRATED_NEIGHBORS, EPSILON, PatchDistances, get_scoring, top_mean
from anomalib_exdd.models.exdd.training import BankBuilder
from machine import describe, known_results, markdown_table, save_results, spread

IMAGE_SIZES = {
    "commutator": (632, 224),
    "composite": (256, 256),
    "screw": (320, 320),
    "magnetic_tile": (224, 224),
}
COUNTS = (0, 1, 2, 5, 10, 25)  # and all
METRICS = {
    "image_AUROC": "image AUROC",
    "image_AP": "image AP",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "AUPRO": "AUPRO",
}
NEIGHBORHOOD = 3
RULES = ("patchcore", "paper", "ratio", "N", "K", "H", "patch map", "combined")
AUPRO_LIMIT = 0.3  # of the false positive rate, as Anomalib's metric
RATES = ((0.01, 0.05), (0.05, 0.05), (0.01, 0.01))  # allowed false rejects and false accepts
HELD_OUT = 0.3  # share of the training images that choices are made on
_BINS = 1 << 16


class Images:
    """Features, labels and masks of one split, by path."""

    def __init__(self, model: ExDD, data: KSDD2, split: str) -> None:
        features, fine, masks, labels = [], [], [], []
        self.paths: list[str] = []
        self.kinds: list[str] = []
        pre_processor: Any = model.pre_processor
        torch.manual_seed(0)
        loaders = [data.test_dataloader()] if split == "test" else [data.train_dataloader()]
        with torch.inference_mode():
            for loader in loaders:
                for batch in tqdm(loader, f"Features of {split} images", leave=False):
                    patches, finer = model.model.extract(pre_processor(batch.image))
                    features.append(patches)
                    fine.append(torch.as_tensor(finer).half())
                    masks.append(batch.gt_mask.bool())
                    labels.append(batch.gt_label.bool())
                    self.paths += batch.image_path
                    self.kinds += batch.kinds
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        self.paths, self.kinds = [self.paths[i] for i in order], [self.kinds[i] for i in order]
        self.features_NDhw, self.mask_NHW = torch.cat(features)[order], torch.cat(masks)[order]
        self.fine_NFhw = torch.cat(fine)[order]
        self.label_N = torch.cat(labels)[order]

    def subset(self, rows: list[int]) -> "Images":
        """Return some of the images."""
        found = copy.copy(self)
        found.paths, found.kinds = [self.paths[row] for row in rows], [self.kinds[row] for row in rows]
        found.features_NDhw, found.mask_NHW = self.features_NDhw[rows], self.mask_NHW[rows]
        found.label_N, found.fine_NFhw = self.label_N[rows], self.fine_NFhw[rows]
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
    """One set with one negative bank, and everything that is measured with it."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.name = root.name
        self.size = IMAGE_SIZES.get(root.name, (224, 224)) if options.image_size is None else tuple(options.image_size)
        self.model = ExDD(
            backbone="resnet18", weights=options.weights, image_size=self.size, negative_ratio=options.ratio
        ).eval()
        data = KSDD2(root, num_workers=0, augmentations=Resize(list(self.size), antialias=True))  # masks as well
        data.setup()
        start = time.perf_counter()
        self.train = Images(self.model, data, "train")
        self.build_seconds = time.perf_counter() - start
        if options.split == "validation":
            self.train, self.test = self.train.held_out(HELD_OUT)
        else:
            self.test = Images(self.model, data, "test")
        for bank in (self.model.model.negative_bank, self.model.model.positive_bank):
            bank.num_neighbors = NEIGHBORHOOD  # for `patchcore` and `paper`
        self.builder = self._builder("mask")
        start = time.perf_counter()
        self._add_normal(self.builder)
        self.builder.build_negative_bank()
        self.build_seconds += time.perf_counter() - start
        self.negative = self._distances(self.model.model.negative_bank)
        self.known: dict[str, dict[str, float]] = {}

    def _builder(self, positive_patches: str) -> BankBuilder:
        settings = self.model.settings
        return BankBuilder(self.model.model, replace(settings, positive_patches=positive_patches))

    def _add_normal(self, builder: BankBuilder) -> None:
        blank = torch.zeros(3, *self.size)
        for row in self.train.rows(defective=False):
            builder.add_normal(self.train.paths[row], blank, self.train.features_NDhw[row])

    def _add_defective(self, builder: BankBuilder, images: Images, row: int) -> None:
        mask_HW = images.mask_NHW[row] if builder.settings.positive_patches == "mask" else None
        fine_Fhw, blank = images.fine_NFhw[row].float(), torch.zeros(3, *self.size)
        builder.add_defective(images.paths[row], blank, images.features_NDhw[row], mask_HW, fine_Fhw)

    def _log_odds(self) -> Tensor | None:
        """Return the boundary's log-odds of the test patches, (N, P), if there is one."""
        boundary = self.model.model.boundary
        return torch.cat([boundary(patches) for patches in self._chunks()]) if boundary.is_fitted else None

    def _chunks(self) -> Iterable[Tensor]:
        """Yield the patch features of some test images at a time, (B, P, D)."""
        for features in self.test.features_NDhw.split(16):
            yield features.flatten(2).transpose(1, 2).contiguous()

    def _distances(self, bank: Any) -> PatchDistances:
        """Measure the test patches' distances to a bank."""
        found = [bank.distances(patches, neighborhood=True, num_ranked=3) for patches in self._chunks()]
        columns = [torch.cat([getattr(each, name) for each in found]) for name in ("nearest", "neighborhood", "ranked")]
        return PatchDistances(columns[0], columns[1], found[0].dimension, columns[2])

    def build(self, rows: list[int], positive_patches: str = "mask") -> float:
        """Build positive bank, boundary and calibration from some defective training images.

        Returns:
            Seconds that boundary and calibration took.
        """
        model, builder = self.model.model, self._builder(positive_patches)
        builder.negative = self.builder.negative
        model.positive_bank.clear()
        for row in rows:
            self._add_defective(builder, self.train, row)
        builder.build_positive_bank()
        start = time.perf_counter()
        builder.fill_calibration_set()
        self.model.calibrate(learn_boundary=False)
        return time.perf_counter() - start

    def run(self, rows: list[int], positive_patches: str = "mask", only: str | None = None) -> dict[str, Any]:
        """Train with some defective images; score the test images by every rule.

        Args:
            rows: Rows of the defective training images.
            positive_patches: How defect patches are chosen.
            only: Kind of the defective test images to look at; all by default.

        Returns:
            Metrics of every rule, what the decisions came to, seconds that boundary and calibration took, and weights.
        """
        seconds = self.build(rows, positive_patches)
        model = self.model.model
        positive = self._distances(model.positive_bank) if rows else None
        boundary = self._log_odds()
        labels = zip(self.test.label_N.tolist(), self.test.kinds, strict=True)
        keep_N = torch.tensor([only is None or not label or kind == only for label, kind in labels])
        result: dict[str, Any] = {
            "seconds": seconds,
            "weights": model.calibration.known_weights.tolist(),
            "entries": len(model.positive_bank),
        }
        for name in RULES:
            rule_name = name if rows or name in {"N", "patch map", "combined"} else "patchcore"
            if name in {"K", "H"} and len(model.calibration.pieces) < 2:
                rule_name = "N"
            key = f"{rule_name} {only}"  # some depend on the negative bank alone
            if rule_name not in {"N", "patchcore"} or key not in self.known:
                self.known[key] = self._metrics(rule_name, positive, boundary, keep_N)
            result[name] = self.known[key]
        if only is None:
            result["decisions"] = self._decisions(positive, boundary)
        return result

    def _metrics(
        self, name: str, positive: PatchDistances | None, boundary_NP: Tensor | None, keep_N: Tensor
    ) -> dict[str, float]:
        model = self.model.model
        coefficients = model.calibration.coefficients
        smoothed: Callable[[Tensor], Tensor] = torch.clone
        if name in {"N", "K", "H"}:
            piece = model.calibration.pieces["NKH".index(name)]
            values_NP = _piece(piece, self.negative, positive, boundary_NP)
            score_N = top_mean(values_NP, model.calibration.top_fraction)
        else:
            scoring = {"patchcore": "normal", "combined": "calibrated", "patch map": "calibrated"}.get(name, name)
            rule = get_scoring(scoring, coefficients, boundary_NP)
            score_N = rule.image(self.negative, positive)
            values_NP = rule.map_values(rule.patch(self.negative, positive))
            smoothed = rule.smoothed_values
        label_N, score_N = self.test.label_N[keep_N], score_N[keep_N]
        grid = self.test.features_NDhw.shape[-2:]
        if name == "combined":
            patch_scores = rule.patch(self.negative, positive)[keep_N].reshape(-1, *grid)
            chunks = zip(patch_scores.split(64), self.test.fine_NFhw[keep_N].split(64), strict=True)
            maps = [model.draw_map(scores, self.size, model.inside(fine))[:, 0] for scores, fine in chunks]
        else:
            maps = [
                smoothed(model.anomaly_map(chunk.reshape(-1, 1, *grid), self.size)[:, 0])
                for chunk in values_NP[keep_N].split(64)
            ]
        return {
            "image_AUROC": float(binary_auroc(score_N, label_N)),
            "image_AP": float(binary_average_precision(score_N, label_N.int())),
            **pixel_metrics(torch.cat(maps), self.test.mask_NHW[keep_N]),
        }

    def _decisions(self, positive: PatchDistances | None, boundary_NP: Tensor | None) -> dict[str, dict[str, float]]:
        """Return what the decisions come to on the test images, at several allowed rates."""
        calibration = self.model.model.calibration
        rule = get_scoring("calibrated", calibration.coefficients, boundary_NP)
        probability_N, label_N = rule.image(self.negative, positive), self.test.label_N
        found = {}
        for rates in RATES:
            decisions = calibration.decisions(*rates)
            accepted, rejected = probability_N < decisions.accept, probability_N >= decisions.reject
            found["{:g} / {:g}".format(*rates)] = {
                "review": float((~accepted & ~rejected).float().mean()),
                "review_good": float((~accepted & ~rejected)[~label_N].float().mean()),
                "false_rejects": float(rejected[~label_N].float().mean()),
                "false_accepts": float(accepted[label_N].float().mean()),
            }
        return found


def _piece(piece: Piece, negative: PatchDistances, positive: PatchDistances | None, boundary: Tensor | None) -> Tensor:
    """Compute a piece of evidence for patches, float32, shape (N, P)."""
    columns = [negative.nearest, *_logs(negative)]
    if positive is not None:
        columns += [-column for column in _logs(positive)]
        if boundary is not None:
            columns.append(boundary)
    total = torch.full_like(negative.nearest, piece.bias)
    for weight, column in zip(piece.weights.tolist(), columns, strict=False):
        total += weight * column
    return total


def _logs(distances: PatchDistances) -> list[Tensor]:
    ranked: Any = distances.ranked
    return [ranked[..., k - 1].clamp_min(EPSILON).log() for k in CALIBRATED_NEIGHBORS]


def pixel_metrics(maps_NHW: Tensor, mask_NHW: Tensor) -> dict[str, float]:
    """Compute AUROC, average precision and AUPRO of pixels, from 65,536 equal steps of the map's range."""
    low, high = maps_NHW.amin(), maps_NHW.amax()
    step_M = ((maps_NHW - low) / (high - low).clamp_min(1e-12) * (_BINS - 1)).flatten().to(torch.int64)
    mask_M = mask_NHW.flatten()
    hits, misses = (torch.bincount(step_M[chosen], minlength=_BINS).flip(0).double() for chosen in (mask_M, ~mask_M))
    true, false = hits.cumsum(0), misses.cumsum(0)
    precision = true / (true + false).clamp_min(1)
    auroc = ((true - hits / 2) * misses).sum() / (true[-1] * false[-1])
    # Overlap of regions: every pixel counts by the inverse of its region's size.
    shares = torch.from_numpy(_region_shares(mask_NHW.numpy())).flatten()[mask_M]
    overlap = torch.bincount(step_M[mask_M], weights=shares, minlength=_BINS).flip(0).cumsum(0)
    rates = np.append(0.0, (false / false[-1]).numpy())
    limits = np.append(rates[rates < AUPRO_LIMIT], AUPRO_LIMIT)
    aupro = np.trapezoid(np.interp(limits, rates, np.append(0.0, overlap.numpy())), limits) / AUPRO_LIMIT
    return {
        "pixel_AUROC": float(auroc),
        "pixel_AP": float((precision * hits / true[-1]).sum()),
        "AUPRO": float(aupro),
    }


def _region_shares(mask_NHW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return 1 / (its region's pixels x number of regions) for every pixel of a region, 0 elsewhere, (N, H, W)."""
    shares, regions = np.zeros(mask_NHW.shape), 0
    for share_HW, mask_HW in zip(shares, mask_NHW, strict=True):
        label_HW, found = ndimage.label(mask_HW, structure=np.ones((3, 3)))
        sizes = np.bincount(label_HW.ravel(), minlength=found + 1)
        share_HW[mask_HW] = (1 / sizes)[label_HW[mask_HW]]
        regions += found
    return shares / max(1, regions)


def jobs(study: Study, draws: int) -> list[dict[str, Any]]:
    """List everything that is to be measured on a set."""
    train = study.train
    defective = train.rows(defective=True)
    names = [Path(train.paths[row]).name for row in defective]
    found: list[dict[str, Any]] = []
    for count in sorted({min(count, len(defective)) for count in (*COUNTS, len(defective))}):
        for seed in range(1 if count in {0, len(defective)} else draws):
            chosen = draw(names, count, seed=seed, purpose="calibration study")
            key = "all" if count == len(defective) else count
            found.append({"part": "defects", "key": key, "seed": seed, "rows": [defective[i] for i in chosen]})
    kinds = sorted({train.kinds[row] for row in defective} - {""})
    for kind in kinds if len(kinds) > 1 else []:
        rows = [row for row in defective if train.kinds[row] != kind]
        found.append({"part": "unseen", "key": kind, "seed": 0, "rows": rows, "only": kind})
    return found


def summary(results: list[dict[str, Any]]) -> str:
    """Summarise the results: means over sets and the worst set."""
    return "\n\n".join(f"## {title}\n\n{markdown_table(rows)}" for title, rows in _overall(results))


def tables(results: list[dict[str, Any]]) -> str:
    """Return a table a set and part, and what the decisions come to."""
    pages = []
    sets = list(dict.fromkeys(result["set"] for result in results))
    for name in sets:
        for part, title in (("defects", "defective training images"), ("unseen", "kind not seen in training")):
            ours = [result for result in results if (result["set"], result["part"]) == (name, part)]
            rows = []
            for key in dict.fromkeys(result["key"] for result in ours):
                of_key = [result for result in ours if result["key"] == key]
                for rule in RULES:
                    row = {title: str(key), "rule": rule}
                    row |= {t: spread([100 * r[rule][m] for r in of_key], 1) for m, t in METRICS.items()}
                    rows.append(row)
            if rows:
                pages.append(f"## {name}: {title}\n\n{markdown_table(rows)}")
    decided = [result for result in results if "decisions" in result and result["key"] != 0]
    rows = []
    for name in sets:
        for key in dict.fromkeys(result["key"] for result in decided if result["set"] == name):
            ours = [result["decisions"] for result in decided if (result["set"], result["key"]) == (name, key)]
            for rates in ours[0]:
                row = {"set": name, "defects": str(key), "allowed false rejects / accepts": rates}
                for figure in ("review", "review_good", "false_rejects", "false_accepts"):
                    row[f"{figure.replace('_', ' ')}, %"] = spread([100 * each[rates][figure] for each in ours], 1)
                rows.append(row)
    pages.append(f"## Decisions\n\n{markdown_table(rows)}")
    return "\n\n".join(pages)


def _overall(results: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Compare the rules over all sets: means of the sets' means, and the worst set and key beside PatchCore."""
    found = []
    for part in ("defects", "unseen"):
        cells: dict[tuple[str, Any], list[dict[str, Any]]] = {}
        for result in results:
            if result["part"] == part:
                cells.setdefault((result["set"], result["key"]), []).append(result)
        if not cells:
            continue
        rows = []
        for rule in RULES:
            row = {"rule": rule}
            for metric, title in METRICS.items():
                means = {
                    cell: statistics.mean(100 * each[rule][metric] for each in ours) for cell, ours in cells.items()
                }
                behind = {
                    cell: value - statistics.mean(100 * each["patchcore"][metric] for each in cells[cell])
                    for cell, value in means.items()
                }
                sets = dict.fromkeys(name for name, _ in cells)
                of_sets = [statistics.mean(v for (name, _), v in means.items() if name == each) for each in sets]
                worst = min(behind, key=lambda cell: behind[cell])
                row[title] = f"{statistics.mean(of_sets):.1f}"
                row[f"{title}, worst beside patchcore"] = f"{behind[worst]:+.1f} ({worst[0]}, {worst[1]})"
            rows.append(row)
        title = "All sets, mean over numbers of defective images" if part == "defects" else "All sets, unseen kinds"
        found.append((title, rows))
    return found


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Draw image AP over the number of defective training images, one panel a set."""
    import matplotlib as mpl  # noqa: PLC0415  only where a figure is asked for

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    shown = [result for result in results if result["part"] == "defects"]
    sets = list(dict.fromkeys(result["set"] for result in shown))
    _, panels = plt.subplots(2, len(sets), figsize=(3.1 * len(sets), 5.6), layout="constrained", squeeze=False)
    colours = {"patchcore": "#666666", "paper": "#c05a00", "N": "#999999", "K": "#2a9d5c", "H": "#a04fb0"}
    colours["combined"] = "#0060a8"
    for row, metric in enumerate(("image_AP", "pixel_AP")):
        for panel, name in zip(panels[row], sets, strict=True):
            ours = [result for result in shown if result["set"] == name]
            keys = list(dict.fromkeys(result["key"] for result in ours))
            for rule, colour in colours.items():
                middle = [statistics.mean(100 * r[rule][metric] for r in ours if r["key"] == key) for key in keys]
                wide = {"linewidth": 2.2, "zorder": 3} if rule == "combined" else {"linewidth": 1.2}
                panel.plot(range(len(keys)), middle, "o-", color=colour, label=rule, markersize=3, **wide)
            panel.set_xticks(range(len(keys)), [str(key) for key in keys])
            panel.set_title(name.replace("_", " "))
            panel.grid(alpha=0.3)
        panels[row][0].set_ylabel(f"{METRICS[metric]}, %")
    for panel in panels[-1]:
        panel.set_xlabel("defective training images")
    panels[0][0].legend(fontsize=8)
    plt.savefig(path, dpi=110)


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all studies of these sets have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument(
        "--sets", nargs="*", default=list(IMAGE_SIZES), help="names of the sets; none: only write the tables"
    )
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    return parser


def main() -> None:
    """Run the study and write it down."""
    parser = study_parser(__doc__)
    parser.add_argument("--image-size", type=int, nargs=2, help="input size of sets that are not listed here")
    parser.add_argument("--ratio", type=float, default=0.01, help="coreset ratio of normal patches")
    parser.add_argument("--draws", type=int, default=5, help="draws of each number of defective images")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--figure", type=Path, help="picture of image and pixel AP")
    options = parser.parse_args()
    settings = {"ratio": options.ratio, "split": options.split, "image_sizes": IMAGE_SIZES}
    settings = json.loads(json.dumps(settings))
    results = known_results(options.output, settings)
    for name in options.sets:
        study = Study(options.data / name, options)
        for job in jobs(study, options.draws):
            where = {"set": name, "part": job["part"], "key": job["key"], "seed": job["seed"]}
            if any(all(result[k] == v for k, v in where.items()) for result in results):
                continue
            result = study.run(job["rows"], only=job.get("only"))
            results.append({**where, "build_seconds": study.build_seconds, **result})
            shown = {rule: [round(100 * v, 1) for v in result[rule].values()] for rule in ("patchcore", "combined")}
            print(*where.values(), shown, f"{result['seconds']:.1f} s", flush=True)
            save_results(options.output, settings, results)
        del study
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    title = f"# Evidence of defects, {options.split} images"
    options.output.with_suffix(".md").write_text(f"{title}\n\n{tables(results)}\n\n{facts}\n")
    short = options.output.with_name(f"{options.output.name}_summary")
    short.with_suffix(".md").write_text(f"{title}, all sets\n\n{summary(results)}\n\n{facts}\n")
    short.with_suffix(".json").write_text(json.dumps({"machine": describe(), "settings": settings}, indent=1) + "\n")
    print(summary(results))
    if options.figure is not None:
        figure(results, options.figure)


if __name__ == "__main__":
    main()
