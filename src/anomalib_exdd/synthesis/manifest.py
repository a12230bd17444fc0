"""What is known about synthetic images: how each was made, what a reviewer says, and which of them training may use.

A folder of synthetic images::

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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1  # of the files here; to be counted up when an old reader would misunderstand them
MANIFEST_NAME, TABLE_NAME, START_NAME, REVIEW_NAME = "manifest.json", "manifest.csv", "synthesis.json", "review.csv"
ACCEPTED, REJECTED, PREVIEWS, RECORDS = "train", "rejected", "previews", "records"
REVIEW_COLUMNS = ("image", "decision", "comment")
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

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> "Record":
        """Build a record from the content of a file; a ValueError names entries that are missing or unknown."""
        names = {field.name for field in fields(cls)}
        found = set(content) if isinstance(content, dict) else set()
        if found != names:
            msg = (
                f"The file `{path}` does not hold records as this version writes them: missing "
                f"{sorted(names - found)}, unknown {sorted(found - names)}. It was changed by hand or by another "
                "version of anomalib-exdd; synthesize again into another folder."
            )
            raise ValueError(msg)
        return cls(**content)


@dataclass(frozen=True)
class SyntheticImage:
    """A synthetic image, its mask, its record (None if another program made it), and its review.

    `decision` is the reviewer's: `accept`, `reject` or empty.
    """

    image_path: Path
    mask_path: Path
    record: Record | None
    decision: str = ""
    comment: str = ""

    @property
    def accepted(self) -> bool:
        """Whether training may use it: the review overrules the measurement."""
        if self.decision:
            return self.decision == "accept"
        return self.record is None or self.record.accepted


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
    if not root.is_dir():
        msg = f"The folder of synthetic images `{root}` does not exist. Write it with `anomalib synthesize`."
        raise FileNotFoundError(msg)
    found: list[tuple[str, str, Record | None]]
    if (root / MANIFEST_NAME).is_file():
        found = [(record.image, record.mask, record) for record in read_manifest(root)]
    elif (root / START_NAME).is_file():
        done, count = len(list((root / RECORDS).glob("[!.]*.json"))), read_json(root / START_NAME)["count"]
        fix = _how_to_resume(root)
        msg = f"The folder `{root}` is not finished: {done} of {count} images are there. To go on, {fix}."
        raise ValueError(msg)
    else:
        found = [(image, mask, None) for image, mask in _pairs_without_manifest(root)]
    review = read_review(root, [image for image, _, _ in found])
    images = [
        SyntheticImage(root / image, root / mask, record, *review.get(image, ("", ""))) for image, mask, record in found
    ]
    images = [image for image in images if with_rejected or image.accepted]
    for path in (path for image in images for path in (image.image_path, image.mask_path)):
        if not path.is_file():
            msg = f"The file `{path}` is missing. Put it back, or {_how_to_resume(root)} to make it again."
            raise FileNotFoundError(msg)
    return images


def read_manifest(root: Path) -> list[Record]:
    """Read the records of a finished folder."""
    path = root / MANIFEST_NAME
    return [Record.from_dict(each, path) for each in read_json(path).get("images", [])]


def _how_to_resume(root: Path) -> str:
    command = read_json(root / START_NAME)["command"] if (root / START_NAME).is_file() else ""
    return f"run `{command}` again" if command else "run `anomalib synthesize` with the same settings again"


def _pairs_without_manifest(root: Path) -> list[tuple[str, str]]:
    names = sorted(path.name for path in (root / ACCEPTED).glob("*.png"))
    pairs = {name: f"{Path(name).stem}_GT.png" for name in names if not name.endswith("_GT.png")}
    if not pairs:
        msg = f"The folder `{root}` holds no synthetic images with masks. Write it with `anomalib synthesize`."
        raise FileNotFoundError(msg)
    if without := [image for image, mask in pairs.items() if mask not in names]:
        where = f"`{root / ACCEPTED / without[0]}` has no mask `{pairs[without[0]]}`"
        msg = f"The image {where} ({len(without)} of {len(pairs)} images have none). Add it."
        raise FileNotFoundError(msg)
    return [(f"{ACCEPTED}/{image}", f"{ACCEPTED}/{mask}") for image, mask in pairs.items()]


def manifest_json(start: dict[str, Any], records: Sequence[Record]) -> str:
    """Return the manifest as JSON: the settings of the run (from `synthesis.json`), counts, and every record."""
    accepted = sum(record.accepted for record in records)
    content = {
        "format": FORMAT,
        "settings": start["settings"],
        "versions": start["versions"],
        "counts": {"images": len(records), "accepted": accepted, "rejected": len(records) - accepted},
        "images": [asdict(record) for record in records],
    }
    return to_json(content)


def manifest_csv(records: Sequence[Record]) -> str:
    """Return the records as a table: a column for every entry, `details` as JSON and a column for every measurement."""
    measurements = sorted({name for record in records for name in record.change})
    columns = [field.name for field in fields(Record) if field.name not in {"change", "details"}]
    rows = [
        [
            *(getattr(record, column) for column in columns),
            *map(record.change.get, measurements),
            json.dumps(record.details, ensure_ascii=False),
        ]
        for record in records
    ]
    return _to_csv([[*columns, *measurements, "details"], *rows])


def empty_review(images: Iterable[str]) -> str:
    """Return a review to fill in, given the files of the images, relative to their folder."""
    return _to_csv([REVIEW_COLUMNS, *((image, "", "") for image in images)])


def read_review(root: Path, images: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Read the review of a folder: decision (`accept`, `reject` or empty) and comment of each image that has a row.

    Spreadsheets may have changed separators, encoding or the order of columns and rows. An image is known by its file
    name, with or without its folder.

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
            f"The file `{path}` has to start with the line `{','.join(REVIEW_COLUMNS)}`, but its first line is "
            f"`{header.strip()}`. Restore the line, or remove the file and run `anomalib synthesize` again."
        )
        raise ValueError(msg)
    review: dict[str, tuple[str, str]] = {}
    for row in table:
        name = (row["image"] or "").strip().replace("\\", "/").rpartition("/")[2]
        decision, comment = (row["decision"] or "").strip().lower(), (row.get("comment") or "").strip()
        if not name and not decision:
            continue  # an empty line at the end
        where = f"Line {table.line_num} of `{path}`"
        if decision not in {"", *DECISIONS}:
            msg = f"{where} has the decision `{row['decision']}`. Write {' or '.join(DECISIONS)}, or leave it empty."
            raise ValueError(msg)
        if name not in known:
            msg = f"{where} names the image `{row['image']}`, which is not in `{root}`. Remove the line."
            raise ValueError(msg)
        if review.get(known[name], (decision, ""))[0] != decision:
            msg = f"{where} decides otherwise about `{row['image']}` than a line above it. Remove one of the two."
            raise ValueError(msg)
        review[known[name]] = (decision, comment)
    return review


def to_json(content: Any) -> str:
    """Return a value as readable JSON that ends with a line feed."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read `synthesis.json` or the manifest; a ValueError says that it is damaged or of another version's format."""
    content = load_json(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        msg = f"The file `{path}` has format {found}, but this version reads {FORMAT}. Synthesize into another folder."
        raise ValueError(msg)
    return dict(content)


def load_json(path: Path) -> Any:
    """Read any JSON file; a ValueError says that it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding or of the syntax
        msg = f"The file `{path}` is damaged ({error}). Restore it, or synthesize again into another folder."
        raise ValueError(msg) from error


def _to_csv(rows: Iterable[Iterable[Any]]) -> str:
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()
