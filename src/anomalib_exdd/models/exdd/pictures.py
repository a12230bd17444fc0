"""How predictions look as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from PIL import Image, ImageDraw, ImageFont

LABEL_SIZE = 12
"""Height of the panels' labels in pixels; the longest fits into the narrowest panel."""

_LEAST_SIDE, _GREATEST_SIDE = 200, 800  # of a panel, in pixels
_CAPTION_SIZE, _CAPTION_PADDING = 14, 5
_CAPTION_COLOURS = {"accept": (27, 110, 60), "review": (150, 95, 0), "reject": (165, 30, 35)}


def panel_size(image_size: Sequence[int]) -> tuple[int, int]:
    """Choose the size of a picture's panels: the images' own shape instead of Anomalib's square.

    Args:
        image_size: Height and width that images are resized to.

    Returns:
        Width and height in pixels: large enough for the labels, as long as that makes no panel longer than a screen.
    """
    scale = max(1.0, _LEAST_SIDE / min(image_size))
    scale = min(scale, _GREATEST_SIDE / max(image_size))
    height, width = (round(length * scale) for length in image_size)
    return width, height


class DecisionVisualizer(ImageVisualizer):  # type: ignore[misc]
    """Anomalib's pictures with a line below that states the decision, where there is one."""

    def visualize(self, predictions: Any) -> Any:
        """Draw a prediction, or the predictions of a batch; see :class:`anomalib.visualization.ImageVisualizer`."""
        drawn = super().visualize(predictions)
        explanation = getattr(predictions, "explanation", None)
        if explanation is None or drawn is None:
            return drawn
        if isinstance(drawn, list):
            return [image and add_caption(image, line) for image, line in zip(drawn, explanation, strict=True)]
        return add_caption(drawn, explanation if isinstance(explanation, str) else explanation[0])

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kw: Any) -> None:
        """Save a picture of every image of the batch, where Anomalib saves its own."""
        del pl_module, outputs, args, kw
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        datamodule = getattr(trainer, "datamodule", None)
        for item in batch:
            picture = self.visualize(item)
            if picture is not None:
                name = generate_output_filename(
                    input_path=item.image_path or "",
                    output_path=self.output_dir,
                    dataset_name=getattr(datamodule, "name", None),
                    category=getattr(datamodule, "category", None),
                )
                picture.save(name)


def add_caption(picture: Image.Image, line: str) -> Image.Image:
    """Put a line of text below a picture, on a ground whose colour tells the decision that the line starts with."""
    font = ImageFont.load_default(_CAPTION_SIZE)
    height = _CAPTION_SIZE + 2 * _CAPTION_PADDING
    captioned = Image.new("RGB", (picture.width, picture.height + height), _colour(line))
    captioned.paste(picture, (0, 0))
    ImageDraw.Draw(captioned).text((_CAPTION_PADDING, picture.height + _CAPTION_PADDING - 1), line, "white", font)
    return captioned


def _colour(line: str) -> tuple[int, int, int]:
    return next((colour for word, colour in _CAPTION_COLOURS.items() if line.startswith(word)), (70, 70, 70))
