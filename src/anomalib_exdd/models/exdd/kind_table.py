"""`anomalib test` by kinds of defects: what defects of each kind, and good images, are taken for."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from pandas import DataFrame, Index

from anomalib_exdd.models.regions import Reason
from anomalib_exdd.utils.distributed import gather_objects
from anomalib_exdd.utils.files import write_atomically

logger = logging.getLogger(__name__)

GOOD, UNNAMED = "good", "kind not known"


class KindTable(Callback):
    """Counts what the images of one test are taken for, kind by kind; writes a table if data and banks know kinds."""

    def __init__(self) -> None:
        self._cases: list[tuple[str, str]] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Take the images of a batch."""
        kinds, reasons = getattr(outputs, "kinds", None), getattr(outputs, "reasons", None)
        if kinds and reasons is not None and outputs.gt_label is not None:
            for defective, kind, found in zip(outputs.gt_label.tolist(), kinds, reasons, strict=True):
                self._cases.append(((kind or UNNAMED) if defective else GOOD, taken_for(found.image)))

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the table of all processes beside the folder of the pictures, and log it."""
        cases = [case for part in gather_objects(self._cases) for case in part]
        known = set(pl_module.model.positive_bank.kinds.values())
        if not trainer.is_global_zero or not known or {kind for kind, _ in cases} <= {GOOD, UNNAMED}:
            return
        table = confusion_table(cases, known)
        path = Path(trainer.default_root_dir) / "kinds.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial:
            table.to_csv(partial, index_label=table.columns.name, lineterminator="\r\n")
        logger.info("What test images of each kind are taken for (%s):\n%s", path.resolve(), table.to_string())


def taken_for(reason: Reason | None) -> str:
    """Name what an image is taken for, by the reason why it is not accepted; None if it is."""
    if reason is None:
        return "accepted"
    return "unfamiliar" if reason.reason == "unfamiliar" else reason.kind or UNNAMED


def confusion_table(cases: Sequence[tuple[str, str]], known: Collection[str]) -> DataFrame:
    """Count test images by what they are, in rows, and by what they are taken for, in columns.

    Rows are good images, each kind of the data, and defects of which the kind is not known, if there are any. Columns
    are the known kinds of the bank, its defects without a kind, if any image resembles these, "unfamiliar" and
    "accepted".
    """
    counts = Counter(cases)
    kinds, found = ({case[side] for case in cases} for side in (0, 1))
    rows = [GOOD, *sorted(kinds - {GOOD, UNNAMED}), *kinds & {UNNAMED}]
    columns = [*sorted(known), *found & {UNNAMED}, "unfamiliar", "accepted"]
    content = [[counts[row, column] for column in columns] for row in rows]
    return DataFrame(content, rows, Index(columns, name="kind"))
