"""Small pictures of synthetic images, one by one and many on a sheet, to see at a glance what came out.

Images are `[H, W, 3]`, RGB, uint8; masks are `[H, W]`, bool.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PANELS = ("original", "mask", "result", "difference x 4")
GAIN = 4  # differences of a few grey levels have to be seen
LONGEST_SIDE = 240  # of a panel, in pixels
MAX_IMAGES = 24
_GAP, _LINE, _FONT_SIZE = 4, 16, 12
_PAPER, _INK, _REJECTED_INK = (255, 255, 255), (20, 20, 20), (176, 0, 32)


class Entry(NamedTuple):
    """A place on a contact sheet.

    Attributes:
        preview: What :func:`preview` returned.
        lines: Lines to write below; those that are too long are cut.
        accepted: Lines of images that are not accepted are red.
    """

    preview: bytes
    lines: Sequence[str]
    accepted: bool


def preview(original: NDArray[np.uint8], mask: NDArray[np.bool_], result: NDArray[np.uint8]) -> bytes:
    """Draw original, mask, result and their difference beside each other.

    The difference is that of the channel that changed most, multiplied by four.

    Args:
        original: The normal image.
        mask: The defect's mask.
        result: The image with a defect.

    Returns:
        JPEG, its panels at most 240 pixels on a side.
    """
    change = np.abs(result.astype(np.int16) - original).max(axis=2)
    difference = np.minimum(change * GAIN, 255).astype(np.uint8)
    # A line that is thinner than a pixel of the small picture stays visible, because any share of it is white.
    small_mask = _shrink(np.where(mask, 255, 0).astype(np.uint8)).point([0, *[255] * 255])
    panels = [_shrink(original), small_mask, _shrink(result), _shrink(difference)]
    width, height = panels[0].size
    strip = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height), _PAPER)
    for position, panel in enumerate(panels):
        strip.paste(panel.convert("RGB"), (position * (width + _GAP), 0))
    buffer = BytesIO()
    strip.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def contact_sheet(entries: Sequence[Entry], columns: int = 4) -> bytes:
    """Draw many previews on one sheet, with their captions.

    Args:
        entries: What to show; the first 24 of them.
        columns: How many previews stand beside each other.

    Returns:
        PNG.

    Raises:
        ValueError: If there is nothing to show.
    """
    if not entries:
        msg = "A contact sheet needs at least one image, but got none."
        raise ValueError(msg)
    entries = entries[:MAX_IMAGES]
    strips = [Image.open(BytesIO(entry.preview)).convert("RGB") for entry in entries]
    columns = min(columns, len(strips))
    lines = max(len(entry.lines) for entry in entries)
    cell_width = max(strip.width for strip in strips) + 2 * _GAP
    cell_height = max(strip.height for strip in strips) + lines * _LINE + 2 * _GAP
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height + _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    draw.text((_GAP, _GAP), "  |  ".join(PANELS), fill=_INK, font=font)
    for position, (strip, entry) in enumerate(zip(strips, entries, strict=True)):
        left = position % columns * cell_width + _GAP
        top = position // columns * cell_height + _LINE + 2 * _GAP
        sheet.paste(strip, (left, top))
        for number, line in enumerate(entry.lines):
            place = (left, top + strip.height + number * _LINE)
            text = _cut(line, cell_width - 2 * _GAP, font)
            draw.text(place, text, fill=_INK if entry.accepted else _REJECTED_INK, font=font)
    buffer = BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _shrink(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = min(1.0, LONGEST_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a line until it fits."""
    text = " ".join(line.split())
    while text and font.getlength(text) > width:
        text = f"{text.removesuffix('...')[:-1]}..." if len(text) > len("...") else ""
    return text
