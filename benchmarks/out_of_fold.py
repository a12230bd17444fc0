"""Are good training images, judged without their own patches, as far from normal as new ones?

    python benchmarks/out_of_fold.py --data DATA --weights FILE --output NAME

Thresholds and weights of the calibrated score rest on it. As in `evidence.py`, a part of the training images is held
out. The distance of an image is the mean of its highest patches' distances to the negative bank:

- `calibration`: of good training images, as calibration measures it, from the patches that it has kept;
- `exact`: the same from all of their patches;
- `new`: of the good images held out.

What `calibration` misses beside `exact` comes from the choice of patches; what `exact` differs from `new`, from the
bank: without an image's own entries it has holes that a bank selected without the image would not have.
"""

from typing import Any

import torch
from torch import Tensor

from anomalib_exdd.models.exdd.calibration_set import others_distances
from anomalib_exdd.models.exdd.scoring import top_count, top_mean
from evidence import Study, study_parser
from machine import describe, known_results, markdown_table, save_results


def distances(study: Study) -> dict[str, list[float]]:
    """Train with all defects; return the distances of good images."""
    study.build(study.train.rows(defective=True))
    model = study.model.model
    bank, kept, fraction = model.negative_bank, model.calibration_set, model.calibration.top_fraction
    measured = kept.measure(bank, model.positive_bank, model.boundary, model.folds(0.0))
    assert measured is not None  # noqa: S101  there are many good images
    row_of_train = {path: row for row, path in enumerate(study.train.paths)}
    found: dict[str, list[float]] = {"calibration": [], "exact": []}
    for image in (~kept.defective).nonzero().flatten().tolist():
        path = kept.sources[image]
        count = top_count(int(kept.patches[image]), fraction)
        chosen = (measured.image == image) & ~measured.sampled
        found["calibration"].append(float(measured.log_negative[chosen, 0].exp().topk(count).values.mean()))
        patches = study.train.features_NDhw[row_of_train[path]].flatten(1).T.contiguous()
        own = [[bank.sources.index(path)]]
        nearest = others_distances(patches, torch.zeros(len(patches)).long(), own, bank.vectors, bank.source, 1)
        found["exact"].append(float(nearest.topk(count, dim=0).values.mean()))
    new_N = top_mean(study.negative.nearest.flatten(1), fraction)[~study.test.label_N]
    return {**found, "new": new_N.tolist()}


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Compare with new images; the unit is the spread of `exact`."""
    table = []
    for result in results:
        values: dict[str, Tensor] = {key: torch.tensor(result[key]) for key in ("calibration", "exact", "new")}
        row = {"set": result["set"], "ratio": f"{result['ratio']:g}", "entries": str(result["entries"])}
        for key in ("calibration", "exact"):
            shift = (values[key].median() - values["new"].median()) / values["exact"].std()
            row[f"{key} - new, medians in spreads"] = f"{shift:+.2f}"
        for key in ("calibration", "exact"):
            above = (values["new"] > values[key].quantile(0.9)).float().mean()
            row[f"new images above the highest tenth of `{key}`, %"] = f"{100 * above:.0f}"
        table.append(row)
    return table


def main() -> None:
    """Run the study and write it down."""
    parser = study_parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.01, 0.02, 0.1], help="of the negative bank")
    parser.add_argument("--image-size", type=int, nargs=2, help="input size; default: as in evidence.py")
    options = parser.parse_args()
    options.split = "validation"
    settings = {"image size": options.image_size}
    results = known_results(options.output, settings)
    for name in options.sets:
        for ratio in options.ratios:
            if any((result["set"], result["ratio"]) == (name, ratio) for result in results):
                continue
            options.ratio = ratio
            study = Study(options.data / name, options)
            found = {"set": name, "ratio": ratio, "entries": len(study.model.model.negative_bank)}
            results.append(found | distances(study))
            save_results(options.output, settings, results)
    page = "# Good training images out of fold, beside new good images\n\n" + markdown_table(rows(results))
    page += "\n\n" + "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    options.output.with_suffix(".md").write_text(page + "\n")


if __name__ == "__main__":
    main()
