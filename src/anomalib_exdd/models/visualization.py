"""Pictures of tests and predictions, of the images as the model sees them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from PIL import Image, ImageDraw, ImageFont

from .transforms import without_normalization

LABEL_SIZE = 12
"""Height of the panels' labels in pixels; the longest fits into the narrowest panel."""

_MIN_SIDE, _MAX_SIDE = 200, 800  # of a panel, in pixels
_CAPTION_SIZE, _CAPTION_PADDING = 14, 5
_CAPTION_COLOURS = {"accept": (27, 110, 60), "review": (150, 95, 0), "reject": (165, 30, 35)}
_NO_DECISION_COLOUR = (70, 70, 70)


class SeenImageVisualizer(ImageVisualizer):  # type: ignore[misc]
    """Anomalib's pictures, of pre-processed images, with the batch's ``explanation`` as a caption.

    Anomalib opens the file again and stretches maps over the whole image, whichever part of it they belong to.
    """

    _default_dir: Path | None = None

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Save a picture of every image of the batch, where Anomalib saves its own."""
        if self.output_dir in {None, self._default_dir}:  # the user's stays, the trainer's is the present trainer's
            self.output_dir = self._default_dir = Path(trainer.default_root_dir) / "images"
        datamodule = getattr(trainer, "datamodule", None)
        data = (getattr(datamodule, "name", None), getattr(datamodule, "category", None))
        transform = getattr(pl_module.pre_processor, "transform", None)
        names = image_names(batch, trainer, batch_idx, dataloader_idx)
        for item, name in zip(batch, names, strict=True):
            item.update(image=without_normalization(item.image, transform), image_path=None)
            self.field_size = panel_size(item.image.shape[-2:])
            picture: Any = self.visualize(item)
            if picture is None:
                continue
            if item.explanation is not None:
                picture = add_caption(picture, item.explanation)
            path = generate_output_filename(name, self.output_dir, *data)
            # Pillow cannot write every kind of file that images may come from.
            writable = Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
            # PNGs of the lowest compression are a third larger, and written three times as fast.
            picture.save(path if writable else path.with_name(f"{path.name}.png"), compress_level=1)


def panel_size(image_size: Sequence[int]) -> tuple[int, int]:
    """Choose the width and height of a picture's panels: large enough for the labels, and no longer than a screen."""
    scale = min(max(1.0, _MIN_SIDE / min(image_size)), _MAX_SIDE / max(image_size))
    height, width = (round(length * scale) for length in image_size)
    return width, height


def image_names(batch: Any, trainer: Any, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
    """Name the images of a batch: by their paths, or by their place in the data where there are none."""
    number = batch_idx * trainer.world_size + trainer.global_rank
    loader = f"loader_{dataloader_idx}_" if dataloader_idx else ""
    paths = batch.image_path or [None] * len(batch.image)
    return [
        str(path) if path else f"{loader}batch_{number:05d}_image_{index:03d}.png" for index, path in enumerate(paths)
    ]


def add_caption(picture: Image.Image, line: str) -> Image.Image:
    """Put a line of text below a picture, on a ground in the colour of the decision that the line starts with."""
    font = ImageFont.load_default(_CAPTION_SIZE)
    overlength = font.getlength(line) / (picture.width - 2 * _CAPTION_PADDING)
    if overlength > 1:
        font = ImageFont.load_default(_CAPTION_SIZE / overlength)
    height = _CAPTION_SIZE + 2 * _CAPTION_PADDING
    colours = (colour for word, colour in _CAPTION_COLOURS.items() if line.startswith(word))
    captioned = Image.new("RGB", (picture.width, picture.height + height), next(colours, _NO_DECISION_COLOUR))
    captioned.paste(picture, (0, 0))
    ImageDraw.Draw(captioned).text((_CAPTION_PADDING, picture.height + _CAPTION_PADDING - 1), line, "white", font)
    return captioned
