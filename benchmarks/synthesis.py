"""What synthetic defects are worth: ExDD with N real and M synthetic defective training images.

    python benchmarks/synthesis.py --root DATA --weights FILE --output NAME [--split validation]

For each synthesizer and each draw of real defects, 150 images are synthesized from the training images; the first M of
those that were accepted join the real ones in the positive bank and in the calibration. All cells share features and
negative bank. The rows without synthetic images are ExDD as it is, those without any defect PatchCore's map and the
calibrated image score. Beside the metrics:

- KID: polynomial kernel distance between the features of synthetic and of all real training defect patches (ResNet-18,
  layers 2 and 3; not Inception's, so compare only within the table); lower is more alike;
- PSNR of the pixels outside the masks against the normal image, and the share of images in which nothing visible came
  out, from the manifests.

With `--split validation` a part of the training images takes the place of the test images, and several
`--synthetic-weight` are compared: that is where the default was chosen. Results are written as they come; the same
command goes on where it was interrupted.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.image.kid import poly_mmd
from torchvision.transforms.v2 import Resize

from anomalib_exdd.data.dataset import DefectDataset
from anomalib_exdd.data.splits import draw
from anomalib_exdd.images.masks import read_defect_pixels
from anomalib_exdd.models.exdd.patches import defect_patches
from anomalib_exdd.synthesis import PasteSynthesizer, PerlinSynthesizer
from anomalib_exdd.synthesis.command import read_pixels
from anomalib_exdd.synthesis.manifest import Record
from anomalib_exdd.synthesis.run import RunSettings, SourceImages, SynthesisRun
from evidence import METRICS, Images, Study
from machine import describe, known_results, markdown_table, save_results, spread

REAL = (0, 5, 25, 100)
SYNTHETIC = (0, 50, 100, 150)
SYNTHESIZERS = {"perlin": PerlinSynthesizer, "paste": PasteSynthesizer}
KID_SAMPLES = 1000


def mask_file(image: str) -> str:
    """Return the file of an image's mask."""
    path = Path(image)
    return str(path.with_name(f"{path.stem}_GT.png"))


class SynthesisStudy(Study):
    """A study whose defective training images may be synthetic."""

    def make(self, name: str, real: list[int], seed: int) -> tuple[Images | None, list[Record]]:
        """Synthesize 150 images.

        Args:
            name: Synthesizer.
            real: Rows of the real defective images it may learn from.
            seed: Seed of the run.

        Returns:
            The accepted images, None if there are none, and the records of all.
        """
        normals = [self.train.paths[row] for row in self.train.rows(defective=False)]
        defects = [(self.train.paths[row], mask_file(self.train.paths[row])) for row in real]
        with tempfile.TemporaryDirectory() as folder:
            sources = SourceImages(normals, defects, read_pixels, read_defect_pixels)
            settings = RunSettings(max(SYNTHETIC), seed=seed)
            run = SynthesisRun(Path(folder) / name, sources, SYNTHESIZERS[name](), settings)
            run.open()
            records = sorted(run.work(), key=lambda record: record.index)
            accepted = [record for record in records if record.accepted]
            return (self._read(Path(folder) / name, accepted) if accepted else None), records

    def _read(self, folder: Path, records: list[Record]) -> Images:
        rows = [
            {"image_path": str(folder / r.image), "mask_path": str(folder / r.mask), "label_index": 1, "split": "train"}
            for r in records
        ]
        dataset = DefectDataset(DataFrame(rows), augmentations=Resize(self.size, antialias=True))
        features, fine, masks = [], [], []
        pre_processor: Any = self.model.pre_processor
        with torch.inference_mode():
            for batch in DataLoader(dataset, batch_size=32, collate_fn=dataset.collate_fn):
                patches, finer = self.model.model.extract(pre_processor(batch.image))
                features.append(patches)
                fine.append(torch.as_tensor(finer).half())
                masks.append(batch.gt_mask.bool())
        found = self.train.subset([])
        found.paths = [f"synthetic/{record.index:05d}.png" for record in records]
        found.features_NDhw, found.fine_NFhw, found.mask_NHW = torch.cat(features), torch.cat(fine), torch.cat(masks)
        return found

    def cell(self, real: list[int], made: Images | None, records: list[Record], weights: list[float]) -> dict[str, Any]:
        """Build the positive bank from real and synthetic images; score the test images with each synthetic weight."""
        model, builder = self.model.model, self._builder("mask")
        builder.negative = self.builder.negative
        model.positive_bank.clear()
        for row in real:
            self._add_defective(builder, self.train, row)
        for row, record in enumerate(records):
            assert made is not None  # noqa: S101  records of accepted images come with them
            builder.origins[made.paths[row]] = [record.source, *filter(None, [record.defect])]
            self._add_defective(builder, made, row)
        builder.build_positive_bank()
        builder.fill_calibration_set()
        rate = (len(real) + 1) / (len(real) + len(self.train.rows(defective=False)) + 2)
        positive = self._distances(model.positive_bank) if len(model.positive_bank) else None
        everything = torch.ones(len(self.test.paths), dtype=torch.bool)
        found = {}
        for weight in weights:
            model.learn_boundary(weight)
            model.calibrate(rate, self.model.hparams["unknown_rate"], weight)
            found[str(weight)] = self._metrics("combined", positive, self._log_odds(), everything)
        return found

    def defect_features(self, images: Images, rows: list[int]) -> Tensor:
        """Return the features of defect patches, float32, shape (N, D)."""
        grid = (images.features_NDhw.shape[-2], images.features_NDhw.shape[-1])
        share = self.model.settings.min_coverage
        parts = [
            images.features_NDhw[r].flatten(1).T[defect_patches(images.mask_NHW[r], grid, share).flatten()]
            for r in rows
        ]
        return torch.cat(parts)


