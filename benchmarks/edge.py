"""What compressed exports bring and cost: ExDD, and Anomalib's Patchcore and Padim, with OpenVINO on a processor.

    python benchmarks/edge.py --data DATA --weights FILE --work FOLDER --output NAME

DATA holds sets in KSDD2's layout. Of each, every model is trained once, with settings as in `rivals.yaml`, and exported
to FOLDER in full precision and with every compression: ExDD's of this package, Anomalib's own for its models, which are
calibrated on the normal training images. `int8_acq`, of ExDD alone, may lose 0.002 of the image AP on the test images,
which it looks at, as in Anomalib. All exports take one image of the set's input size and compute in float32 but for
what they compute in 8 bits; "bfloat16" is what OpenVINO chooses by itself on processors that have it.

Accuracy is that of raw scores on test images, on every second of a set with more than 300. Latency is that of single
images, throughput that of many in flight (OpenVINO's hint THROUGHPUT). All exports of a set are loaded in one process
and timed one after the other in every repeat; ratios are those within a repeat. Results are written as they come; the
same command goes on where it was interrupted.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from anomalib.deploy import CompressionType
from anomalib.metrics import AUPR
from lightning.pytorch import seed_everything
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchvision.transforms.v2 import Resize

from anomalib_exdd import KSDD2
from anomalib_exdd.comparison.methods import build_model
from anomalib_exdd.comparison.worker import build_engine
from evidence import pixel_metrics
from machine import describe, known_results, markdown_table, save_results

SIZES = {"commutator": (316, 112), "magnetic_tile": (224, 224)}
METHODS: dict[str, dict[str, Any]] = {
    "ExDD": {"backbone": "resnet18", "negative_ratio": 0.01},
    "Patchcore": {"backbone": "resnet18", "layers": ["layer2", "layer3"], "coreset_sampling_ratio": 0.01},
    "Padim": {"backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"]},
}
COMPRESSIONS = ("float32", "bfloat16", "fp16", "int8", "int8_ptq", "int8_acq")
FULL = {"INFERENCE_PRECISION_HINT": "f32"}
MAX_TESTS = 300
IN_FLIGHT = 24  # images of one measurement of throughput
COLUMNS = {"image_AUROC": "image AUROC", "image_AP": "image AP", "pixel_AP": "pixel AP"}


class NormalImages(KSDD2):
    """The normal training images, for models that know no others; Anomalib calibrates on validation images."""

    def val_dataloader(self) -> DataLoader[Any]:
        """Load the training images one by one."""
        return DataLoader(self.train_data, collate_fn=self.train_data.collate_fn)


def export(options: argparse.Namespace, name: str, method: str) -> dict[str, Path]:
    """Train a model and export it in every way, if that has not been done; return the files."""
    folder, size = options.work / name / method, SIZES[name]
    ways = [way for way in COMPRESSIONS if method == "ExDD" or way != "int8_acq"]
    files = {way: folder / "weights" / "openvino" / f"{way.replace('bfloat16', 'float32')}.xml" for way in ways}
    if all(file.is_file() for file in files.values()):
        return files
    common: dict[str, Any] = {"num_workers": 0, "eval_batch_size": 1}
    seed_everything(0, verbose=False)
    weights = {"weights": str(options.weights), "image_size": size}
    model = build_model({"model": {"class_path": method, "init_args": METHODS[method]}, **weights})
    data = KSDD2(options.data / name, num_defects=None if method == "ExDD" else 0, **common)
    with tempfile.TemporaryDirectory() as scratch:
        build_engine(scratch, "cpu").fit(model=model, datamodule=data)
    common["augmentations"] = Resize(list(size), antialias=True)
    if method == "ExDD":
        calibration = KSDD2(options.data / name, **common)
    else:
        calibration = NormalImages(options.data / name, num_defects=0, **common)
    for way in dict.fromkeys(file.stem for file in files.values()):
        model.to_openvino(
            folder,
            way,
            input_size=size,
            compression_type=None if way == "float32" else CompressionType(way),
            datamodule=calibration,
            metric=AUPR(fields=["pred_score", "gt_label"]),
            max_drop=0.002,
            onnx_kwargs={"dynamic_axes": {}},  # Patchcore cannot be exported for batches of any size
        )
    return files


def tests(options: argparse.Namespace, name: str) -> list[tuple[Any, int, torch.Tensor]]:
    """Return the test images that count: NumPy images of the input size, labels and masks."""
    data = KSDD2(options.data / name, num_workers=0)
    data.setup("test")
    size, found = SIZES[name], []
    for row in range(0, len(data.test_data), 2 if len(data.test_data) > MAX_TESTS else 1):
        item: Any = data.test_data[row]
        image = Resize(list(size), antialias=True)(torch.as_tensor(item.image))
        mask = F.adaptive_max_pool2d(torch.as_tensor(item.gt_mask)[None].float(), size)[0].bool()
        found.append((image[None].numpy(), int(item.gt_label), mask))
    return found


def accuracy(network: Any, images: list[tuple[Any, int, torch.Tensor]]) -> dict[str, float]:
    """Return the metrics of an export."""
    scores, maps = [], []
    for image, _, _ in images:
        result = network(image)
        scores.append(float(result["pred_score"].ravel()[0]))
        maps.append(torch.from_numpy(result["anomaly_map"].copy()).reshape(image.shape[-2:]).float())
    score_N, label_N = torch.tensor(scores), torch.tensor([label for _, label, _ in images])
    score_N = torch.searchsorted(score_N.unique(), score_N) / len(score_N)  # torchmetrics would squash raw scores
    return {
        "image_AUROC": float(binary_auroc(score_N, label_N)),
        "image_AP": float(binary_average_precision(score_N, label_N)),
        "pixel_AP": pixel_metrics(torch.stack(maps), torch.stack([mask for _, _, mask in images]))["pixel_AP"],
    }


def seconds_in_flight(queue: Any, images: list[Any]) -> float:
    """Time many images at once."""
    start = time.perf_counter()
    for image in images:
        queue.start_async(image)
    queue.wait_all()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Export, test and time everything on one set."""
    images, core = tests(options, name), openvino.Core()
    threads = {"INFERENCE_NUM_THREADS": options.threads}
    found: list[dict[str, Any]] = []
    networks, queues = [], []
    for method in METHODS:
        for way, file in export(options, name, method).items():
            config = threads | ({"INFERENCE_PRECISION_HINT": "bf16"} if way == "bfloat16" else FULL)
            networks.append(core.compile_model(file, "CPU", config))
            many = core.compile_model(file, "CPU", config | {"PERFORMANCE_HINT": "THROUGHPUT"})
            queues.append(openvino.AsyncInferQueue(many))
            size = sum(part.stat().st_size for part in (file, file.with_suffix(".bin")))
            found.append({"set": name, "method": method, "way": way, "MB": size / 1e6, "images": len(images)})
            found[-1] |= {**accuracy(networks[-1], images), "latency": [], "in flight": []}
            print({key: value for key, value in found[-1].items() if key not in {"latency", "in flight"}}, flush=True)
    shown = [images[int(row)][0] for row in np.linspace(0, len(images) - 1, IN_FLIGHT)]
    for repeat in range(options.repeats):
        for result, network, queue in zip(found, networks, queues, strict=True):
            network(shown[repeat % IN_FLIGHT])  # caches are the other models'
            start = time.perf_counter()
            for number in range(3):
                network(shown[(repeat + number) % IN_FLIGHT])
            result["latency"].append((time.perf_counter() - start) / 3)
            result["in flight"].append(seconds_in_flight(queue, shown))
    return found


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Make the table of one set; ratios are to the same model in float32, with those of a tenth of the repeats."""
    table = []
    for result in results:
        plain = next(r for r in results if (r["method"], r["way"]) == (result["method"], "float32"))
        row = {"model": result["method"], "compression": result["way"], "MB": f"{result['MB']:.1f}"}
        row["latency, ms"] = f"{1e3 * statistics.median(result['latency']):.1f}"
        row["images/s"] = f"{IN_FLIGHT / statistics.median(result['in flight']):.1f}"
        for title, key in (("latency, ratio", "latency"), ("throughput, ratio", "in flight")):
            pairs = zip(result[key], plain[key], strict=True)
            ratios = sorted(ours / other if key == "latency" else other / ours for ours, other in pairs)
            tenth = len(ratios) // 10
            row[title] = f"{statistics.median(ratios):.2f} ({ratios[tenth]:.2f} to {ratios[-1 - tenth]:.2f})"
        for key, title in COLUMNS.items():
            row[title] = f"{100 * result[key]:.1f}"
            if result is not plain:
                row[title] += f" ({100 * (result[key] - plain[key]):+.1f})"
        table.append(row)
    return table


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets, each in KSDD2's layout")
    parser.add_argument("--weights", type=Path, required=True, help="local weights of the ResNet-18")
    parser.add_argument("--sets", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="folder of the exports")
    parser.add_argument("--output", type=Path, required=True, help="result file without ending")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = {
        "backbone": "resnet18, ImageNet",
        "sets": ", ".join(f"{name} at {SIZES[name][0]} x {SIZES[name][1]}" for name in options.sets),
        "threads of OpenVINO": options.threads,
        "openvino": openvino.__version__,
        "repeats": f"{options.repeats}; medians; ratios with those of 10 and 90 % of the repeats",
    }
    results = known_results(options.output, settings)
    for name in options.sets:
        if all(result["set"] != name for result in results):
            results += measure(options, name)
            save_results(options.output, settings, results)
    pages = ["# Compressed exports in OpenVINO"]
    for name in options.sets:
        ours = [result for result in results if result["set"] == name]
        size = "{} x {}".format(*SIZES[name])
        pages += [f"## {name}, {size}, {ours[0]['images']} test images", markdown_table(rows(ours))]
    pages.append("\n".join(f"- {name}: {value}" for name, value in {**describe(), **settings}.items()))
    options.output.with_suffix(".md").write_text("\n\n".join(pages) + "\n")


if __name__ == "__main__":
    main()
