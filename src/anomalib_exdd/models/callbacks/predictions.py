"""`anomalib predict` for real use: a table of all predictions, in constant memory, whatever the files are like.

Anomalib's command hands the model a loader, and the model has no say before its callbacks do. Two of them do it all:
:class:`RawScores` comes before Anomalib's post-processor, :class:`Predictions` after everything else. This is the one
file of a model that knows a data set, the loader of the photos: nobody else is asked before Anomalib reads them.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO

import numpy as np
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.file_discovery import FilesOfEnding, other_files
from anomalib_exdd.images.predict_loader import PredictLoader, is_replaceable, replace_loader
from anomalib_exdd.images.reading import inspect_image, warn_of_unused_range
from anomalib_exdd.models.regions import Region, find_regions
from anomalib_exdd.models.transforms import crops_of, first_resize, seen_part
from anomalib_exdd.models.visualization import image_names

from .prediction_table import (
    CSV_NAME,
    JSON_NAME,
    PredictionRow,
    Summary,
    partial_path,
    summarise,
    unreadable_rows,
    write_tables,
)

logger = logging.getLogger(__name__)

UNREADABLE = 3
"""Exit code of the command if some files could not be read, and all others were predicted."""


class Decisions(Protocol):
    """Two thresholds on the probability of a defect: good below ``accept``, defective from ``reject`` on."""

    @property
    def accept(self) -> float:
        """Images with a lower probability are accepted."""

    @property
    def reject(self) -> float:
        """Images with at least this probability are rejected."""

    def name(self, probability: float) -> str:
        """Return "accept", "review" or "reject"."""

    def describe(self, probability: float) -> str:
        """Return the decision on an image and what it stands on, in one line."""


class RawScores(Callback):
    """Measures what the post-processor, which comes next, does not leave: the model's own scores, and its time.

    Attributes:
        scores: Scores of the batch as the model gave them, shape (B,).
        seconds: Time that the batch took, from its arrival on the device to its scores.
    """

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.seconds = 0.0
        self._start = 0.0

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        del args, kwargs
        self._start = time.perf_counter()

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the scores, and stop the clock."""
        del trainer, pl_module, args, kwargs
        self.scores = torch.as_tensor(outputs.pred_score).flatten().tolist()  # waits for the GPU
        self.seconds = time.perf_counter() - self._start


