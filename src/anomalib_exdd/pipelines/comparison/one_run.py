"""One method with one seed, in a process of its own.

The folder's `settings.json` says what to do; `run.json` and the files beside it say what came of it.
"""

import json
import logging
import math
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.reading import inspect_image
from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.transforms import whole_maps
from anomalib_exdd.reporting.comparison import ImageResult, Run, write_images, write_json
from anomalib_exdd.utils.files import write_atomically

from .classes import built_arguments, one_line
from .data import build_data, without_defective_training_images
from .histograms import pixel_histograms
from .measuring import Predictions, explain_worst, measure_speed, peak_gpu_memory_mb, peak_memory_mb
from .metrics import best_f1_threshold, image_metrics, pixel_metrics, small_maps
from .models import build_model
from .progress import PROGRESS_NAME, ProgressWriter

SETTINGS_NAME = "settings.json"
RUN_NAME = "run.json"
QUICK: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 20}
"""What `quick` makes of a training that takes many epochs. Three, because Dsr splits them into two phases."""


def main(folder: Path) -> None:
    """Run what the folder's settings say, and write down what came of it, failures too."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    run = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))["run"]
    place = f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name}"
    try:
        result = measure(run, folder, place)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a model fails with, the others go on
        traceback.print_exc()
        kind = "A download failed" if isinstance(error, URLError) else type(error).__name__
        result = Run(run["method"], run["seed"], place, error=f"{kind}: {one_line(error)}")
    (folder / PROGRESS_NAME).unlink(missing_ok=True)
    write_json(asdict(result), folder / RUN_NAME)


def measure(run: Mapping[str, Any], folder: Path, place: str) -> Run:
    """Train and test, and write the files of the run but `run.json`.

    Args:
        run: What :meth:`.PreparedMethod.run_settings` returned.
        folder: Folder of the run.
        place: The same, relative to that of the comparison.
    """
    seed_everything(run["seed"], workers=True, verbose=False)
    model = build_model(run)
    datamodule = build_data(run["data"])
    if not run["uses_defects"]:
        without_defective_training_images(datamodule)
    with tempfile.TemporaryDirectory(dir=folder, prefix="training-") as scratch:
        trainer_arguments = trainer_settings(model, run)
        engine = _engine(scratch, run["accelerator"], ProgressWriter(folder), **trainer_arguments)
        start = time.perf_counter()
        engine.fit(model=model, datamodule=datamodule)
        fit_seconds = time.perf_counter() - start
        trainer = engine.trainer
        device = trainer.strategy.root_device
        checkpoint = Path(scratch) / "model.ckpt"
        trainer.save_checkpoint(checkpoint, weights_only=True)  # without the state of optimizers
        model_mb = checkpoint.stat().st_size / 1e6
        datamodule.setup("test")
        speed = measure_speed(model, datamodule, device)
        memory, gpu_memory = peak_memory_mb(), peak_gpu_memory_mb(device)  # before maps of all images are collected
        threshold = _threshold(model, datamodule, run["accelerator"], scratch, ProgressWriter(folder, "validation"))
        found = Predictions(with_maps=True)
        _test(model, datamodule.test_dataloader(), run["accelerator"], scratch, found, ProgressWriter(folder))
    found.check()
    metrics = _write(found, getattr(model.pre_processor, "transform", None), folder)
    if isinstance(model, ExDD):
        explained = explain_worst(model, datamodule, found, device)
        write_json({path: asdict(patches) for path, patches in explained.items()}, folder / "explanations.json")
    decisions = model.decisions if isinstance(model, ExDD) else None
    return Run(
        method=run["method"],
        seed=run["seed"],
        folder=place,
        metrics=metrics,
        fit_seconds=fit_seconds,
        peak_memory_mb=memory,
        peak_gpu_memory_mb=gpu_memory,
        images_per_second=speed.images_per_second,
        latency_ms=speed.latency_ms,
        model_mb=model_mb,
        negative_entries=_entries(model, "negative_bank", "memory_bank"),
        positive_entries=_entries(model, "positive_bank"),
        epochs=max(1, trainer.current_epoch),
        threshold=threshold,
        accept=None if decisions is None else decisions.accept,
        reject=None if decisions is None else decisions.reject,
    )


def trainer_settings(model: AnomalibModule, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the trainer, those of a quick try if asked for.

    A model that asks for one epoch itself, to fill a memory bank, is not shortened.

    Args:
        model: The model.
        run: Settings of the run.
    """
    built = built_arguments(Trainer, run["trainer"], set())
    arguments = {name: built[name] for name in run["trainer"]}
    if run["quick"] and "max_epochs" not in model.trainer_arguments:
        arguments.pop("max_steps", None)
        for name, most in QUICK.items():
            given = arguments.get(name)
            arguments[name] = min(given, most) if isinstance(given, int) and given > 0 else most
    return arguments


def _engine(folder: str, accelerator: str, *callbacks: Callback, **arguments: Any) -> Engine:
    return Engine(
        callbacks=[*callbacks, *(arguments.pop("callbacks", None) or [])],
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def _test(
    model: AnomalibModule, loader: "DataLoader[Any]", accelerator: str, folder: str, *callbacks: Callback
) -> None:
    _engine(folder, accelerator, *callbacks).test(model=model, dataloaders=loader, verbose=False)


def _threshold(
    model: AnomalibModule, datamodule: AnomalibDataModule, accelerator: str, folder: str, progress: Callback
) -> float | None:
    """Find Anomalib's threshold on validation images; without any, the one that the model found itself, or None."""
    if len(getattr(datamodule, "val_data", ())) == 0:
        post_processor: Any = model.post_processor
        own = float(post_processor.image_threshold)
        return own if math.isfinite(own) else None
    found = Predictions()
    _test(model, datamodule.val_dataloader(), accelerator, folder, found, progress)
    found.check()
    return best_f1_threshold(found.scores, found.labels)


def _write(found: Predictions, transform: Transform | None, folder: Path) -> dict[str, float]:
    """Write images, maps and histograms; return the metrics.

    Args:
        found: The predictions of the test images.
        transform: What the model does to images first.
        folder: The run's.
    """
    metrics = image_metrics(found.scores, found.labels)
    maps, masks = found.maps, found.masks
    if maps is not None:
        whole = whole_maps(maps, transform, inspect_image(found.paths[0]))
        with write_atomically(folder / "maps.npz") as partial:
            np.savez_compressed(partial, maps=small_maps(whole).numpy())
    if maps is not None and masks is not None:
        of_pixels = pixel_metrics(maps, masks)
        if of_pixels:
            pixel_histograms(maps, masks).save(folder)
        metrics |= of_pixels
    images = zip(found.paths, found.mask_paths, found.labels.tolist(), found.scores.tolist(), strict=True)
    write_images(
        [ImageResult(path, mask if label else "", label, score) for path, mask, label, score in images], folder
    )
    return metrics


def _entries(model: AnomalibModule, *names: str) -> int | None:
    """Count the entries of a memory bank, whatever it is called; None without one."""
    bank = next((found for name in names if (found := getattr(model.model, name, None)) is not None), None)
    return len(bank) if bank is not None and len(bank) else None
