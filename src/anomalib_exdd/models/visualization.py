"""The pictures that a test or a prediction draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from PIL import Image

from .transforms import without_normalization

LABEL_SIZE = 12
"""Height of the panels' labels in pixels; the longest fits into the narrowest panel."""

_LEAST_SIDE, _GREATEST_SIDE = 200, 800  # of a panel, in pixels


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


class SeenImageVisualizer(ImageVisualizer):  # type: ignore[misc]
    """Anomalib's pictures, of the images as the model sees them: read, turned and cropped as for the model.

    Anomalib opens the file again and stretches maps over the whole image, whatever part of it they belong to.
    """

    _chosen: Path | None = None

    def on_test_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save a picture of every image of the batch, where Anomalib saves its own."""
        del outputs
        if self.output_dir in {None, self._chosen}:  # the user's stays, the trainer's is the present trainer's
            self.output_dir = self._chosen = Path(trainer.default_root_dir) / "images"
        datamodule = getattr(trainer, "datamodule", None)
        transform = getattr(pl_module.pre_processor, "transform", None)
        names = image_names(batch, trainer, batch_idx, dataloader_idx)
        for item, name in zip(batch, names, strict=True):
            self.field_size = panel_size(item.image.shape[-2:])
            seen = item.update(image=without_normalization(item.image, transform), image_path=None)
            picture: Any = self.visualize(seen)
            if picture is not None:
                path = generate_output_filename(
                    input_path=name,
                    output_path=self.output_dir,
                    dataset_name=getattr(datamodule, "name", None),
                    category=getattr(datamodule, "category", None),
                )
                picture.save(_writable(path))


def image_names(batch: Any, trainer: Any, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
    """Name the images of a batch: by their paths, or by their place in the data where there are none.

    Args:
        batch: The batch.
        trainer: Trainer that predicts it.
        batch_idx: Number of the batch in this process.
        dataloader_idx: Number of the loader.
    """
    number = batch_idx * trainer.world_size + trainer.global_rank
    loader = f"loader_{dataloader_idx}_" if dataloader_idx else ""
    paths = batch.image_path or [None] * len(batch.image)
    return [
        str(path) if path else f"{loader}batch_{number:05d}_image_{index:03d}.png" for index, path in enumerate(paths)
    ]


def _writable(path: Path) -> Path:
    """Return a path that Pillow can write, also for an image that came from a file of another kind."""
    known = Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
    return path if known else path.with_name(f"{path.name}.png")
