"""One method with one seed, in a process of its own: `python -m anomalib_exdd.comparison.worker FOLDER`.

The folder's `settings.json` says what to do; `run.json` and the files beside it are the results.
"""

import json
import logging
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, Trainer, seed_everything
from torchvision.transforms.v2 import Transform

import anomalib_exdd
from anomalib_exdd.images.reading import inspect_image
from anomalib_exdd.models.exdd import ExDD
from anomalib_exdd.models.transforms import whole_maps

from . import measure
from .bootstrap import pixel_histograms
from .config import instantiate_arguments, one_line
from .data import build_data, without_defective_training_images
from .methods import build_model
from .progress import PROGRESS_NAME, ProgressWriter
from .results import HISTOGRAMS_NAME, Run, write_arrays, write_images, write_json

SETTINGS_NAME = "settings.json"
RUN_NAME = "run.json"
QUICK: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 20}
"""What `quick` makes of a training that takes many epochs. Three, because Dsr splits them into two phases."""


def main(folder: Path) -> None:
    """Execute the run of a folder, and write its result, failures included."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))["run"]
    try:
        found = execute(settings, folder)
    except (Exception, SystemExit) as error:  # noqa: BLE001  however a model fails, the other runs continue
        traceback.print_exc()
        kind = "A download failed" if isinstance(error, URLError) else type(error).__name__
        found = {"error": f"{kind}: {one_line(error)}"}
    (folder / PROGRESS_NAME).unlink(missing_ok=True)
    save_run(folder, settings, **found)


def save_run(folder: Path, settings: Mapping[str, Any], **found: Any) -> Run:
    """Write `run.json` of a run with these settings: what was measured, or the error."""
    run = Run(settings["method"], settings["seed"], "/".join(folder.parts[-3:]), **found)
    write_json(asdict(run), folder / RUN_NAME)
    return run


def execute(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train and test by :meth:`.ResolvedMethod.run_settings`, and write all files of the run but `run.json`.

    Returns:
        What was measured, by the names of :class:`.Run`.
    """
    seed_everything(settings["seed"], workers=True, verbose=False)
    model = build_model(settings)
    datamodule = build_data(settings["data"])
    if not settings["uses_defects"]:
        without_defective_training_images(datamodule)
    with tempfile.TemporaryDirectory(dir=folder, prefix="training-") as scratch:
        accelerator = settings["accelerator"]
        engine = build_engine(scratch, accelerator, ProgressWriter(folder), **trainer_settings(model, settings))
        start = time.perf_counter()
        engine.fit(model=model, datamodule=datamodule)
        costs: dict[str, Any] = {"fit_seconds": time.perf_counter() - start}
        trainer = engine.trainer
        device = trainer.strategy.root_device
        checkpoint = Path(scratch) / "model.ckpt"
        trainer.save_checkpoint(checkpoint, weights_only=True)  # without the state of optimizers
        costs |= {"model_mb": checkpoint.stat().st_size / 1e6, "epochs": max(1, trainer.current_epoch)}
        datamodule.setup("test")
        costs["images_per_second"], costs["latency_ms"] = measure.measure_speed(model, datamodule, device)
        costs["peak_memory_mb"] = measure.peak_memory_mb()  # before the maps of all images
        costs["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None

        def predict(loader: Any, found: measure.Predictions, stage: str) -> measure.Predictions:
            engine = build_engine(scratch, accelerator, found, ProgressWriter(folder, stage))
            engine.test(model=model, dataloaders=loader, verbose=False)
            found.check()
            return found

        post_processor: Any = model.post_processor
        threshold = float(post_processor.image_threshold)  # that the model found itself, if it did
        if len(getattr(datamodule, "val_data", ())):
            validated = predict(datamodule.val_dataloader(), measure.Predictions(), "validation")
            threshold = measure.best_f1_threshold(validated.scores, validated.labels)
        found = predict(datamodule.test_dataloader(), measure.Predictions(with_maps=True), "test")
    metrics = _write_predictions(found, getattr(model.pre_processor, "transform", None), folder)
    decisions = model.decisions if isinstance(model, ExDD) else None
    if isinstance(model, ExDD):
        write_json(measure.explain_worst(model, datamodule, found, device), folder / "explanations.json")
    return {
        **costs,
        "metrics": metrics,
        "negative_entries": _bank_size(model, "negative_bank", "memory_bank"),
        "positive_entries": _bank_size(model, "positive_bank"),
        "threshold": threshold if math.isfinite(threshold) else None,
        "accept": decisions and decisions.accept,
        "reject": decisions and decisions.reject,
    }


def trainer_settings(model: AnomalibModule, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the trainer, cut short for a quick try unless the model needs one epoch only."""
    built = instantiate_arguments(Trainer, settings["trainer"])
    arguments = {name: built[name] for name in settings["trainer"]}
    if settings["quick"] and "max_epochs" not in model.trainer_arguments:
        arguments.pop("max_steps", None)
        for name, most in QUICK.items():
            given = arguments.get(name)
            arguments[name] = min(given, most) if isinstance(given, int) and given > 0 else most
    return arguments


def build_engine(folder: str, accelerator: str, *callbacks: Callback, **arguments: Any) -> Engine:
    """Build Anomalib's engine for one device, without output of its own."""
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


def _write_predictions(found: measure.Predictions, transform: Transform | None, folder: Path) -> dict[str, float]:
    """Write images, maps (of whole images, as the transform may crop) and histograms; return the metrics."""
    metrics = measure.image_metrics(found.scores, found.labels)
    maps, masks = found.maps, found.masks
    if maps is not None:
        whole = whole_maps(maps, transform, inspect_image(found.images[0].image))
        write_arrays(folder / "maps.npz", maps=measure.small_maps(whole).numpy())
        if masks is not None and (of_pixels := measure.pixel_metrics(maps, masks)):
            write_arrays(folder / HISTOGRAMS_NAME, **pixel_histograms(maps, masks)._asdict())
            metrics |= of_pixels
    write_images(found.images, folder)
    return metrics


def _bank_size(model: AnomalibModule, *names: str) -> int | None:
    """Return the number of entries of the model's first bank of these names; None without one."""
    banks = (getattr(model.model, name, ()) for name in names)
    return next((len(bank) for bank in banks if len(bank)), None)


if __name__ == "__main__":
    anomalib_exdd.register()  # plain names of classes, whether or not the start-up file has registered them
    main(Path(sys.argv[1]))
