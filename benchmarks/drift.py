"""When `anomalib drift` raises an alarm: on good parts, under another lamp, out of focus, and on another product.

    python benchmarks/drift.py --data DATA --weights FILE --output NAME [--figure FILE]

DATA holds the sets in KSDD2's layout, a folder each. A model of the normal training images watches streams of good
test images, as they are and changed, in several random orders. The two halves of all good images, drawn at random, are
alike by construction: alarms on the other half are false. What is counted is images until the first alarm.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from anomalib_exdd import KSDD2, ExDD
from anomalib_exdd.images.reading import read_image
from anomalib_exdd.models.exdd.calibration_set import normal_distance, training_distances
from anomalib_exdd.models.exdd.training import BankBuilder
from anomalib_exdd.station.drift import EVERY, Drift, Watched, detect, shares
from evidence import IMAGE_SIZES
from machine import describe, known_results, markdown_table, save_results

ORDERS = 20
"""Random orders of each stream."""
SPLITS = 6
"""Random halves of the good images."""
MOST = 400
"""Good images of a set that are halved."""
CHANGED = 60
"""Test images of a set that are changed."""
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exposure x 0.5": lambda image: image * 0.5,
    "exposure x 0.8": lambda image: image * 0.8,
    "exposure x 0.9": lambda image: image * 0.9,
    "exposure x 1.1": lambda image: (image * 1.1).clamp(0, 1),
    "exposure x 1.25": lambda image: (image * 1.25).clamp(0, 1),
    "exposure x 2": lambda image: (image * 2).clamp(0, 1),
    "blur, sigma 1": lambda image: gaussian_blur(image, [9, 9], [1.0, 1.0]),
    "blur, sigma 2": lambda image: gaussian_blur(image, [17, 17], [2.0, 2.0]),
}


def good_images(root: Path) -> tuple[list[str], list[str]]:
    """Return the paths of the good training and of the good test images of a set."""
    data = KSDD2(root, num_workers=0)
    data.setup()
    samples = [each.samples for each in (data.train_data, data.test_data)]
    train, test = (sorted(each.image_path[each.label_index == 0]) for each in samples)
    return train, test


class Watch:
    """A model of the normal images of a set, and how far other images are from them.

    Args:
        size: Height and width of the images.
        weights: File of the backbone's weights.
    """

    def __init__(self, size: tuple[int, int], weights: Path) -> None:
        self.size = size
        self.model = ExDD(backbone="resnet18", weights=weights, image_size=size, negative_ratio=0.01).eval()
        self.model.model.feature_extractor.load_weights()

    def features(self, paths: list[str], change: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """Return the patch features of images, float16, shape (N, D, h, w)."""
        pre_processor: Any = self.model.pre_processor
        found = []
        with torch.inference_mode():
            for path in tqdm(paths, leave=False):
                image = change(torch.as_tensor(read_image(path)))
                found.append(self.model.model.embed(pre_processor(image[None]))[0].half())
        return torch.stack(found)

    def learn(self, features_NDhw: Tensor, paths: list[str]) -> NDArray[np.float64]:
        """Build the bank from normal images, and return their out-of-fold distances."""
        model = self.model.model
        builder = BankBuilder(model, self.model.settings)
        model.positive_bank.clear()
        for path, features_Dhw in zip(paths, features_NDhw, strict=True):
            builder.add_normal(path, torch.zeros(3, *self.size), features_Dhw.float())
        builder.build()
        found = training_distances(model)
        assert found is not None  # noqa: S101  there is more than one image
        return found

    def distances(self, features_NDhw: Tensor) -> list[float]:
        """Return the distances of images to normal ones."""
        bank, found = self.model.model.negative_bank, []
        for features_BDhw in features_NDhw.split(16):
            patches_BPD = features_BDhw.float().flatten(2).transpose(1, 2).contiguous()
            found += normal_distance(bank.distances(patches_BPD, neighborhood=False).nearest).tolist()
        return found


def judge(distances: list[float], training: NDArray[np.float64]) -> dict[str, Any]:
    """Watch a stream in several orders."""
    images = [Watched("", "", distance, None, training) for distance in distances]
    share_M, sizes_M, firsts = shares(images), [len(training)] * len(images), []
    for seed in range(ORDERS):
        order = np.random.default_rng(seed).permutation(len(images))
        alarms = detect(share_M[order], sizes_M)[1]
        firsts.append(alarms[0] + 1 if alarms else None)
    return {
        "images": len(images),
        "training": len(training),
        "shift": float((np.mean(distances) - training.mean()) / training.std()),
        "p_value": float(mannwhitneyu(distances, training, alternative="greater").pvalue),
        "firsts": firsts,
    }


def study(root: Path, weights: Path, sets: dict[str, Path]) -> list[dict[str, Any]]:
    """Watch all streams of a set."""
    watch = Watch(IMAGE_SIZES[root.name], weights)
    train, test = good_images(root)
    features = {"train": watch.features(train), "test": watch.features(test)}
    training = watch.learn(features["train"], train)
    streams = {"good test images": features["test"]}
    chosen = test[:: -(-len(test) // CHANGED)]
    streams |= {name: watch.features(chosen, change) for name, change in CHANGES.items()}
    for name, other in sets.items():
        if name != root.name:
            streams[f"images of {name}"] = watch.features(good_images(other)[1][:CHANGED])
    results = [{"stream": name, **judge(watch.distances(found), training)} for name, found in streams.items()]

    pool, paths = torch.cat([features["train"], features["test"]]), train + test
    rng = np.random.default_rng(0)
    for _ in range(SPLITS):
        rows = rng.permutation(len(paths))[:MOST]
        half, rest = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        training = watch.learn(pool[half], [paths[row] for row in half])
        results.append({"stream": "other half of the good images", **judge(watch.distances(pool[rest]), training)})
    return [{"set": root.name, **result} for result in results]


def figure(root: Path, weights: Path, path: Path) -> None:
    """Draw a stream of good test images that goes out of focus after a while."""
    watch = Watch(IMAGE_SIZES[root.name], weights)
    train, test = good_images(root)
    training = watch.learn(watch.features(train), train)
    distances = watch.distances(watch.features(test))
    distances += watch.distances(watch.features(test[:CHANGED], CHANGES["blur, sigma 1"]))
    Drift([Watched("", "", distance, None, training) for distance in distances]).draw(path)


def table(results: list[dict[str, Any]]) -> str:
    """Return a row for every set and stream."""
    rows = []
    for name, stream in dict.fromkeys((result["set"], result["stream"]) for result in results):
        ours = [result for result in results if (result["set"], result["stream"]) == (name, stream)]
        firsts = [first for result in ours for first in result["firsts"]]
        alarms = sorted(first for first in firsts if first is not None)
        rows.append(
            {
                "set": name,
                "stream": stream,
                "training images": str(ours[0]["training"]),
                "images": str(ours[0]["images"]),
                "shift, training deviations": f"{statistics.mean(result['shift'] for result in ours):+.1f}",
                "Mann-Whitney p": f"{statistics.median(result['p_value'] for result in ours):.1g}",
                "streams with alarm": f"{len(alarms)} of {len(firsts)}",
                "images until alarm": str(statistics.median_low(alarms)) if alarms else "",
            }
        )
    return markdown_table(rows)


def main() -> None:
    """Run the study and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of resnet18")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    parser.add_argument("--figure", type=Path, help="picture of commutators that go out of focus")
    options = parser.parse_args()
    settings = {"every": EVERY, "orders": ORDERS, "splits": SPLITS, "most": MOST, "changed": CHANGED}
    results = known_results(options.output, settings)
    sets = {name: options.data / name for name in IMAGE_SIZES}
    for name, root in sets.items():
        if not any(result["set"] == name for result in results):
            results += study(root, options.weights, sets)
            save_results(options.output, settings, results)
    facts = "\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items())
    options.output.with_suffix(".md").write_text(f"# Alarms of drift\n\n{table(results)}\n\n{facts}\n")
    print(table(results))
    if options.figure is not None:
        figure(options.data / "commutator", options.weights, options.figure)


if __name__ == "__main__":
    main()
