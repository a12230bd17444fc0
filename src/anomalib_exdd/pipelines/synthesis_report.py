"""What a person gets to see of a folder of synthetic images."""

from collections.abc import Sequence
from pathlib import Path

from anomalib_exdd.reporting.contact_sheet import MAX_IMAGES, Entry, contact_sheet
from anomalib_exdd.reporting.synthesis_page import PageImage, synthesis_page
from anomalib_exdd.synthesis.manifest import Record, SyntheticImage, read_synthetic
from anomalib_exdd.synthesis.run_folder import PAGE_NAME, PREVIEWS, SHEET_NAME
from anomalib_exdd.utils.files import write_file

_SHOWN_REASONS = 5


def write_reports(output: Path, images: Sequence[SyntheticImage]) -> None:
    """Write the contact sheet and the page for the review.

    Args:
        output: Folder of the images.
        images: All of them, from :func:`.read_synthetic`.
    """
    entries: list[Entry] = []
    cards: list[PageImage] = []
    for image in images:
        record = image.record
        if record is None:
            continue
        small = f"{PREVIEWS}/{record.index:05d}.jpg"
        if len(entries) < MAX_IMAGES:
            entries.append(Entry((output / small).read_bytes(), _caption(record), record.accepted))
        cards.append(
            PageImage(
                image=record.image,
                mask=record.mask,
                preview=small,
                facts=_facts(record),
                accepted=record.accepted,
                reason=record.reason,
                decision=image.decision.decision,
                comment=image.decision.comment,
            )
        )
    write_file(output / SHEET_NAME, contact_sheet(entries))
    write_file(output / PAGE_NAME, synthesis_page(f"Synthetic defects: {output.resolve().name}", cards))


def answer(output: Path, train_command: str) -> str:
    """Say what came out, and what to do with it.

    Args:
        output: Folder of the images, finished.
        train_command: Command that trains with them, but for their number.
    """
    images = read_synthetic(output, with_rejected=True)
    records = [image.record for image in images if image.record is not None]
    rejected = [record for record in records if not record.accepted]
    usable = sum(image.accepted for image in images)
    lines = [f"{len(records)} images: {len(records) - len(rejected)} accepted, {len(rejected)} rejected."]
    lines += [f"  {record.image}: {record.reason}" for record in rejected[:_SHOWN_REASONS]]
    if len(rejected) > _SHOWN_REASONS:
        lines.append(f"  ... and {len(rejected) - _SHOWN_REASONS} more, see manifest.csv")
    if decided := sum(bool(image.decision.decision) for image in images):
        lines.append(f"Reviewed: {decided}; training uses {usable}.")
    lines += [
        f"Folder: {output.resolve()}",
        f"Contact sheet: {(output / SHEET_NAME).resolve()}",
        f"Review: open {(output / PAGE_NAME).resolve()} in a browser, or fill in review.csv",
    ]
    if usable:
        lines.append(f"Train with it: {train_command} --data.count {usable}")
    else:
        lines.append(
            "No image can be used: look at the sheet, then try other prompts or masks, or a lower --min_change."
        )
    return "\n".join(lines)


def _caption(record: Record) -> list[str]:
    status = "accepted" if record.accepted else "rejected"
    visible = record.change.get("visible")
    return [
        f"{record.index:05d} {status}" + ("" if visible is None else f", change {visible:.0f}"),
        record.prompt or (f"Defect of {Path(record.defect).name}" if record.defect else record.synthesizer),
    ]


def _facts(record: Record) -> list[tuple[str, str]]:
    measured = ", ".join(f"{name} {value:.3g}" for name, value in record.change.items() if value is not None)
    return [
        ("From", Path(record.source).name),
        ("Defect", Path(record.defect).name if record.defect else ""),
        ("Place", record.placement),
        ("Prompt", record.prompt),
        ("Made by", " ".join(filter(None, (record.synthesizer, record.model, record.revision)))),
        ("Seed", f"{record.seed}, attempts {record.attempts}"),
        ("Change", measured),
        ("Details", ", ".join(f"{name} {value}" for name, value in record.details.items())),
    ]