class Predictions(Callback):
    """Writes a row for every predicted image, and files of all rows at the end, beside the folder of the pictures.

    Args:
        raw: The callback that looks at the batches before they are post-processed.

    Attributes:
        summary: What the last finished prediction came to; None before, and in all processes but the first.
    """

    def __init__(self, raw: RawScores) -> None:
        self.raw = raw
        self.summary: Summary | None = None
        self.folder: Path | None = None
        self._rows: TextIO | None = None
        self._decisions: Decisions | None = None
        self._probabilities = False
        self._left_out: dict[str, FilesOfEnding] = {}
        self._transforms: list[list[Transform | None]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let Anomalib's loader tolerate broken files, and let no predictions pile up that the command never uses."""
        del pl_module
        if stage != TrainerFn.PREDICTING:
            return
        if run_by_command(trainer):
            trainer.predict_loop.return_predictions = False
        # Lightning has no hook before a loader that it was given: this is where it keeps it.
        source = trainer.predict_loop._data_source  # noqa: SLF001
        self._left_out = _left_out(trainer, source.instance)
        process = (trainer.global_rank, trainer.world_size)
        if isinstance(source.instance, Sequence):
            source.instance = [replace_loader(loader, process) for loader in source.instance]
        else:
            source.instance = replace_loader(source.instance, process)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the file of this process's rows; from here on the model's settings are those of its checkpoint."""
        self.summary = None
        self._decisions, self._probabilities = pl_module.decisions, pl_module.scores_are_probabilities
        transform = getattr(pl_module.pre_processor, "transform", None)
        self._transforms = [[*_transforms_of(loader), transform] for loader in _as_list(trainer.predict_dataloaders)]
        if any(seen_part(transforms, (1000, 1000)) is None for transforms in self._transforms):
            logger.warning(
                "Images are transformed by more than resizing, cropping at the centre and normalising: defect regions "
                "cannot be located in the original images, and are left out."
            )
        loaders = _predict_loaders(trainer)
        for loader in loaders:
            loader.resize, loader.white_level = first_resize(transform), pl_module.white_level
            warn_of_unused_range(loader.files, loader.white_level)
        if masks := [mask for loader in loaders for mask in loader.masks]:
            logger.info("Not predicted: %d masks that lie beside their images, such as %s", len(masks), masks[0])
        self.folder = Path(trainer.default_root_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = partial_path(self.folder, trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: ImageBatch,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch."""
        del batch
        self._write_unreadable(trainer)
        names = image_names(outputs, trainer, batch_idx, dataloader_idx)
        regions: list[list[Region] | None] = [None] * len(names)
        if _is_found(pl_module.post_processor, "pixel_threshold"):
            regions = self._regions(outputs, names, self._transforms[dataloader_idx])
        for number, name in enumerate(names):
            self._write(self._row(outputs, number, name, regions[number], pl_module.post_processor))

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the files of the rows of all processes, once all of them are done."""
        del pl_module
        self._write_unreadable(trainer)
        self._close()
        trainer.strategy.barrier("predictions")
        if self.folder is None or not trainer.is_global_zero:
            return
        loaders = _predict_loaders(trainer)
        partials = [partial_path(self.folder, process) for process in range(trainer.world_size)]
        masks = sum(len(loader.masks) for loader in loaders)
        summary = summarise(partials, masks_left_out=masks, files_left_out=self._left_out)
        write_tables(partials, self.folder, summary)
        self.summary = summary

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the rows so far where they are."""
        del trainer, pl_module, exception
        self._close()

    def _close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _write(self, row: PredictionRow) -> None:
        if self._rows is not None:
            self._rows.write(row.to_json() + "\n")

    def _write_unreadable(self, trainer: Any) -> None:
        for loader in _predict_loaders(trainer):
            for file in loader.take_unreadable():
                self._write(PredictionRow(file.path, error=file.reason))

    def _row(
        self, batch: ImageBatch, number: int, name: str, regions: list[Region] | None, post_processor: Any
    ) -> PredictionRow:
        """Describe image ``number`` of a post-processed batch."""
        reasons = getattr(batch, "reasons", None)
        reason = None if reasons is None else reasons[number].image
        decisions, raw = self._decisions, _finite(self.raw.scores[number])
        probability = raw if self._probabilities else None
        threshold = _threshold(post_processor)
        label = None if threshold is None or batch.pred_label is None else _label(batch.pred_label[number])
        scores = torch.as_tensor(batch.pred_score).flatten()
        return PredictionRow(
            path=name,
            score=_finite(float(scores[number])),
            raw_score=raw,
            probability=probability,
            decision=decisions.name(probability) if decisions is not None and probability is not None else None,
            label=label,
            threshold=None if label is None else threshold,
            accept_threshold=decisions.accept if decisions is not None else None,
            reject_threshold=decisions.reject if decisions is not None else None,
            num_regions=None if regions is None else len(regions),
            regions=regions,
            seconds=round(self.raw.seconds / len(self.raw.scores), 6),
            **({} if reason is None else reason._asdict()),
        )

    def _regions(
        self, batch: ImageBatch, names: Sequence[str], transforms: Sequence[Transform | None]
    ) -> list[list[Region] | None]:
        """Locate the defect regions of a batch in the original images; None where that cannot be done."""
        masks, maps = batch.pred_mask, batch.anomaly_map
        # Without a threshold, Anomalib's "mask" is the map itself.
        if masks is None or maps is None or masks.dtype != torch.bool:
            return [None] * len(names)
        sizes = [_size_of(name) for name in names]
        # Images that differ in size when a batch is made of them are stretched before they are cropped.
        stretched = len(set(sizes)) > 1 and any(map(crops_of, transforms)) and not _resizes_to_one_size(transforms)
        found: list[list[Region] | None] = []
        reasons = getattr(batch, "reasons", None) or [None] * len(names)
        for mask, values, size, own in zip(masks, maps, sizes, reasons, strict=True):
            part = None if size is None or stretched else seen_part(transforms, size)
            found.append(
                None
                if size is None or part is None
                else find_regions(_plane(mask), _plane(values), size, part, own and own.of_box)
            )
        return found


def report(trainer: Any) -> None:
    """Say what a prediction came to and where its table is; the command exits with a code if files were unreadable.

    Raises:
        SystemExit: With code 3 if the command could not read some of the files, and with a message if it could not
            read any.
        ValueError: If no file could be read, outside the command.
    """
    predictions = next((each for each in trainer.callbacks if isinstance(each, Predictions)), None)
    if predictions is None or predictions.summary is None or predictions.folder is None:
        return
    summary, folder = predictions.summary, predictions.folder
    if summary.images:
        logger.info("%s", summary)
    logger.info("Predictions: %s and %s", (folder / CSV_NAME).resolve(), JSON_NAME)
    by_command = run_by_command(trainer)
    for row in unreadable_rows(folder):
        if by_command:
            sys.stderr.write(f"Not predicted: {row['error']}\n")
        else:
            logger.warning("Not predicted: %s", row["error"])
    if summary.unreadable and not summary.images:
        _fail(f"No file can be read as an image; {summary.unreadable} were tried.", by_command=by_command)
    if summary.unreadable and by_command:
        raise SystemExit(UNREADABLE)


def run_by_command(trainer: Any) -> bool:
    """Tell whether a trainer works for a command line, which has no use for what it returns, or for Python code."""
    return any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks)


