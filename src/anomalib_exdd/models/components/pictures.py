"""Sizes of the pictures that a test or a prediction draws."""

from collections.abc import Sequence

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