def kid(first_ND: Tensor, second_ND: Tensor) -> float:
    """Compute the polynomial maximum mean discrepancy of two samples, drawn with one seed."""
    generator = torch.Generator().manual_seed(0)
    count = min(len(first_ND), len(second_ND), KID_SAMPLES)
    first, second = (
        part[torch.randperm(len(part), generator=generator)[:count]].double() for part in (first_ND, second_ND)
    )
    return float(poly_mmd(first, second))


def quality(study: SynthesisStudy, made: Images | None, records: list[Record]) -> dict[str, float | None]:
    """Measure the synthetic images themselves."""
    noise = [r.change["background_psnr"] for r in records if r.accepted and r.change["background_psnr"] is not None]
    real = study.defect_features(study.train, study.train.rows(defective=True))
    return {
        "kid": None if made is None else kid(study.defect_features(made, list(range(len(made.paths)))), real),
        "psnr": statistics.mean(float(value or 0) for value in noise) if noise else None,
        "rejected": sum(not record.accepted for record in records) / len(records),
    }


def run(study: SynthesisStudy, options: argparse.Namespace, results: list[dict[str, Any]], save: Any) -> None:
    """Measure every cell that is not there yet."""
    defective = study.train.rows(defective=True)
    names = [Path(study.train.paths[row]).name for row in defective]
    for count in sorted({min(count, len(defective)) for count in options.real}):
        for seed in range(options.draws):
            rows = [defective[i] for i in draw(names, count, seed=seed, purpose="synthesis study")]
            for name, synthesizer in SYNTHESIZERS.items():
                if count == 0 and synthesizer.needs_defects:
                    continue
                done = {(r["synthetic"]) for r in results if (r["name"], r["real"], r["seed"]) == (name, count, seed)}
                if done >= set(SYNTHETIC):
                    continue
                made, records = study.make(name, rows, seed)
                accepted = [record for record in records if record.accepted]
                measured = quality(study, made, records)
                for synthetic in SYNTHETIC:
                    if synthetic in done:
                        continue
                    metrics = study.cell(rows, made, accepted[:synthetic], options.synthetic_weight)
                    key = {"name": name, "real": count, "synthetic": synthetic, "seed": seed}
                    results.append({**key, **measured, "metrics": metrics})
                    shown = {w: [round(100 * v, 1) for v in m.values()] for w, m in metrics.items()}
                    print(key, {k: v and round(v, 4) for k, v in measured.items()}, shown, flush=True)
                    save()


def table(results: list[dict[str, Any]]) -> str:
    """Summarise the draws of every cell."""
    rows = []
    for name in SYNTHESIZERS:
        for real in dict.fromkeys(r["real"] for r in results):
            for synthetic in SYNTHETIC:
                ours = [r for r in results if (r["name"], r["real"], r["synthetic"]) == (name, real, synthetic)]
                for weight in ours[0]["metrics"] if ours else ():
                    cell = {"synthesizer": name, "real": str(real), "synthetic": str(synthetic)}
                    row = {**cell, "draws": str(len(ours)), "weight": weight}
                    for metric, title in METRICS.items():
                        row[title] = spread([100 * r["metrics"][weight][metric] for r in ours], 1)
                    rows.append(row)
    return markdown_table(rows)


def quality_table(results: list[dict[str, Any]]) -> str:
    """Summarise the images themselves."""
    rows = []
    for name in SYNTHESIZERS:
        for real in dict.fromkeys(r["real"] for r in results):
            ours = [r for r in results if (r["name"], r["real"], r["synthetic"]) == (name, real, 0)]
            if ours:
                row = {"synthesizer": name, "real defects to learn from": str(real)}
                for key, title, scale in (
                    ("kid", "KID x 1000", 1000),
                    ("psnr", "PSNR, dB", 1),
                    ("rejected", "rejected, %", 100),
                ):
                    values = [scale * r[key] for r in ours if r[key] is not None]
                    row[title] = spread(values, 1) if values else "unchanged"
                rows.append(row)
    return markdown_table(rows)


def save(output: Path, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the results so far."""
    save_results(output, settings, results)
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    title = f"# Real and synthetic defects on {settings['data']}, {settings['split']} images"
    page = f"{title}\n\n{table(results)}\n\n## The images themselves\n\n{quality_table(results)}\n\n{facts}\n"
    output.with_suffix(".md").write_text(page)


def main() -> None:
    """Run the study and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KSDD2's layout")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--image-size", type=int, nargs=2, default=[224, 224])
    parser.add_argument("--ratio", type=float, default=0.01, help="coreset ratio of normal patches")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--every", type=int, default=1, help="look at every n-th of the test images only")
    parser.add_argument("--real", type=int, nargs="+", default=list(REAL), help="numbers of real defects")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--synthetic-weight", type=float, nargs="+", default=[0.3])
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    options = parser.parse_args()
    names = ("image_size", "ratio", "split", "every", "synthetic_weight")
    settings = {"data": options.root.name, **{name: getattr(options, name) for name in names}}
    results = known_results(options.output, settings)
    study = SynthesisStudy(options.root, options)
    if options.every > 1:
        study.test = study.test.subset(list(range(0, len(study.test.paths), options.every)))
        study.negative = study._distances(study.model.model.negative_bank)  # noqa: SLF001  of fewer images
    run(study, options, results, partial(save, options.output, settings, results))
    print(table(results))


if __name__ == "__main__":
    main()
