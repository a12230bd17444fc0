"""A folder of synthetic images: how each was made, what a reviewer says, and which of them training may use.

::

    root/
    ├── train/00000.png, 00000_GT.png      # accepted images and their masks, 0 and 255, as in KSDD2
    ├── rejected/00001.png, 00001_GT.png   # images without a visible change
    ├── previews/00000.jpg                 # original, mask, result, difference
    ├── records/00000.json                 # one file per finished image
    ├── synthesis.json                     # settings, written first
    ├── manifest.json, manifest.csv        # everything about all images, written last
    └── review.csv                         # to be filled in: accept or reject
"""

import csv
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pandas import DataFrame
from PIL import Image

from anomalib_exdd.utils.files import write_atomically, write_file

FORMAT = 1  # of the files here; to be counted up when an old reader would misunderstand them
START_NAME, MANIFEST_NAME, TABLE_NAME, REVIEW_NAME = "synthesis.json", "manifest.json", "manifest.csv", "review.csv"
PAGE_NAME, SHEET_NAME = "index.html", "contact_sheet.png"
REPORTS = (MANIFEST_NAME, TABLE_NAME, REVIEW_NAME, PAGE_NAME, SHEET_NAME)
FOLDERS = ACCEPTED, REJECTED, PREVIEWS, RECORDS = "train", "rejected", "previews", "records"
DECISIONS = ("accept", "reject")


@dataclass(frozen=True)
class Record:
    """How one image was made: an entry of the manifest."""

    index: int
    image: str  # file, relative to the folder
    mask: str  # file, relative to the folder
    source: str  # normal image that it was made from
    defect: str | None  # real defective image that it was made from, if any
    placement: str  # where the mask comes from, in words
    prompt: str  # the defect in words; empty if none was used
    seed: int
    attempts: int  # how often it was made, until the change was visible or no retries were left
    synthesizer: str
    model: str | None
    revision: str | None
    details: dict[str, Any]  # further entries by the synthesizer, and the `kind` of the real defect, if it is known
    change: dict[str, float | None]  # measurements of `measure_change`; None where a number is not finite
    accepted: bool  # whether the change is visible
    reason: str  # why not

    @property
    def preview(self) -> str:
        """File of the preview, relative to the folder."""
        return f"{PREVIEWS}/{self.index:05d}.jpg"


@dataclass(frozen=True)
class SyntheticImage:
    """A synthetic image and what is known about it."""

    image_path: Path
    mask_path: Path
    record: Record | None  # None if another program made it
    decision: str = ""  # the reviewer's: `accept`, `reject` or empty
    comment: str = ""

    @property
    def accepted(self) -> bool:
        """Whether training may use it: the review overrules the measurement."""
        return self.decision == "accept" if self.decision else self.record is None or self.record.accepted


def read_synthetic(root: str | Path, *, with_rejected: bool = False) -> list[SyntheticImage]:
    """List the synthetic images of a folder: those that training may use, or all of them.

    Args:
        root: Folder written by `anomalib synthesize`, or any with `train/NAME.png` and `train/NAME_GT.png`.
        with_rejected: List also images that the measurement or the review rejects.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If the folder is not finished, or if the manifest or the review cannot be understood.
    """
    root = Path(root)
    start = read_json(root / START_NAME) if (root / START_NAME).is_file() else {}
    again = f"run `{start.get('command') or 'anomalib synthesize'}` again"
    if (root / MANIFEST_NAME).is_file():
        records = [Record(**each) for each in read_json(root / MANIFEST_NAME)["images"]]
        images = [SyntheticImage(root / record.image, root / record.mask, record) for record in records]
    elif start:
        done = len(list((root / RECORDS).glob("[!.]*.json")))
        msg = f"The folder `{root}` is not finished: {done} of {start['count']} images are there. To go on, {again}."
        raise ValueError(msg)
    else:
        paths = [path for path in sorted((root / ACCEPTED).glob("*.png")) if not path.stem.endswith("_GT")]
        images = [SyntheticImage(path, path.with_name(f"{path.stem}_GT.png"), None) for path in paths]
        if not images:
            msg = f"The folder `{root}` does not exist or holds no synthetic images. `anomalib synthesize` writes it."
            raise FileNotFoundError(msg)
    review = read_review(root, {image.image_path.name for image in images})
    images = [replace(image, **review.get(image.image_path.name, {})) for image in images]
    images = [image for image in images if with_rejected or image.accepted]
    for path in (path for image in images for path in (image.image_path, image.mask_path)):
        if not path.is_file():
            msg = f"The file `{path}` is missing. Put it back, or {again} to make it again."
            raise FileNotFoundError(msg)
    return images


