"""The reports on a folder of synthetic images: previews, a contact sheet, and a page to accept or reject images on.

The page is one file without anything from the network. It shows the pictures beside it and works from a disk, by mouse
or keyboard, in light or dark. A browser cannot write into the folder: the page offers the review as a download.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anomalib_exdd.utils.templates import template_environment

from .base import Mask, Pixels
from .manifest import Record, SyntheticImage

PANELS = ("original", "mask", "result", "difference x 4")
GAIN = 4  # differences of a few grey levels have to be seen
LONGEST_SIDE = 240  # of a panel, in pixels
MAX_IMAGES = 24
GAP, LINE, FONT_SIZE = 4, 16, 12
PAPER, INK, REJECTED_INK = (255, 255, 255), (20, 20, 20), (176, 0, 32)


def preview(original: Pixels, mask: Mask, result: Pixels) -> Image.Image:
    """Draw original, mask, result and difference beside each other, at most 240 pixels on a side.

    The difference is that of the channel that changed most, multiplied by four.
    """
    change = np.abs(result.astype(np.int16) - original).max(axis=2)
    difference = np.minimum(change * GAIN, 255).astype(np.uint8)
    # A line that is thinner than a pixel of the small picture stays visible, because any share of it is white.
    small_mask = _shrink(np.where(mask, 255, 0).astype(np.uint8)).point([0, *[255] * 255])
    panels = [_shrink(original), small_mask, _shrink(result), _shrink(difference)]
    width, height = panels[0].size
    strip = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), PAPER)
    for position, panel in enumerate(panels):
        strip.paste(panel, (position * (width + GAP), 0))
    return strip


def contact_sheet(root: Path, records: Sequence[Record], columns: int = 4) -> Image.Image:
    """Draw the previews of the first 24 images of a folder on one sheet, with captions."""
    records = records[:MAX_IMAGES]
    strips = [Image.open(root / record.preview).convert("RGB") for record in records]
    columns = min(columns, len(strips))
    width = max(strip.width for strip in strips) + 2 * GAP
    height = max(strip.height for strip in strips) + 2 * LINE + 2 * GAP
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height + LINE + GAP), PAPER)
    font = ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(sheet).text((GAP, GAP), "  |  ".join(PANELS), fill=INK, font=font)
    for position, (strip, record) in enumerate(zip(strips, records, strict=True)):
        cell = Image.new("RGB", (width - GAP, height), PAPER)  # cuts long captions off
        cell.paste(strip, (0, 0))
        for number, line in enumerate(_caption(record)):
            place, ink = (0, strip.height + number * LINE), INK if record.accepted else REJECTED_INK
            ImageDraw.Draw(cell).text(place, " ".join(line.split()), fill=ink, font=font)
        sheet.paste(cell, (position % columns * width + GAP, position // columns * height + LINE + 2 * GAP))
    return sheet


def review_page(title: str, images: Sequence[SyntheticImage]) -> str:
    """Return the page as HTML."""
    template = template_environment("anomalib_exdd.synthesis").get_template("review_page.html")
    return template.render(title=title, images=images, facts=_facts)


def _caption(record: Record) -> list[str]:
    status = "accepted" if record.accepted else "rejected"
    what = record.prompt or (f"Defect of {Path(record.defect).name}" if record.defect else record.synthesizer)
    visible = record.change.get("visible")
    return [f"{record.index:05d} {status}" + ("" if visible is None else f", change {visible:.0f}"), what]


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


def _shrink(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BOX, reducing_gap=None)
    return image
