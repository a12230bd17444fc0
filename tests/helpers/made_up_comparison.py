"""A folder as `anomalib compare` leaves it behind, from drawn plates with scratches and made-up detectors.

Nothing is trained: a detector's map is the true mask, blurred, with a share of noise that says how good it is.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_exdd.comparison.results import (
    Comparison,
    Difference,
    ImageResult,
    Method,
    Run,
    write_images,
    write_json,
)

HEIGHT, WIDTH = 120, 80
MAP = (30, 20)


class Detector(NamedTuple):
    """A made-up method."""

    method: Method
    noise: float = 0.3
    scale: float = 1.0
    decides: bool = False
    explains: bool = False
    fails: Sequence[int] = ()
    costs: Sequence[float] = (10.0, 400.0, 30.0, 30.0, 40.0)  # fit, memory, images/s, latency, model


DETECTORS = (
    Detector(
        Method("ExDD", "ExDD", {"backbone": "resnet18", "scoring": "calibrated"}, ["trains with 4 defective images"]),
        noise=0.35, decides=True, explains=True, costs=(5.5, 321.6, 33.3, 32.6, 44.9),
    ),
    Detector(
        Method(
            "Patchcore", "Patchcore", {"backbone": "resnet18", "coreset_sampling_ratio": 0.01},
            published={"image_AUROC": 0.92, "pixel_AP": 0.51}, published_source="Example et al., 2020, table 3",
        ),
        noise=0.5, scale=20.0, costs=(28.5, 477.9, 28.4, 36.1, 46.0),
    ),
    Detector(
        Method("Padim", "Padim", {"backbone": "resnet18"}, ["input 256 x 256, as it cannot be given another"]),
        noise=0.65, scale=300.0, costs=(14.2, 1203.0, 25.0, 41.0, 171.2),
    ),
    Detector(Method("Draem", "Draem"), fails=(0, 1, 2, 3)),
)  # fmt: skip


def draw_plate(seed: int, *, scratched: bool) -> tuple[Image.Image, Image.Image]:
    """Draw a brushed plate, and the mask of its scratch."""
    random = np.random.default_rng(seed)
    grain = random.normal(0, 14, (HEIGHT, 1)) + random.normal(0, 6, (HEIGHT, WIDTH))
    plate = Image.fromarray(np.clip(150 + grain, 0, 255).astype(np.uint8)).convert("RGB")
    mask = Image.new("L", plate.size)
    if scratched:
        start, angle = random.uniform((20, 25), (60, 95)), random.uniform(0, np.pi)
        end = start + random.uniform(10, 25) * np.array([np.cos(angle), np.sin(angle)])
        line = [*start.tolist(), *end.tolist()]
        ImageDraw.Draw(mask).line(line, fill=255, width=4)
        ImageDraw.Draw(plate).line(line, fill=(70, 66, 60), width=3)
    return plate, mask


def make_comparison(
    root: Path,
    detectors: Sequence[Detector] = DETECTORS,
    *,
    seeds: Sequence[int] = (0, 1),
    normal: int = 24,
    defective: int = 12,
    maps: bool = True,
    title: str = "Scratched plates",
) -> Path:
    """Write data and a comparison's folder, which is returned."""
    pictures, train = _write_data(root / "data", normal, defective)
    folder = root / "comparison"
    folder.mkdir(parents=True)
    data_sha256 = _write_manifest(folder, [*pictures, *train])
    runs = [_write_run(folder, each, seed, pictures, train, maps=maps) for each in detectors for seed in seeds]
    baseline = detectors[1].method.name if len(detectors) > 1 else ""
    differences = [
        difference
        for each in detectors
        if each.method.name != baseline
        for difference in _differences(runs, each.method.name, baseline)
    ]
    counts = {"train_normal": len(train) - 4, "train_defective": 4, "test_normal": normal, "test_defective": defective}
    comparison = Comparison(
        title=title,
        command="anomalib compare --config configs/compare_patchcore.yaml --seeds [0,1]",
        created="2026-11-25T01:00:00+00:00",
        configuration={"data": {"class_path": "KSDD2", "root": "./plates"}, "seeds": list(seeds), "baseline": baseline},
        machine={"processor": "2 x Made-up 3000", "accelerator": "none", "python": "3.11.9", "torch": "2.10.0"},
        data={"name": "KSDD2", "root": str(root / "data"), "sha256": data_sha256, **counts},
        methods=[each.method for each in detectors],
        runs=runs,
        differences=differences,
    )
    write_json(asdict(comparison), folder / "results.json")
    return folder


def _write_data(root: Path, normal: int, defective: int) -> tuple[list[ImageResult], list[ImageResult]]:
    test = [(number, False) for number in range(normal)] + [(number, True) for number in range(100, 100 + defective)]
    train = [(number, number > 205) for number in range(200, 210)]
    written = []
    for split, plates in (("test", test), ("train", train)):
        (root / split).mkdir(parents=True)
        written.append([])
        for number, scratched in plates:
            plate, mask = draw_plate(number, scratched=scratched)
            image_path, mask_path = root / split / f"{number}.png", root / split / f"{number}_GT.png"
            plate.save(image_path)
            if scratched:
                mask.save(mask_path)
            written[-1].append(ImageResult(str(image_path), str(mask_path) if scratched else "", int(scratched), 0.0))
    return written[0], written[1]


