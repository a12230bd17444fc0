"""The reports on a folder of synthetic images: a contact sheet, and a page to accept or reject images on.

The page is one file without anything from the network. It shows the pictures beside it and works from a disk, by mouse
or keyboard, in light or dark. A browser cannot write into the folder: the page offers the review as a download.
"""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .contact_sheet import MAX_IMAGES, Entry, contact_sheet
from .manifest import PREVIEWS, Record, SyntheticImage
from .output_folder import PAGE_NAME, SHEET_NAME, write_file


def write_reports(root: Path, images: Sequence[SyntheticImage]) -> None:
    """Write the contact sheet and the page for the review of all images of a folder."""
    records = [image.record for image in images if image.record is not None][:MAX_IMAGES]
    entries = [Entry((root / _preview(record)).read_bytes(), _caption(record), record.accepted) for record in records]
    write_file(root / SHEET_NAME, contact_sheet(entries))
    write_file(root / PAGE_NAME, review_page(f"Synthetic defects: {root.resolve().name}", images))


def review_page(title: str, images: Sequence[SyntheticImage]) -> str:
    """Return the page as HTML; images without a record are left out."""
    cards = [
        {"image": image, "record": image.record, "preview": _preview(image.record), "facts": _facts(image.record)}
        for image in images
        if image.record is not None
    ]
    environment = Environment(
        loader=PackageLoader("anomalib_exdd.synthesis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    accepted = sum(image.record.accepted for image in images if image.record is not None)
    return environment.get_template("review_page.html").render(title=title, cards=cards, accepted=accepted)


def _preview(record: Record) -> str:
    return f"{PREVIEWS}/{record.index:05d}.jpg"


def _caption(record: Record) -> list[str]:
    status = "accepted" if record.accepted else "rejected"
    visible = record.change.get("visible")
    return [
        f"{record.index:05d} {status}" + ("" if visible is None else f", change {visible:.0f}"),
        record.prompt or (f"Defect of {Path(record.defect).name}" if record.defect else record.synthesizer),
    ]


def _facts(record: Record) -> dict[str, str]:
    measured = ", ".join(f"{name} {value:.3g}" for name, value in record.change.items() if value is not None)
    return {
        "From": Path(record.source).name,
        "Defect": Path(record.defect).name if record.defect else "",
        "Place": record.placement,
        "Prompt": record.prompt,
        "Made by": " ".join(filter(None, (record.synthesizer, record.model, record.revision))),
        "Seed": f"{record.seed}, attempts {record.attempts}",
        "Change": measured,
        "Details": ", ".join(f"{name} {value}" for name, value in record.details.items()),
    }
