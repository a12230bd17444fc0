"""`anomalib predict` for folders of any files: a table of all predictions, in constant memory.

:class:`.RawScores` comes before Anomalib's post-processor, :class:`Predictions` after all other callbacks. Every
process appends its rows to a file of its own, one line of JSON each; at the end they are copied to ``predictions.csv``
and ``predictions.json``, which are complete whenever they exist. A record gets every row at once.
"""

import csv
import fileinput
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from lightning.pytorch import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torchvision.transforms.v2 import Transform

from anomalib_exdd.images.file_discovery import FilesOfEnding, count_endings, other_files
from anomalib_exdd.images.predict_loader import PredictLoader, is_replaceable, replace_loader
from anomalib_exdd.images.reading import warn_of_unused_range
from anomalib_exdd.models.record import Record, model_version
from anomalib_exdd.models.transforms import first_resize
from anomalib_exdd.models.visualization import image_names
from anomalib_exdd.utils.files import write_atomically

from .prediction_row import PredictionRow, RawScores, prediction_rows

logger = logging.getLogger(__name__)

CSV_NAME, JSON_NAME = "predictions.csv", "predictions.json"
UNREADABLE = 3
"""Exit code of the command if some files could not be read, and all others were predicted."""


@dataclass
class Summary:
    """Counts over all rows."""

    images: int = 0  # that were predicted
    decisions: Counter[str] = field(default_factory=Counter)  # images of each decision
    labels: Counter[str] = field(default_factory=Counter)  # images of each label
    seconds: float = 0.0  # of all images
    slowest: tuple[str, float] | None = None  # path and seconds
    unreadable: list[str] = field(default_factory=list)  # why a file could not be read
    masks_left_out: int = 0  # that lay beside their images
    files_left_out: dict[str, FilesOfEnding] = field(default_factory=dict)  # not known as images, by their ending

    def add(self, row: dict[str, Any]) -> None:
        """Count a row."""
        if row["error"] is not None:
            self.unreadable.append(row["error"])
            return
        self.images += 1
        self.decisions.update(filter(None, [row["decision"]]))
        self.labels.update(filter(None, [row["label"]]))
        self.seconds += row["seconds"]
        if self.slowest is None or row["seconds"] > self.slowest[1]:
            self.slowest = (row["path"], row["seconds"])

    def __str__(self) -> str:
        """Return the summary in one line."""
        names = ("accept", "review", "reject") if self.decisions else ("normal", "defective")
        counts = self.decisions or self.labels
        parts = ", ".join(f"{counts[name]} {name}" for name in names)
        phrases = [f"{self.images} {'image' if self.images == 1 else 'images'}: {parts}"]
        if self.slowest is not None:
            path, seconds = self.slowest
            average = self.seconds / self.images
            phrases.append(f"{average:.3f} s per image, slowest {seconds:.3f} s ({Path(path).name})")
        for number, what in ((len(self.unreadable), "unreadable"), (self.masks_left_out, "masks left out")):
            phrases += [f"{number} {what}"] if number else []
        if self.files_left_out:
            phrases.append(f"other files left out: {count_endings(self.files_left_out)}")
        return "; ".join(phrases)


class Predictions(Callback):
    """Writes the table of predictions beside the folder of the pictures, and logs where results are."""

    def __init__(self, raw: RawScores) -> None:
        self.raw = raw
        self._record: Record | None = None
        self._version = ""  # of the model
        self._summary = Summary()
        self._loaders: list[PredictLoader] = []
        self._transforms: list[list[Transform | None]] = []  # of each loader's images

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replace Anomalib's loader, which stops at broken files, and keep no predictions that the command ignores."""
        if stage != TrainerFn.PREDICTING:
            return
        if _command_of(trainer) is not None:
            trainer.predict_loop.return_predictions = False
        # Lightning has no hook before a loader that it was given: this is where it keeps it.
        source = trainer.predict_loop._data_source  # noqa: SLF001
        self._summary = Summary(files_left_out=_files_left_out(trainer, source.instance))
        process = (trainer.global_rank, trainer.world_size)
        loaders = CombinedLoader(source.instance)
        loaders.flattened = [replace_loader(loader, process) for loader in loaders.flattened]
        source.instance = loaders.iterables

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the file of this process's rows; from here on the model's settings are those of its checkpoint."""
        transform = getattr(pl_module.pre_processor, "transform", None)
        loaders = CombinedLoader(trainer.predict_dataloaders).flattened
        self._transforms = [[*_transforms_of(loader), transform] for loader in loaders]
        self._loaders = [loader for loader in loaders if isinstance(loader, PredictLoader)]
        for loader in self._loaders:
            loader.resize, loader.white_level = first_resize(transform), pl_module.white_level
            warn_of_unused_range(loader.files, loader.white_level)
        self._summary.masks_left_out = sum(len(loader.masks) for loader in self._loaders)
        path = pl_module.hparams.get("record")
        self._record = Record(path) if path else None
        if self._record is not None:
            self._version = model_version(pl_module)
            if trainer.is_global_zero:
                self._record.add("model", self._version, str(trainer.ckpt_path or ""), pl_module.facts())
        Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
        partial_path(trainer.default_root_dir, trainer.global_rank).write_bytes(b"")

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: ImageBatch, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the rows of a batch."""
        names = image_names(outputs, trainer, batch_idx, dataloader_idx)
        transforms = self._transforms[dataloader_idx]
        self._append(trainer, prediction_rows(pl_module, outputs, names, transforms, self.raw))

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the table of the rows of all processes, once all of them are done."""
        self._append(trainer, ())
        if self._record is not None:
            self._record.close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            write_tables(Path(trainer.default_root_dir), trainer.world_size, self._summary)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Log where the results of a test or a prediction are; the command ends here if files were unreadable."""
        if stage not in {TrainerFn.TESTING, TrainerFn.PREDICTING} or not trainer.is_global_zero:
            return
        pictures = getattr(pl_module.visualizer, "output_dir", None)
        if pictures is not None and Path(pictures).is_dir():
            logger.info("Pictures with heat maps: %s", Path(pictures).resolve())
        checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if stage == TrainerFn.TESTING and checkpoint and Path(checkpoint).is_file():
            logger.info("Trained model: %s", Path(checkpoint).resolve())
        if stage == TrainerFn.PREDICTING and (self._summary.images or self._summary.unreadable):
            _report(Path(trainer.default_root_dir), self._summary, by_command=_command_of(trainer) is not None)

    def _append(self, trainer: Any, rows: Iterable[PredictionRow]) -> None:
        """Write the rows of the files that could not be read since the last call, and those of a batch."""
        unreadable = [file for loader in self._loaders for file in loader.take_unreadable()]
        with partial_path(trainer.default_root_dir, trainer.global_rank).open("a", encoding="utf-8") as lines:
            for row in (*(PredictionRow(file.path, error=file.reason) for file in unreadable), *rows):
                lines.write(json.dumps(row.to_dict(), allow_nan=False) + "\n")
                if self._record is not None:
                    self._record.add("prediction", self._version, row.path, row.to_dict())


