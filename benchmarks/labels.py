"""What outlines, boxes or mere labels of the defective training images are worth.

    python benchmarks/labels.py --data DATA --weights FILE --output NAME [--split test]

As in `evidence.py`: the same sets, draws and input sizes, by default on a part of the training images. Ways to mark a
defect:

- `outline`: its mask;
- `box`: the box around it, a tenth larger on every side, given to ExDD as a box;
- `box, no outline learnt`: the same without what the patches taken from boxes teach the map;
- `box as mask`: the box given as if it were an outline;
- `label`: no mask, `positive_patches: farthest`.
"""

from pathlib import Path
from typing import Any

import torch
from scipy import ndimage
from torch import Tensor

from anomalib_exdd.data.splits import draw
from anomalib_exdd.models.exdd.training import BankBuilder
from evidence import METRICS, Images, Study, study_parser
from machine import describe, known_results, markdown_table, save_results, spread

WAYS = ("outline", "box", "box, no outline learnt", "box as mask", "label")
COUNTS = (2, 10, None)  # None: all
DRAWS = 3
GROWTH = 0.1


def boxed(mask_HW: Tensor) -> Tensor:
    """Return the mask of boxes around the defects of a mask, bool."""
    boxes_HW = torch.zeros_like(mask_HW)
    label_HW, _ = ndimage.label(mask_HW.numpy(), structure=torch.ones(3, 3))
    for place in ndimage.find_objects(label_HW):
        more = [GROWTH * (side.stop - side.start) for side in place]
        rows, columns = (
            slice(max(0, round(side.start - grown)), round(side.stop + grown))
            for side, grown in zip(place, more, strict=True)
        )
        boxes_HW[rows, columns] = True
    return boxes_HW


class MarkedStudy(Study):
    """A study whose defects are marked in one of several ways."""

    way = "outline"

    def _add_defective(self, builder: BankBuilder, images: Images, row: int) -> None:
        mask_HW = images.mask_NHW[row]
        builder.add_defective(
            images.paths[row],
            torch.zeros(3, *self.size),
            images.features_NDhw[row],
            {"outline": mask_HW, "label": None}.get(self.way, boxed(mask_HW)),
            None if self.way == "box, no outline learnt" else images.fine_NFhw[row].float(),
            has_boxes=self.way in {"box", "box, no outline learnt"},
        )


def measure(study: MarkedStudy) -> list[dict[str, Any]]:
    """Train and test with every way and number of defective images."""
    defective = study.train.rows(defective=True)
    names = [Path(study.train.paths[row]).name for row in defective]
    found = []
    for count in COUNTS:
        if count and count >= len(names):
            continue
        for seed in range(1 if count is None else DRAWS):
            rows = [defective[i] for i in draw(names, count or len(names), seed=seed, purpose="calibration study")]
            for way in WAYS:
                study.way = way
                metrics = study.run(rows, "farthest" if way == "label" else "mask")["combined"]
                found.append({"set": study.name, "count": count or "all", "seed": seed, "way": way, **metrics})
                print(found[-1], flush=True)
    return found


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Make a table of one set, or of the means of all."""
    table = []
    for count in dict.fromkeys(result["count"] for result in results):
        for way in WAYS:
            ours = [result for result in results if (result["count"], result["way"]) == (count, way)]
            row = {"defective images": str(count), "marked by": way}
            table.append(row | {title: spread([100 * r[m] for r in ours], 1) for m, title in METRICS.items()})
    return table


def main() -> None:
    """Run the study and write it down."""
    parser = study_parser(__doc__)
    parser.add_argument("--ratio", type=float, default=0.01, help="coreset ratio of normal patches")
    parser.add_argument("--split", choices=["test", "validation"], default="validation")
    options = parser.parse_args()
    options.image_size = None
    settings = {"ratio": options.ratio, "split": options.split, "growth of boxes": GROWTH}
    results = known_results(options.output, settings)
    for name in options.sets:
        if all(result["set"] != name for result in results):
            results += measure(MarkedStudy(options.data / name, options))
            save_results(options.output, settings, results)
    pages = ["# What outlines, boxes and labels are worth", "## All sets", markdown_table(rows(results))]
    for name in dict.fromkeys(result["set"] for result in results):
        pages += [f"## {name}", markdown_table(rows([result for result in results if result["set"] == name]))]
    pages.append("\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items()))
    options.output.with_suffix(".md").write_text("\n\n".join(pages) + "\n")


if __name__ == "__main__":
    main()
