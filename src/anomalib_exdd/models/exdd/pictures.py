"""How predictions look as pictures."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from anomalib.visualization import visualize_anomaly_map
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import Resize, Transform
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_exdd.images.reading import WHITE_LEVEL, read_image
from anomalib_exdd.models.transforms import seen_part
from anomalib_exdd.models.visualization import LABEL_SIZE, SeenImageVisualizer, image_names, panel_size

from .explanation import Explanation, explain_image

_CAPTION_SIZE, _CAPTION_PADDING = 14, 5
_CAPTION_COLOURS = {"accept": (27, 110, 60), "review": (150, 95, 0), "reject": (165, 30, 35)}

_TILE, _TILE_TEXT, _GAP, _LABEL_LENGTH = 160, 20, 8, 26  # of an explanation: pixels, pixels, pixels, letters
_WINDOW = 0.2  # side of what a tile shows, as a share of the image's longer side
_MARK_SHARE = 0.1  # half the side of the mark around a patch, as a share of what a tile shows
_GROUND, _BLANK, _INK, _MARK = (255, 255, 255), (225, 225, 225), (40, 40, 40), (255, 40, 40)


class DecisionVisualizer(SeenImageVisualizer):
    """Pictures with a line below that states the decision and its reason, where there is one."""

    def visualize(self, predictions: Any) -> Any:
        """Draw a prediction, or the predictions of a batch; see :class:`anomalib.visualization.ImageVisualizer`."""
        drawn = super().visualize(predictions)
        explanation = getattr(predictions, "explanation", None)
        if explanation is None or drawn is None:
            return drawn
        if isinstance(drawn, list):
            return [image and add_caption(image, line) for image, line in zip(drawn, explanation, strict=True)]
        return add_caption(drawn, explanation if isinstance(explanation, str) else explanation[0])

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the pictures of a batch, and explanations if the model's argument ``explain`` asks for them."""
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        count = pl_module.settings.explain
        if count:
            for image, name in zip(batch.image, image_names(batch, trainer, batch_idx, dataloader_idx), strict=True):
                explanation = explain_image(pl_module.model, image, name, count, pl_module.decisions)
                save_explanation(explanation, explanations_folder(str(self.output_dir)), pl_module)


def explanations_folder(pictures: str | Path) -> Path:
    """Return where explanations go: beside the folder of the pictures."""
    return Path(pictures).parent / "explanations"


