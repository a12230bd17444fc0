"""A person's decisions about synthetic images: one small table that any spreadsheet opens."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REVIEW_NAME = "review.csv"
COLUMNS = ("image", "decision", "comment")
DECISIONS = ("accept", "reject")


@dataclass(frozen=True)
class Decision:
    """What a reviewer says about an image.

    Attributes:
        decision: `accept`, `reject`, or empty: the measurement decides.
        comment: The reviewer's words.
    """

    decision: str = ""
    comment: str = ""


def empty_review(images: Iterable[str]) -> str:
    """Return a table to fill in.

    Args:
        images: Files of the images, relative to their folder.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([COLUMNS, *((image, "", "") for image in images)])
    return table.getvalue()


def read_review(root: Path, images: Iterable[str]) -> dict[str, Decision]:
    """Read the review of a folder of synthetic images.

    Spreadsheets may have changed separators, encoding or the order of columns and rows. An image is known by its file
    name, with or without its folder; images without a row have no decision.

    Args:
        root: Folder of the synthetic images.
        images: Files of all its images, relative to it.

    Returns:
        Decision for each image that has a row.

    Raises:
        ValueError: If the table has no such columns, a decision is no known word, or an image is unknown or has two
            different decisions.
    """
    path = root / REVIEW_NAME
    if not path.is_file():
        return {}
    known = {Path(image).name: image for image in images}
    # Comments may hold letters of any old encoding; they only have to be shown.
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    header = io.StringIO(text).readline()
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    table.fieldnames = [name.strip().lower() for name in table.fieldnames or []]
    if not {"image", "decision"} <= set(table.fieldnames):
        msg = (
            f"The file `{path}` has to start with the line `{','.join(COLUMNS)}`, but its first line is "
            f"`{header.strip()}`. Restore the line, or remove the file and run `anomalib synthesize` again."
        )
        raise ValueError(msg)
    review: dict[str, Decision] = {}
    for row in table:
        name = (row["image"] or "").strip().replace("\\", "/").rpartition("/")[2]
        decision = Decision((row["decision"] or "").strip().lower(), (row.get("comment") or "").strip())
        if not name and not decision.decision:
            continue  # an empty line at the end
        where = f"Line {table.line_num} of `{path}`"
        if decision.decision not in {"", *DECISIONS}:
            msg = f"{where} has the decision `{row['decision']}`. Write {' or '.join(DECISIONS)}, or leave it empty."
            raise ValueError(msg)
        if name not in known:
            msg = f"{where} names the image `{row['image']}`, which is not in `{root}`. Remove the line."
            raise ValueError(msg)
        before = review.get(known[name], decision)
        if before.decision != decision.decision:
            msg = f"{where} decides otherwise about `{row['image']}` than a line above it. Remove one of the two."
            raise ValueError(msg)
        review[known[name]] = decision
    return review
