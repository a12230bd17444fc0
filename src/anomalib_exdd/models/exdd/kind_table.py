"""`anomalib test` by kinds of defects: what defects of each kind, and good images, are taken for."""

import csv
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback

from anomalib_exdd.models.regions import Reason
from anomalib_exdd.utils.distributed import gather_objects
from anomalib_exdd.utils.files import write_atomically

logger = logging.getLogger(__name__)

NAME = "kinds.csv"


class Case(NamedTuple):
    """A test image and what it is taken for."""

    defective: bool
    kind: str  # of its defect; empty if it is not known, and for a good image
    reason: Reason | None  # why it is not accepted, without the share of the kind; None if it is accepted


class KindTable(Callback):
    """Counts what the test images of each kind are taken for, and writes a table if data and banks know kinds."""

    def __init__(self) -> None:
        self._counts: Counter[Case] = Counter()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Start counting."""
        self._counts = Counter()

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Count the images of a batch."""
        kinds, reasons = getattr(outputs, "kinds", None), getattr(outputs, "reasons", None)
        if not kinds or reasons is None or outputs.gt_label is None:
            return
        for defective, kind, found in zip(outputs.gt_label.tolist(), kinds, reasons, strict=True):
            reason = found.image and found.image._replace(kind_share=None)
            self._counts[Case(bool(defective), kind if defective else "", reason)] += 1

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the table of all processes beside the folder of the pictures, and log it."""
        counts = sum(gather_objects(self._counts), Counter[Case]())
        known = set(pl_module.model.positive_bank.kinds.values())
        if not trainer.is_global_zero or not known or not any(case.kind for case in counts):
            return
        table = confusion_table(counts, known)
        path = Path(trainer.default_root_dir) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(table)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        logger.info("What test images of each kind are taken for (%s):\n%s", path.resolve(), "\n".join(lines))


def confusion_table(counts: Mapping[Case, int], known: Collection[str]) -> list[list[str]]:
    """Arrange test images by what they are, in rows, and by what they are taken for, in columns, below a header.

    Rows are good images, each kind of the data, and defects of which the kind is not known, if there are any. Columns
    are the known kinds of the bank, its defects without a kind, if any image resembles these, "unfamiliar" and
    "accepted".
    """
    rows = sorted({(False, ""), *(case[:2] for case in counts)}, key=lambda row: (row[0], not row[1], row[1]))
    columns: dict[Reason | None, str] = {Reason("known", kind): kind for kind in sorted(known)}
    if any(case.reason == Reason("known") for case in counts):
        columns[Reason("known")] = "kind not known"
    columns |= {Reason("unfamiliar"): "unfamiliar", None: "accepted"}
    table = [["kind", *columns.values()]]
    for defective, kind in rows:
        title = (kind or "kind not known") if defective else "good"
        table.append([title, *(str(counts.get(Case(defective, kind, column), 0)) for column in columns)])
    return table