def save_explanation(explanation: Explanation, folder: Path, model: Any = None) -> Path:
    """Write an explanation as a picture and as JSON, named like its image.

    Args:
        explanation: The explanation.
        folder: Where both go.
        model: See :func:`draw_explanation`.

    Returns:
        The picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(explanation.source).stem
    (folder / f"{name}.json").write_text(json.dumps(explanation.to_dict(), indent=2) + "\n", encoding="utf-8")
    picture = folder / f"{name}.png"
    draw_explanation(explanation, model).save(picture)
    return picture


def add_caption(picture: Image.Image, line: str) -> Image.Image:
    """Put a line of text below a picture, on a ground whose colour tells the decision that the line starts with."""
    font = ImageFont.load_default(_CAPTION_SIZE)
    too_long = font.getlength(line) / (picture.width - 2 * _CAPTION_PADDING)
    if too_long > 1:
        font = ImageFont.load_default(_CAPTION_SIZE / too_long)
    height = _CAPTION_SIZE + 2 * _CAPTION_PADDING
    captioned = Image.new("RGB", (picture.width, picture.height + height), _colour(line))
    captioned.paste(picture, (0, 0))
    ImageDraw.Draw(captioned).text((_CAPTION_PADDING, picture.height + _CAPTION_PADDING - 1), line, "white", font)
    return captioned


def _colour(line: str) -> tuple[int, int, int]:
    return next((colour for word, colour in _CAPTION_COLOURS.items() if line.startswith(word)), (70, 70, 70))


def draw_explanation(explanation: Explanation, model: Any = None) -> Image.Image:
    """Draw an explanation: image and heat map, and for every patch the closest normal one and the closest defect.

    Training patches are cut out of the images of the data folder; where those are gone, a blank says so.

    Args:
        explanation: The explanation.
        model: The model, whose pre-processor tells which part of an image it sees. By default it sees the whole.
    """
    transform = getattr(getattr(model, "pre_processor", None), "transform", None) or Resize(explanation.image_size)
    open_seen = partial(_open_seen, transform=transform, white_level=getattr(model, "white_level", WHITE_LEVEL))
    height, width = explanation.image_size
    panel = panel_size((height, width))
    scale = panel[0] / width
    image = open_seen(explanation.source, panel)
    heat = visualize_anomaly_map(explanation.heat_map, colormap=True, normalize=False).resize(panel)
    overlay = Image.blend(image, heat.convert("RGB"), 0.45) if image else heat.convert("RGB")
    plain = image or Image.new("RGB", panel, _BLANK)
    window = _WINDOW * max(height, width)
    pen = ImageDraw.Draw(plain)
    columns = ("patch", "closest normal", "closest defect")
    rows = len(explanation.patches)
    body = max(panel[1], rows * (_TILE + _TILE_TEXT))
    canvas = Image.new("RGB", (2 * panel[0] + 3 * (_TILE + _GAP) + _GAP, body + _TILE_TEXT), _GROUND)
    write = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(LABEL_SIZE)
    for number, patch in enumerate(explanation.patches, start=1):
        x, y, half = patch.column * scale, patch.row * scale, window * scale * _MARK_SHARE
        pen.rectangle((x - half, y - half, x + half, y + half), outline=_MARK, width=2)
        pen.text((x + half + 4, y - half - 2), str(number), _MARK, font)
    canvas.paste(plain, (0, _TILE_TEXT))
    canvas.paste(overlay, (panel[0], _TILE_TEXT))
    for index, title in enumerate(("image", "heat map")):
        write.text((index * panel[0] + 4, 3), title, _INK, font)
    for index, title in enumerate(columns):
        write.text((2 * panel[0] + _GAP + index * (_TILE + _GAP), 3), title, _INK, font)
    for number, patch in enumerate(explanation.patches):
        top = _TILE_TEXT + number * (_TILE + _TILE_TEXT)
        tiles = (
            (explanation.source, patch.row, patch.column, f"{number + 1}: score {patch.score:.3g}"),
            *(
                (near.source, near.row, near.column, f"{Path(near.source).name}  d={near.distance:.3g}")
                if near
                else None
                for near in (patch.normal, patch.defect)
            ),
        )
        for index, tile in enumerate(tiles):
            left = 2 * panel[0] + _GAP + index * (_TILE + _GAP)
            if tile is None:
                continue
            whole = open_seen(tile[0], (width * 2, height * 2))  # twice as fine: it is enlarged
            canvas.paste(_cut(whole, tile[1], tile[2], window), (left, top))
            write.text((left, top + _TILE + 2), tile[3][-_LABEL_LENGTH:], _INK, font)
    return add_caption(canvas, explanation.decision) if explanation.decision else canvas


def _open_seen(source: str, size: tuple[int, int], transform: Transform, white_level: int) -> Image.Image | None:
    """Open the part of an image that a model sees, in a given size (width, height); None where that cannot be done."""
    try:
        image: Image.Image = to_pil_image(read_image(source, white_level))
    except ValueError:
        return None
    part = seen_part([transform], (image.height, image.width))
    if part is None:
        return None
    left, top, right, bottom = map(round, (part.left, part.top, part.left + part.width, part.top + part.height))
    return image.crop((left, top, right, bottom)).resize(size)


def _cut(image: Image.Image | None, row: int, column: int, window: float) -> Image.Image:
    """Cut the surroundings of a position out of an image that is twice as fine as the position."""
    if image is None:
        blank = Image.new("RGB", (_TILE, _TILE), _BLANK)
        ImageDraw.Draw(blank).text((8, _TILE // 2 - 8), "image not found", _INK, ImageFont.load_default(LABEL_SIZE))
        return blank
    left, top, side = round(2 * column - window), round(2 * row - window), round(2 * window)
    tile = image.crop((left, top, left + side, top + side)).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
    centre, half = _TILE / 2, _TILE * _MARK_SHARE
    ImageDraw.Draw(tile).rectangle((centre - half, centre - half, centre + half, centre + half), outline=_MARK)
    return tile
