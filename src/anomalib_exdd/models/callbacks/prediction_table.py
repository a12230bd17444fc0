"""The table of predictions: a row for every image, written as the images come, and the files made from the rows.

Every process of a prediction appends its rows to a file of its own, one line of JSON each. At the end they are copied
row by row into ``predictions.csv`` and ``predictions.json``, beside which nothing half-written is ever seen under these
names. Nothing here grows with the number of images.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from anomalib_exdd.images.file_discovery import FilesOfEnding, count_endings
from anomalib_exdd.models.regions import Region
from anomalib_exdd.utils.files import write_atomically

CSV_NAME, JSON_NAME = "predictions.csv", "predictions.json"


@dataclass(frozen=True)
class PredictionRow:
    """What is known of an image; what does not apply, or is not known, is None.

    Attributes:
        path: The image; if it has no path, the name of its picture.
        score: Anomalib's normalised score, 0 to 1.
        raw_score: The score before that.
        probability: Probability that the image is defective, where images are scored by one.
        decision: What follows from it, for a model that has thresholds for it: "accept", "review" or "reject".
        label: Anomalib's decision by ``threshold``: "normal" or "defective".
        threshold: Images with a higher ``score`` are labelled defective.
        accept_threshold: Images with a lower ``probability`` are accepted.
        reject_threshold: Images with at least this ``probability`` are rejected.
        num_regions: Number of defect regions.
        regions: The defect regions; None where they cannot be located in the original image.
        seconds: Time of the image: that of its batch, from resizing to the score, divided by the batch's images.
        error: Why there is no prediction.
        reason: Why the image is not accepted, for a model that gives reasons: "known" or "unfamiliar"; see
            :class:`.Reason`.
        kind: Kind of the defects that it resembles.
        kind_share: Share of the patches that make its score whose nearest defect is of that kind.
    """

    path: str
    score: float | None = None
    raw_score: float | None = None
    probability: float | None = None
    decision: str | None = None
    label: str | None = None
    threshold: float | None = None
    accept_threshold: float | None = None
    reject_threshold: float | None = None
    num_regions: int | None = None
    regions: list[Region] | None = None
    seconds: float | None = None
    error: str | None = None
    reason: str | None = None
    kind: str | None = None
    kind_share: float | None = None

    def to_json(self) -> str:
        """Return the row as one line of JSON."""
        content = asdict(self)
        if self.regions is not None:
            content["regions"] = [{**region._asdict(), "box": list(region.box)} for region in self.regions]
        return json.dumps(content, allow_nan=False)


@dataclass
class Summary:
    """What all rows together say.

    Attributes:
        images: Images that were predicted.
        decisions: How many of them there are of each decision.
        labels: How many of them there are of each label.
        seconds: Time of all of them.
        slowest: Path and time of the slowest.
        unreadable: How many files could not be read.
        masks_left_out: How many masks lay beside their images and were not predicted.
        files_left_out: Other files in the folder, which are no images that Anomalib knows, by their ending.
    """

    images: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: tuple[str, float] | None = None
    unreadable: int = 0
    masks_left_out: int = 0
    files_left_out: dict[str, FilesOfEnding] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Count a row."""
        if row["error"] is not None:
            self.unreadable += 1
            return
        self.images += 1
        for counts, name in ((self.decisions, row["decision"]), (self.labels, row["label"])):
            if name is not None:
                counts[name] = counts.get(name, 0) + 1
        self.seconds += row["seconds"]
        if self.slowest is None or row["seconds"] > self.slowest[1]:
            self.slowest = (row["path"], row["seconds"])

    def __str__(self) -> str:
        """Return the summary in one line."""
        counts = {name: self.decisions.get(name, 0) for name in ("accept", "review", "reject")}
        if not self.decisions:
            counts = {name: self.labels.get(name, 0) for name in ("normal", "defective")}
        parts = ", ".join(f"{count} {name}" for name, count in counts.items())
        line = f"{self.images} {'image' if self.images == 1 else 'images'}: {parts}"
        if self.slowest is not None:
            path, seconds = self.slowest
            line += f"; {self.seconds / self.images:.3f} s per image, slowest {seconds:.3f} s ({Path(path).name})"
        if self.unreadable:
            line += f"; {self.unreadable} unreadable"
        if self.masks_left_out:
            line += f"; {self.masks_left_out} masks left out"
        if self.files_left_out:
            line += f"; other files left out: {count_endings(self.files_left_out)}"
        return line


def partial_path(folder: Path, process: int) -> Path:
    """Return where a process puts its rows until all are there; an interrupted prediction leaves it behind."""
    return folder / f"predictions.partial-{process}.jsonl"


def summarise(partials: Sequence[Path], **left_out: Any) -> Summary:
    """Summarise the rows of all processes.

    Args:
        partials: Files of the processes.
        left_out: What the rows do not tell: fields of :class:`Summary`.
    """
    summary = Summary(**left_out)
    for row in _rows(partials):
        summary.add(row)
    return summary


def write_tables(partials: Sequence[Path], folder: Path, summary: Summary) -> None:
    """Write the rows of all processes, one process after the other, to CSV and JSON; then remove all partial files.

    Both files hold the same. In the CSV an empty cell stands for None, and the regions are JSON.

    Args:
        partials: Files of the processes.
        folder: Where ``predictions.csv`` and ``predictions.json`` go.
        summary: Goes behind the rows of the JSON file.
    """
    with (
        write_atomically(folder / CSV_NAME) as csv_path,
        write_atomically(folder / JSON_NAME) as json_path,
        # Names of files may hold bytes that are no UTF-8.
        csv_path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as csv_file,
        json_path.open("w", encoding="utf-8") as json_file,
    ):
        table = csv.DictWriter(csv_file, [column.name for column in fields(PredictionRow)])
        table.writeheader()
        json_file.write('{"predictions": [')
        for number, row in enumerate(_rows(partials)):
            json_file.write(f"{',' if number else ''}\n  {json.dumps(row)}")
            regions = row["regions"]
            table.writerow(row | {"regions": None if regions is None else json.dumps(regions)})
        counts = asdict(summary)
        counts["files_left_out"] = {ending: files._asdict() for ending, files in summary.files_left_out.items()}
        json_file.write(f'\n],\n"summary": {json.dumps(counts)}}}\n')
    for path in folder.glob(partial_path(folder, 0).name.replace("0", "*")):  # of interrupted predictions too
        path.unlink()


def unreadable_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Yield path and error of the rows of a finished table that have no prediction."""
    with (folder / CSV_NAME).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        for row in csv.DictReader(file):
            if row["error"]:
                yield row


def _rows(partials: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for partial in partials:
        with partial.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
