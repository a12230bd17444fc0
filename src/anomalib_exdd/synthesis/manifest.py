"""Where every synthetic image comes from, and which of them training may use.

A folder of synthetic images::

    root/
    ├── train/00000.png, 00000_GT.png      # accepted images and their masks, 0 and 255, as in KSDD2
    ├── rejected/00001.png, 00001_GT.png   # images in which nothing visible came out
    ├── previews/00000.jpg                 # original, mask, result, difference
    ├── records/00000.json                 # one file per finished image
    ├── synthesis.json                     # settings, written first
    ├── manifest.json, manifest.csv        # everything about all images, written last
    └── review.csv                         # to be filled in: accept or reject
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .review import Decision, read_review

FORMAT = 1  # of the files here; to be counted up when an old reader would misunderstand them
MANIFEST_NAME, TABLE_NAME, START_NAME = "manifest.json", "manifest.csv", "synthesis.json"


@dataclass(frozen=True)
class Record:
    """How one image was made.

    Attributes:
        index: Number of the image among all that are wanted.
        image: File of the image, relative to the folder, with forward slashes.
        mask: File of its mask, likewise.
        source: Normal image that it was made from.
        defect: Real defective image that took part in it, None if there was none.
        placement: Where the mask comes from, in words.
        prompt: The defect in words; empty if no words took part.
        seed: Seed of everything random in the synthesizer.
        attempts: How often it was made until something visible came out, or until patience ended.
        synthesizer: Name of the synthesizer's class.
        model: Model that drew it and its revision; None if there was none, or none is known.
        revision: See `model`.
        details: What the synthesizer says besides, and the `kind` of the real defect, where it is known.
        change: What changed against the normal image: `visible` in grey levels and further measurements. None where
            a number is not finite.
        accepted: Whether the measurement accepts it.
        reason: Why it does not; empty if it does.
    """

    index: int
    image: str
    mask: str
    source: str
    defect: str | None
    placement: str
    prompt: str
    seed: int
    attempts: int
    synthesizer: str
    model: str | None
    revision: str | None
    details: dict[str, Any]
    change: dict[str, float | None]
    accepted: bool
    reason: str

    def to_json(self) -> str:
        """Return the record as JSON that ends with a line feed."""
        return to_json(asdict(self))

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> "Record":
        """Build a record from what JSON holds.

        Args:
            content: Value that was read.
            path: File it was read from, for the message.

        Raises:
            ValueError: If an entry is missing or unknown.
        """
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
    """An image for training.

    Attributes:
        image_path: The image.
        mask_path: Its mask.
        record: How it was made; None in a folder that was made elsewhere.
        decision: What the review says about it.
    """

    image_path: Path
    mask_path: Path
    record: Record | None
    decision: Decision

    @property
    def accepted(self) -> bool:
        """Whether training may use it: a reviewer's word goes before the measurement."""
        if self.decision.decision:
            return self.decision.decision == "accept"
        return self.record is None or self.record.accepted


def read_synthetic(root: str | Path, *, with_rejected: bool = False) -> list[SyntheticImage]:
    """List the synthetic images of a folder, those that training may use or all of them.

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
        found = [(each.image, each.mask, each) for each in read_manifest(root)]
    elif (root / START_NAME).is_file():
        raise ValueError(_unfinished(root))
    else:
        found = _made_elsewhere(root)
    review = read_review(root, [image for image, _, _ in found])
    images = [
        SyntheticImage(root / image, root / mask, record, review.get(image, Decision()))
        for image, mask, record in found
    ]
    images = [image for image in images if with_rejected or image.accepted]
    for path in (path for image in images for path in (image.image_path, image.mask_path)):
        if not path.is_file():
            msg = f"The file `{path}` is missing. Put it back, or {_how_to_finish(root)} to make it again."
            raise FileNotFoundError(msg)
    return images


def read_manifest(root: Path) -> list[Record]:
    """Read the records of a finished folder.

    Raises:
        ValueError: If the manifest cannot be understood.
    """
    path = root / MANIFEST_NAME
    content = read_json(path)
    check_format(content, path)
    return [Record.from_dict(each, path) for each in content.get("images", [])]


def manifest_json(start: dict[str, Any], records: Sequence[Record]) -> str:
    """Return the manifest as JSON: the settings of the run, the versions, how many images, and every record.

    Args:
        start: What is in `synthesis.json`.
        records: Records of all images.
    """
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
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*columns, *measurements, "details"])
    for record in records:
        content = asdict(record)
        row = [content[column] for column in columns]
        row += [record.change.get(name) for name in measurements]
        writer.writerow([*row, json.dumps(record.details, ensure_ascii=False)])
    return table.getvalue()


def to_json(content: Any) -> str:
    """Return a value as readable JSON that ends with a line feed."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_plain(value: Any) -> Any:
    """Return a nested value as JSON gives it back: tuples become lists, numbers that are not finite become None."""
    return json.loads(json.dumps(value, default=_as_builtin), parse_constant=lambda _: None)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding or of the syntax
        msg = f"The file `{path}` is damaged ({error}). Restore it, or synthesize again into another folder."
        raise ValueError(msg) from error


def check_format(content: Any, path: Path) -> None:
    """Refuse a file of another version's format.

    Raises:
        ValueError: If the format is another one.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        msg = (
            f"The file `{path}` has format {found}, but this version reads format {FORMAT}. Use the version of "
            "anomalib-exdd that wrote it, or synthesize again into another folder."
        )
        raise ValueError(msg)


def _as_builtin(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def _made_elsewhere(root: Path) -> list[tuple[str, str, Record | None]]:
    """List images and masks of a folder without a manifest.

    Raises:
        FileNotFoundError: If there is no image, or one has no mask.
    """
    names = sorted(path.name for path in (root / "train").glob("*.png"))
    masks = {name for name in names if name.endswith("_GT.png")}
    images = [name for name in names if name not in masks]
    if not images:
        msg = (
            f"The folder `{root}` holds no synthetic images: neither a `{MANIFEST_NAME}` nor images `train/NAME.png` "
            "with masks `train/NAME_GT.png`. Write it with `anomalib synthesize`."
        )
        raise FileNotFoundError(msg)
    if without := [name for name in images if f"{Path(name).stem}_GT.png" not in masks]:
        msg = (
            f"The image `{root / 'train' / without[0]}` has no mask `{Path(without[0]).stem}_GT.png` ({len(without)} "
            f"of {len(images)} images have none). Every synthetic image needs one."
        )
        raise FileNotFoundError(msg)
    return [(f"train/{name}", f"train/{Path(name).stem}_GT.png", None) for name in images]


def _unfinished(root: Path) -> str:
    start = read_json(root / START_NAME)
    count = start.get("count", "all") if isinstance(start, dict) else "all"
    done = len(list((root / "records").glob("[!.]*.json")))
    return (
        f"The folder `{root}` is not finished: {done} of {count} images are there. To finish it, {_how_to_finish(root)}"
        ": it goes on where it was interrupted."
    )


def _how_to_finish(root: Path) -> str:
    start = read_json(root / START_NAME) if (root / START_NAME).is_file() else {}
    command = start.get("command") if isinstance(start, dict) else None
    return f"run `{command}` again" if command else "run `anomalib synthesize` with the same settings again"
