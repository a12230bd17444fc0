"""Peak memory and time of building the banks from features of full KSDD2 size, stage by stage.

    python benchmarks/memory.py --output NAME [--images 2085 --patches 2212 --dimension 1536] [--store-dir FOLDER]

The features are made up (clusters of low intrinsic dimension, drawn image by image), so that neither images nor a
backbone are needed: what is measured is all that comes after the backbone, for any number of images. Peaks are of the
whole process, less what it held before the first image. They are reset between stages, which takes Linux.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from anomalib_exdd import ExDD
from anomalib_exdd.models.exdd.training import BankBuilder
from anomalib_exdd.models.exdd.training_stores import TrainingStores
from features import Clusters
from machine import describe, markdown_table

CLUSTERS = 200


class Images:
    """Draws the features of images; defects have a cluster of their own."""

    def __init__(self, grid: tuple[int, int], dimension: int) -> None:
        self.grid = grid
        self.clusters = Clusters(CLUSTERS + 1, dimension, torch.Generator().manual_seed(0))

    def draw(self, number: int, *, defect: bool) -> tuple[Tensor, Tensor]:
        """Return an image's features (D, h, w) and its mask (h, w)."""
        generator = torch.Generator().manual_seed(number)
        rows, columns = self.grid
        cluster = torch.randint(CLUSTERS, (rows, columns), generator=generator)
        mask = torch.zeros(rows, columns)
        if defect:
            mask[rows // 3 : rows // 3 + 8, columns // 3 : columns // 3 + 6] = 1
            cluster[mask.bool()] = CLUSTERS
        features = self.clusters.draw(cluster.flatten(), generator)
        return features.T.reshape(-1, rows, columns), mask


class Peak:
    """Peak memory of the process since the last reset, in bytes."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")

    def reset(self) -> None:
        """Start anew."""
        Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Return the peak, less what was held at first."""
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Build, and write down what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2085, help="normal training images; KSDD2 has 2085")
    parser.add_argument("--defects", type=int, default=246, help="defective training images; KSDD2 has 246")
    parser.add_argument("--grid", type=int, nargs=2, default=[79, 28], help="patches of an image")
    parser.add_argument("--dimension", type=int, default=1536, help="features; of wide_resnet50_2: 1536")
    parser.add_argument("--negative-ratio", type=float, default=0.02)
    parser.add_argument("--store", choices=["auto", "memory", "disk"], default="auto")
    parser.add_argument("--store-dir", type=Path, help="folder on a disk with room; the user's cache by default")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    options = parser.parse_args()
    grid = (options.grid[0], options.grid[1])
    model = ExDD(backbone="filter_bank", image_size=(8 * grid[0], 8 * grid[1]), negative_ratio=options.negative_ratio)
    images = Images(grid, options.dimension)
    image, peak = torch.zeros(3, 8 * grid[0], 8 * grid[1]), Peak()
    total = options.images + options.defects
    stores = TrainingStores(options.store, options.store_dir, lambda: total, lambda: {"benchmark": vars(options)})
    builder = BankBuilder(model.model, model.settings, stores)
    stages: list[dict[str, float | str]] = []

    def finish(stage: str, start: float) -> None:
        stages.append({"stage": stage, "seconds": time.perf_counter() - start, "peak": peak.read()})
        print(stages[-1], flush=True)
        peak.reset()

    peak.reset()
    start = time.perf_counter()
    for number in tqdm(range(total), "Collecting"):
        defect = number >= options.images
        features, mask = images.draw(number, defect=defect)
        name = f"{number:06d}.png"
        if defect:
            builder.add_defective(name, image, features, mask.repeat_interleave(8, 0).repeat_interleave(8, 1))
        else:
            builder.add_normal(name, image, features)
    finish("collecting features (drawing them included)", start)
    for stage, build in (
        ("negative bank", builder.build_negative_bank),
        ("positive bank", builder.build_positive_bank),
        ("calibration set", builder.fill_calibration_set),
        ("calibration", model.calibrate),
    ):
        start = time.perf_counter()
        build()
        finish(stage, start)
    stores.remove()
    rows = [
        {"stage": str(s["stage"]), "seconds": f"{s['seconds']:.0f}", "peak memory, GB": f"{float(s['peak']) / 1e9:.2f}"}
        for s in stages
    ]
    patches = options.images * grid[0] * grid[1]
    size = f"{4 * patches * options.dimension / 1e9:.1f} GB in float32"
    settings = {
        "normal patches": f"{patches:,} of {options.dimension} features ({size})",
        "defective images": str(options.defects),
        "banks": f"{len(model.model.negative_bank):,} / {len(model.model.positive_bank):,}",
        "store": options.store,
    }
    machine = describe()
    facts = "\n".join(f"- {name}: {value}" for name, value in {**machine, **settings}.items())
    page = f"# Memory of building the banks\n\n{markdown_table(rows)}\n\n{facts}\n"
    content = json.dumps({"machine": machine, "settings": settings, "stages": stages}, indent=2)
    options.output.with_suffix(".json").write_text(content + "\n")
    options.output.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