def read_review(root: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Read the review of a folder of images: by file name, the `decision` and the `comment` of those that have a row.

    Spreadsheets may have changed separators, encoding or the order of columns and rows, and an image may be named
    without its folder.

    Raises:
        ValueError: If the table has no such columns, a decision is no known word, or an image is unknown.
    """
    path = root / REVIEW_NAME
    if not path.is_file():
        return {}
    # Comments may hold letters of any old encoding; they only have to be shown.
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    header = io.StringIO(text).readline()
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    table.fieldnames = [name.strip().lower() for name in table.fieldnames or []]
    if not {"image", "decision"} <= set(table.fieldnames):
        msg = f"The first line of `{path}` has to be `image,decision,comment`, but is `{header.strip()}`. Restore it."
        raise ValueError(msg)
    review = {}
    for row in table:
        name = (row["image"] or "").strip().replace("\\", "/").rpartition("/")[2]
        decision, comment = (row["decision"] or "").strip().lower(), (row.get("comment") or "").strip()
        if not name and not decision:
            continue  # an empty line at the end
        where = f"Line {table.line_num} of `{path}`"
        if decision not in {"", *DECISIONS}:
            msg = f"{where} has the decision `{row['decision']}`. Write {' or '.join(DECISIONS)}, or leave it empty."
            raise ValueError(msg)
        if name not in names:
            msg = f"{where} names the image `{row['image']}`, which is not in `{root}`. Remove the line."
            raise ValueError(msg)
        review[name] = {"decision": decision, "comment": comment}
    return review


def write_manifest(root: Path, start: dict[str, Any], records: Sequence[Record]) -> None:
    """Write the manifest, as a table and as JSON, and a review to be filled in unless there is one.

    `start` is the content of `synthesis.json`. The table has a column for every entry of the records and every
    measurement; `details` are JSON.
    """
    table = DataFrame([asdict(record) for record in records])
    changes, details = DataFrame(list(table.pop("change"))), table.pop("details")
    table = table.join(changes[sorted(changes)])
    table["details"] = [json.dumps(each, ensure_ascii=False) for each in details]
    write_file(root / TABLE_NAME, table.to_csv(index=False, lineterminator="\n"))
    if not (root / REVIEW_NAME).exists():
        review = table[["image"]].assign(decision="", comment="")
        write_file(root / REVIEW_NAME, review.to_csv(index=False, lineterminator="\n"))
    accepted = sum(record.accepted for record in records)
    manifest = {
        "format": FORMAT,
        "settings": start["settings"],
        "versions": start["versions"],
        "counts": {"images": len(records), "accepted": accepted, "rejected": len(records) - accepted},
        "images": [asdict(record) for record in records],
    }
    write_file(root / MANIFEST_NAME, to_json(manifest))


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Write an image atomically, in the format of the file's ending, with options of that format."""
    with write_atomically(path) as partial:
        image.save(partial, **options)


def to_json(content: Any) -> str:
    """Return a value as readable JSON that ends with a line feed."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read `synthesis.json` or the manifest; a ValueError says that it is of another version's format."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        found = content.get("format")
        msg = f"The file `{path}` has format {found}, but this version reads {FORMAT}. Synthesize into another folder."
        raise ValueError(msg)
    return content


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name the entries of two nested values that differ, each with both of its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        parts = [differences(before.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [line for part in parts for line in part]
    return [] if before == now else [f"`{name}` was {before!r} and is {now!r} now"]
