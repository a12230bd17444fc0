"""Is ExDD's `normal` score PatchCore's? The same images, features and bank size; only the coreset's choice changes.

    python benchmarks/patchcore_agreement.py --root DATA --weights FILE --output NAME

One split of the data, one extraction of features, then several coresets a variant: ExDD's own selection at several
projected dimensions, and Anomalib's (sparse projection, dimension by Johnson and Lindenstrauss at 0.9, random start),
put into ExDD's bank. Image scores are ExDD's `normal`; beside them, for Anomalib's coreset, those of Anomalib's own
`PatchcoreModel` with that very bank. The spread is that of the coreset alone.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models.components.dimensionality_reduction import SparseRandomProjection
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from tqdm import tqdm

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.coreset import gaussian_projection, greedy_k_center
from anomalib_exdd.models.exdd.memory_bank import BankContent, MemoryBank
from anomalib_exdd.models.exdd.scoring import get_scoring
from machine import describe, markdown_table, spread

NUM_NEIGHBORS = 3


def features_of(model: ExDD, loader: Any) -> tuple[Tensor, Tensor]:
    """Extract the features (N, P, D) and labels (N,) of all images."""
    features, labels = [], []
    pre_processor: Any = model.pre_processor
    with torch.inference_mode():
        for batch in tqdm(loader, leave=False):
            image: Any = batch.image
            features.append(model.model.embed(pre_processor(image)).flatten(2).transpose(1, 2))
            label: Any = batch.gt_label
            labels.append(label.bool())
    return torch.cat(features), torch.cat(labels)


def exdd_coreset(dimension: int) -> Callable[[Tensor, int, int], Tensor]:
    """Return ExDD's selection at a projected dimension."""
    return lambda patches_ND, count, seed: greedy_k_center(
        patches_ND @ gaussian_projection(patches_ND.shape[1], dimension, seed), count, seed=seed
    )


def anomalib_coreset(patches_ND: Tensor, count: int, seed: int) -> Tensor:
    """Select as Anomalib's `KCenterGreedy` does, with its projection; its loop over points only is replaced."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  its `random_state` would give every row the same non-zero columns
    projection = SparseRandomProjection(eps=0.9)
    projection.fit(patches_ND)
    return greedy_k_center(projection.transform(patches_ND), count, seed=seed)


def normal_scores(bank: MemoryBank, features_NPD: Tensor) -> Tensor:
    """Score images by ExDD's `normal` rule."""
    rule = get_scoring("normal")
    return torch.cat([rule.image(bank.distances(chunk, neighborhood=True), None) for chunk in features_NPD.split(16)])


def anomalib_scores(model: PatchcoreModel, features_NPD: Tensor) -> Tensor:
    """Score images by Anomalib's own functions."""
    scores = []
    for chunk in features_NPD.split(16):
        flat = chunk.flatten(0, 1)
        nearest, location = model.nearest_neighbors(embedding=flat, n_neighbors=1)
        shape = (len(chunk), -1)
        scores.append(model.compute_anomaly_score(nearest.reshape(shape), location.reshape(shape), flat))
    return torch.cat(scores)


def main() -> None:
    """Run the comparison and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[224, 224])
    parser.add_argument("--ratio", type=float, default=0.005)
    parser.add_argument("--seeds", type=int, default=10, help="coresets a variant")
    parser.add_argument("--split-seeds", type=int, nargs="+", default=[0], help="splits of the data")
    parser.add_argument("--output", type=Path, help="result file without ending; writes NAME.json and NAME.md")
    options = parser.parse_args()
    variants = {
        "ExDD, 128 dimensions": exdd_coreset(128),
        "ExDD, 317 dimensions": exdd_coreset(317),
        "ExDD, unprojected": exdd_coreset(384),
        "Anomalib's coreset": anomalib_coreset,
    }
    results: list[dict[str, Any]] = []
    for split in options.split_seeds:
        model = ExDD(backbone="resnet18", weights=options.weights, image_size=tuple(options.image_size)).eval()
        data = KSDD2(options.root, seed=split, num_defects=0, num_workers=2, val_split_ratio=0.2)
        data.setup()
        torch.manual_seed(split)  # the order of the training images decides ties and first centres
        train_NPD, _ = features_of(model, data.train_dataloader())
        test_NPD, label_N = features_of(model, data.test_dataloader())
        patches_ND = train_NPD.flatten(0, 1)
        count = round(options.ratio * len(patches_ND))
        for name, select in variants.items():
            for seed in range(options.seeds):
                chosen = select(patches_ND, count, seed)
                bank = MemoryBank(NUM_NEIGHBORS)
                nothing = torch.zeros(count, dtype=torch.int64)
                bank.fill(BankContent(patches_ND[chosen], nothing, nothing.expand(2, -1).T, ["train"]))
                scored = {name: normal_scores(bank, test_NPD)}
                if select is anomalib_coreset:
                    theirs = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False, num_neighbors=3).eval()
                    theirs.memory_bank = patches_ND[chosen]
                    scored["Anomalib's coreset and score"] = anomalib_scores(theirs, test_NPD)
                for label, score_N in scored.items():
                    auroc = float(binary_auroc(score_N, label_N))
                    ap = float(binary_average_precision(score_N, label_N.int()))
                    results.append({"variant": label, "split": split, "seed": seed, "AUROC": auroc, "AP": ap})
                    print(results[-1], flush=True)
    rows = []
    for label in dict.fromkeys(result["variant"] for result in results):
        for split in options.split_seeds:
            ours = [r for r in results if (r["variant"], r["split"]) == (label, split)]
            row = {"coreset": label, "split": str(split)}
            row |= {f"image {m}": spread([100 * r[m] for r in ours], 1) for m in ("AUROC", "AP")}
            rows.append(row)
    print(markdown_table(rows))
    if options.output is not None:
        content = {"machine": describe(), "results": results}
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
        facts = "\n".join(f"- {name}: {value}" for name, value in describe().items())
        title = f"# PatchCore by ExDD and by Anomalib on {options.root.name}, {options.seeds} coresets a row"
        options.output.with_suffix(".md").write_text(f"{title}\n\n{markdown_table(rows)}\n\n{facts}\n")


if __name__ == "__main__":
    main()
