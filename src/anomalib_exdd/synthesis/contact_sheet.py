"""Small pictures of synthetic images, single and on a contact sheet.

Images are `[H, W, 3]`, RGB, uint8; masks are `[H, W]`, bool.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .base import Mask, Pixels

PANELS = ("original", "mask", "result", "difference x 4")
GAIN = 4  # differences of a few grey levels have to be seen
LONGEST_SIDE = 240  # of a panel, in pixels
MAX_IMAGES = 24
GAP, LINE, FONT_SIZE = 4, 16, 12
PAPER, INK, REJECTED_INK = (255, 255, 255), (20, 20, 20), (176, 0, 32)


class Entry(NamedTuple):
    """A picture on a contact sheet, with lines below, which are red unless the image is accepted."""

    preview: bytes
    lines: Sequence[str]
    accepted: bool


def preview(original: Pixels, mask: Mask, result: Pixels) -> bytes:
    """Draw original, mask, result and difference beside each other, at most 240 pixels on a side, as a JPEG.

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
        strip.paste(panel.convert("RGB"), (position * (width + GAP), 0))
    buffer = BytesIO()
    strip.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def contact_sheet(entries: Sequence[Entry], columns: int = 4) -> bytes:
    """Draw the first 24 entries on one sheet, with their captions, as a PNG.

    Raises:
        ValueError: If there are no entries.
    """
    if not entries:
        msg = "A contact sheet needs at least one image, but got none."
        raise ValueError(msg)
    entries = entries[:MAX_IMAGES]
    strips = [Image.open(BytesIO(entry.preview)).convert("RGB") for entry in entries]
    columns = min(columns, len(strips))
    lines = max(len(entry.lines) for entry in entries)
    cell_width = max(strip.width for strip in strips) + 2 * GAP
    cell_height = max(strip.height for strip in strips) + lines * LINE + 2 * GAP
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height + LINE + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    draw.text((GAP, GAP), "  |  ".join(PANELS), fill=INK, font=font)
    for position, (strip, entry) in enumerate(zip(strips, entries, strict=True)):
        left = position % columns * cell_width + GAP
        top = position // columns * cell_height + LINE + 2 * GAP
        sheet.paste(strip, (left, top))
        for number, line in enumerate(entry.lines):
            place = (left, top + strip.height + number * LINE)
            text = _cut(line, cell_width - 2 * GAP, font)
            draw.text(place, text, fill=INK if entry.accepted else REJECTED_INK, font=font)
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _shrink(pixels: Pixels) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = min(1.0, LONGEST_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    text = " ".join(line.split())
    while text and font.getlength(text) > width:
        text = f"{text.removesuffix('...')[:-1]}..." if len(text) > len("...") else ""
    return text