def partial_path(folder: str | Path, process: int) -> Path:
    """Return the file of a process's rows until all are written; an interrupted prediction leaves it behind."""
    return Path(folder) / f"predictions.partial-{process}.jsonl"


def write_tables(folder: Path, world_size: int, summary: Summary) -> None:
    """Write the rows of all processes and their summary to CSV and JSON; then remove all partial files.

    In the CSV an empty cell stands for None, and the regions are JSON.
    """
    with (
        write_atomically(folder / CSV_NAME) as csv_path,
        write_atomically(folder / JSON_NAME) as json_path,
        # Names of files may hold bytes that are no UTF-8.
        csv_path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as csv_file,
        json_path.open("w", encoding="utf-8") as json_file,
        fileinput.input([partial_path(folder, process) for process in range(world_size)], encoding="utf-8") as lines,
    ):
        table = csv.DictWriter(csv_file, [column.name for column in fields(PredictionRow)])
        table.writeheader()
        json_file.write('{"predictions": [')
        for number, row in enumerate(map(json.loads, lines)):
            json_file.write(f"{',' if number else ''}\n  {json.dumps(row)}")
            regions = row["regions"]
            table.writerow(row | {"regions": None if regions is None else json.dumps(regions)})
            summary.add(row)
        files_left_out = {ending: files._asdict() for ending, files in summary.files_left_out.items()}
        counts = vars(summary) | {"unreadable": len(summary.unreadable), "files_left_out": files_left_out}
        json_file.write(f'\n],\n"summary": {json.dumps(counts)}}}\n')
    for path in folder.glob(partial_path(folder, 0).name.replace("0", "*")):  # of interrupted predictions too
        path.unlink()


def _report(folder: Path, summary: Summary, *, by_command: bool) -> None:
    """Log a finished prediction; raise an error, or end the command, if files could not be read."""
    if summary.images:
        logger.info("%s", summary)
    logger.info("Predictions: %s and %s", (folder / CSV_NAME).resolve(), JSON_NAME)
    tell = partial(print, file=sys.stderr) if by_command else logger.warning
    for error in summary.unreadable:
        tell(f"Not predicted: {error}")
    if summary.unreadable and not summary.images:
        msg = f"No file can be read as an image; {len(summary.unreadable)} were tried."
        raise SystemExit(f"Error: {msg}") if by_command else ValueError(msg)
    if summary.unreadable and by_command:
        raise SystemExit(UNREADABLE)


def _command_of(trainer: Any) -> SaveConfigCallback | None:
    """Return the callback of a command line, which has no use for returned predictions; None under Python code."""
    return next((each for each in trainer.callbacks if isinstance(each, SaveConfigCallback)), None)


def _files_left_out(trainer: Any, loaders: Any) -> dict[str, FilesOfEnding]:
    """List the files in the folder of the images that Anomalib has not taken for images.

    The command knows the folder. Elsewhere it is where all the images are, and a single image may be all that is meant.
    """
    listed = [loader.dataset.image_filenames for loader in CombinedLoader(loaders).flattened if is_replaceable(loader)]
    if len(listed) != 1 or not trainer.is_global_zero:
        return {}
    command = _command_of(trainer)
    folder = Path(os.path.commonpath(listed[0]) if command is None else str(command.config.get("data")))
    return other_files(folder, listed[0]) if folder.is_dir() else {}


def _transforms_of(loader: Any) -> list[Transform | None]:
    """Return what a loader, or its data set, does to its images."""
    source = loader if isinstance(loader, PredictLoader) else getattr(loader, "dataset", None)
    return [getattr(source, name, None) for name in ("first_transform", "augmentations", "transform")]
