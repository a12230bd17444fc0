"""Entries of manifests: made up, for tests that do not look at the images, and read."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from anomalib_exdd.synthesis.manifest import Record, SyntheticImage, read_synthetic


def record_of(number: int, *, accepted: bool = True, prompt: str = "", reason: str = "") -> Record:
    image = f"{'train' if accepted else 'rejected'}/{number:05d}.png"
    content: dict[str, Any] = dict.fromkeys((field.name for field in fields(Record)), "")
    content |= {"index": number, "image": image, "mask": image.replace(".png", "_GT.png"), "change": {}, "details": {}}
    return Record(**{**content, "prompt": prompt, "accepted": accepted, "reason": reason})


def synthetic_image(record: Record, decision: str = "", comment: str = "") -> SyntheticImage:
    return SyntheticImage(Path(record.image), Path(record.mask), record, decision, comment)


def read_records(root: Path) -> list[Record]:
    """Return the entries of a finished folder's manifest."""
    return [image.record for image in read_synthetic(root, with_rejected=True) if image.record]