def _write_manifest(folder: Path, pictures: Sequence[ImageResult]) -> str:
    path = folder / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "label", "sha256"])
        for picture in pictures:
            content = Path(picture.image).read_bytes()
            split = Path(picture.image).parent.name
            writer.writerow([picture.image, split, picture.label, hashlib.sha256(content).hexdigest()])
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_run(
    folder: Path,
    detector: Detector,
    seed: int,
    pictures: Sequence[ImageResult],
    train: Sequence[ImageResult],
    *,
    maps: bool,
) -> Run:
    name = detector.method.name
    place = f"runs/{name}/{seed}"
    if seed in detector.fails:
        error = "OutOfMemoryError: 12 GB were asked for, but 3 GB are free"
        return Run(name, seed, place, error=error)
    (folder / place).mkdir(parents=True)
    random = np.random.default_rng([seed, len(name)])
    heat = np.stack([_heat(random, picture, detector) for picture in pictures])
    scores = heat.reshape(len(heat), -1).max(axis=1)
    images = [
        ImageResult(each.image, each.mask, each.label, float(s)) for each, s in zip(pictures, scores, strict=True)
    ]
    write_images(images, folder / place)
    if maps:
        np.savez_compressed(folder / place / "maps.npz", maps=heat.astype(np.float16))
    if detector.explains:
        explained = {each.image: _nearest(hot, each, train) for hot, each in zip(heat, pictures, strict=True)}
        write_json(explained, folder / place / "explanations.json")
    fit, memory, speed, latency, size = (cost * random.uniform(0.97, 1.03) for cost in detector.costs)
    low, high = (float(np.quantile(scores, share)) for share in (0.4, 0.75))
    run = Run(
        name, seed, place, metrics=_metrics(images), fit_seconds=fit, peak_memory_mb=memory, images_per_second=speed,
        latency_ms=latency, model_mb=size, negative_entries=753,
        positive_entries=96 if detector.explains else None,
        epochs=1, threshold=float(np.median(scores)), accept=low if detector.decides else None,
        reject=high if detector.decides else None,
    )  # fmt: skip
    write_json(asdict(run), folder / place / "run.json")
    return run


def _heat(random: np.random.Generator, picture: ImageResult, detector: Detector) -> np.ndarray:
    noise = Image.fromarray(random.uniform(0, 255, MAP).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    clouds = (np.asarray(noise, dtype=float) / 255 - 0.4) * 2.5
    truth = np.zeros(MAP)
    if picture.mask:
        mask = Image.open(picture.mask).filter(ImageFilter.GaussianBlur(4)).resize(MAP[::-1])
        truth = np.asarray(mask, dtype=float) / 255
        truth *= random.uniform(0.3, 1.1) / max(truth.max(), 1e-6)
    return detector.scale * (truth * (1 - detector.noise) + clouds * detector.noise + 0.1)


def _nearest(heat: np.ndarray, picture: ImageResult, train: Sequence[ImageResult]) -> dict[str, Any]:
    row, column = _highest(heat)
    good, bad = next(each for each in train if not each.label), next(each for each in train if each.label)
    bad_row, bad_column = _highest(np.asarray(Image.open(bad.mask).filter(ImageFilter.GaussianBlur(4))))
    return {
        "row": row,
        "column": column,
        "normal": {"source": good.image, "row": row, "column": column, "distance": 4.2},
        "defect": {
            "source": bad.image,
            "row": bad_row,
            "column": bad_column,
            "distance": 2.1 if picture.label else 6.3,
        },
        "reason": "resembles <spots> (75 %)" if picture.label and row < 0.5 else None,
    }


def _highest(pixels: np.ndarray) -> tuple[float, float]:
    row, column = np.unravel_index(int(pixels.argmax()), pixels.shape)
    return (float(row) + 0.5) / pixels.shape[0], (float(column) + 0.5) / pixels.shape[1]


def _metrics(images: Sequence[ImageResult]) -> dict[str, float]:
    labels, scores = [each.label for each in images], [each.score for each in images]
    if len(set(labels)) < 2:
        return {}
    precision, recall, _ = precision_recall_curve(labels, scores)
    auroc, average = float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores))
    best_f1 = float((2 * precision * recall / np.maximum(precision + recall, 1e-9)).max())
    pixel = {"pixel_AUROC": 0.5 + auroc / 2.2, "pixel_AP": average * 0.6, "AUPRO": auroc * 0.9}
    return {"image_AUROC": auroc, "image_AP": average, "image_F1": best_f1, **pixel}


def _differences(runs: Sequence[Run], method: str, baseline: str) -> list[Difference]:
    of = {(run.method, run.seed): run.metrics for run in runs if run.metrics}
    seeds = sorted({run.seed for run in runs if {(method, run.seed), (baseline, run.seed)} <= set(of)})
    found = []
    for metric in next(iter(of.values()), {}) if seeds else ():
        each = [of[method, seed][metric] - of[baseline, seed][metric] for seed in seeds]
        mean, width = float(np.mean(each)), 0.01 + float(np.ptp(each)) / 3
        found.append(Difference(method, baseline, metric, mean, mean - width, mean + width, len(seeds)))
    return found


def rewrite(folder: Path, **changes: object) -> None:
    """Change fields of a folder's `results.json`."""
    path = folder / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