def _fail(message: str, *, by_command: bool) -> NoReturn:
    raise SystemExit(f"Error: {message}") if by_command else ValueError(message)


def _left_out(trainer: Any, loaders: Any) -> dict[str, FilesOfEnding]:
    """Look for files in the folder of the photos that Anomalib has not taken for images.

    The command knows the folder. Elsewhere it is where all the photos are, and a single photo may be all that is meant.
    """
    commands = [callback.config for callback in trainer.callbacks if isinstance(callback, SaveConfigCallback)]
    listed = [loader.dataset.image_filenames for loader in _as_list(loaders) if is_replaceable(loader)]
    if len(listed) != 1 or not trainer.is_global_zero:
        return {}
    folder = Path(str(commands[0].get("data")) if commands else os.path.commonpath(listed[0]))
    return other_files(folder, listed[0]) if folder.is_dir() else {}


def _as_list(loaders: Any) -> Sequence[Any]:
    return loaders if isinstance(loaders, Sequence) else [loaders]


def _predict_loaders(trainer: Any) -> list[PredictLoader]:
    return [loader for loader in _as_list(trainer.predict_dataloaders) if isinstance(loader, PredictLoader)]


def _transforms_of(loader: Any) -> list[Transform | None]:
    """Return what a loader does to its images."""
    if isinstance(loader, PredictLoader):
        return [loader.first_transform]
    dataset = getattr(loader, "dataset", None)
    return [getattr(dataset, name, None) for name in ("augmentations", "transform")]


def _resizes_to_one_size(transforms: Sequence[Transform | None]) -> bool:
    resize = next((each for each in map(first_resize, transforms) if each is not None), None)
    return resize is not None and isinstance(resize.size, Sequence) and len(resize.size) == 2


def _size_of(path: str) -> tuple[int, int] | None:
    try:
        return inspect_image(path)
    except ValueError:  # gone since it was read, or never a file
        return None


def _plane(values: Tensor) -> Any:
    return np.asarray(values.detach().cpu()).reshape(values.shape[-2:])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _threshold(post_processor: Any) -> float | None:
    threshold = getattr(post_processor, "normalized_image_threshold", None)
    return None if threshold is None or not _is_found(post_processor, "image_threshold") else _finite(float(threshold))


def _is_found(post_processor: Any, name: str) -> bool:
    """Tell whether a post-processor has a threshold; Anomalib's takes 0.5 of the raw scores if it never found one."""
    threshold = getattr(post_processor, name, None)
    return threshold is None or not math.isnan(float(threshold))


def _label(pred_label: Tensor) -> str | None:
    if pred_label.dtype != torch.bool:  # without a threshold, the "label" is the score itself
        return None
    return "defective" if bool(pred_label) else "normal"
