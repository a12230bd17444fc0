"""Pictures of explanations: image and heat map, and the highest patches beside their nearest training patches."""

import json
import logging
from pathlib import Path
from typing import Any

from anomalib.visualization import visualize_anomaly_map
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import Resize
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_exdd.images.reading import WHITE_LEVEL, read_image
from anomalib_exdd.models.transforms import seen_part
from anomalib_exdd.models.visualization import LABEL_SIZE, SeenImageVisualizer, add_caption, image_names, panel_size

from .explanation import Explanation, explain_image

logger = logging.getLogger(__name__)

_TILE, _TILE_TEXT, _GAP, _LABEL_LENGTH = 160, 20, 8, 26  # pixels, pixels, pixels, letters
_WINDOW = 0.2  # side of what a tile shows, as a share of the image's longer side
_MARK_SHARE = 0.1  # half the side of the mark around a patch, as a share of what a tile shows
_GROUND, _BLANK, _INK, _MARK = (255, 255, 255), (225, 225, 225), (40, 40, 40), (255, 40, 40)


class DecisionVisualizer(SeenImageVisualizer):
    """Pictures with the decision as a caption, and explanations if the model's argument ``explain`` asks for them."""

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Save the pictures and the explanations of a batch."""
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        count = pl_module.hparams["explain"]
        if count:
            for image, name in zip(batch.image, image_names(batch, trainer, batch_idx, dataloader_idx), strict=True):
                explanation = explain_image(pl_module.model, image, name, count, pl_module.decisions)
                save_explanation(explanation, self._explanations_dir, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Log where the explanations are."""
        explained = stage == TrainerFn.PREDICTING and pl_module.hparams["explain"] and trainer.is_global_zero
        if explained and self.output_dir is not None and self._explanations_dir.is_dir():
            logger.info("Explanations: %s", self._explanations_dir.resolve())

    @property
    def _explanations_dir(self) -> Path:
        return Path(str(self.output_dir)).parent / "explanations"


def save_explanation(explanation: Explanation, folder: Path, model: Any = None) -> Path:
    """Write an explanation as a picture and as JSON, named like its image; return the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(explanation.source).stem
    (folder / f"{name}.json").write_text(json.dumps(explanation.to_dict(), indent=2) + "\n", encoding="utf-8")
    picture = folder / f"{name}.png"
    draw_explanation(explanation, model).save(picture)
    return picture


def draw_explanation(explanation: Explanation, model: Any = None) -> Image.Image:
    """Draw an explanation: image and heat map, and for every patch the nearest normal one and the nearest defect.

    Training patches are cut out of the images of the data folder; where those are gone, a blank says so. The model's
    pre-processor tells which part of an image it sees; by default it sees the whole.
    """
    marked, overlay = image_and_heat_map(explanation, model)
    body = max(marked.height, len(explanation.patches) * (_TILE + _TILE_TEXT))
    canvas = Image.new("RGB", (2 * marked.width + 3 * (_TILE + _GAP) + _GAP, body + _TILE_TEXT), _GROUND)
    write, font = ImageDraw.Draw(canvas), ImageFont.load_default(LABEL_SIZE)
    lefts = [2 * marked.width + _GAP + index * (_TILE + _GAP) for index in range(3)]
    titles = ("image", "heat map", "patch", "closest normal", "closest defect")
    for left, title in zip((4, marked.width + 4, *lefts), titles, strict=True):
        write.text((left, 3), title, _INK, font)
    for number, tiles in enumerate(patch_tiles(explanation, model)):
        top = _TILE_TEXT + number * (_TILE + _TILE_TEXT)
        for left, (tile, label) in zip(lefts, tiles, strict=False):  # there may be no defect
            canvas.paste(tile, (left, top))
            write.text((left, top + _TILE + 2), label[-_LABEL_LENGTH:], _INK, font)
    canvas.paste(marked, (0, _TILE_TEXT))
    canvas.paste(overlay, (marked.width, _TILE_TEXT))
    return add_caption(canvas, explanation.decision) if explanation.decision else canvas


def image_and_heat_map(explanation: Explanation, model: Any = None) -> tuple[Image.Image, Image.Image]:
    """Draw the image with the explained patches marked, and with its heat map; arguments as before."""
    height, width = explanation.image_size
    panel = panel_size((height, width))
    image = _open_seen(explanation, model, explanation.source, panel)
    heat = visualize_anomaly_map(explanation.heat_map, colormap=True, normalize=False).resize(panel).convert("RGB")
    overlay = Image.blend(image, heat, 0.45) if image else heat
    marked = image or Image.new("RGB", panel, _BLANK)
    pen, scale = ImageDraw.Draw(marked), panel[0] / width
    font, half = ImageFont.load_default(LABEL_SIZE), _WINDOW * max(height, width) * scale * _MARK_SHARE
    for number, patch in enumerate(explanation.patches):
        x, y = patch.column * scale, patch.row * scale
        pen.rectangle((x - half, y - half, x + half, y + half), outline=_MARK, width=2)
        pen.text((x + half + 4, y - half - 2), str(number + 1), _MARK, font)
    return marked, overlay


def patch_tiles(explanation: Explanation, model: Any = None) -> list[list[tuple[Image.Image, str]]]:
    """Cut out every explained patch, the closest normal one and, if there is one, the closest defect, with labels."""
    height, width = explanation.image_size
    window = _WINDOW * max(height, width)
    found = []
    for number, patch in enumerate(explanation.patches):
        places = [(explanation.source, patch.row, patch.column, f"{number + 1}: score {patch.score:.3g}")]
        places += [
            (near.source, near.row, near.column, f"{Path(near.source).name}  d={near.distance:.3g}")
            for near in (patch.normal, patch.defect)
            if near
        ]
        tiles = []
        for source, row, column, label in places:
            whole = _open_seen(explanation, model, source, (width * 2, height * 2))  # twice as fine: it is enlarged
            tiles.append((_cut(whole, row, column, window), label))
        found.append(tiles)
    return found


def _open_seen(explanation: Explanation, model: Any, source: str, size: tuple[int, int]) -> Image.Image | None:
    """Open the part of an image that a model sees, in a given size (width, height); None where that cannot be done."""
    transform = getattr(getattr(model, "pre_processor", None), "transform", None) or Resize(explanation.image_size)
    try:
        image: Image.Image = to_pil_image(read_image(source, getattr(model, "white_level", WHITE_LEVEL)))
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
