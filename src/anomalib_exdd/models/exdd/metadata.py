"""What an exported file says about its model beside the network: thresholds, input size, version.

ONNX files keep it as metadata, from where OpenVINO takes it over as ``rt_info`` under "framework".
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.post_processing import PostProcessor

from anomalib_exdd.models.transforms import first_resize
from anomalib_exdd.utils.files import write_atomically

if TYPE_CHECKING:
    from .lightning_model import ExDD


def export_metadata(model: "ExDD") -> dict[str, str]:
    """Describe a model for those who run its export. Thresholds are on the scale of the exported ``pred_score``.

    Returns:
        - ``model``, ``version``: name of the model and version of this package;
        - ``image_size``: height and width that images are resized to inside, if they are;
        - ``label_threshold``, ``mask_threshold``: ``pred_label`` and ``pred_mask`` are true above them;
        - with a fitted calibrated score ``accept_below`` and ``reject_from``, the thresholds of the decisions; and
          ``probability_at_0`` and ``probability_at_1``, between which the probability of a defect is linear in the
          score.
    """
    found: dict[str, Any] = {"model": model.name, "version": version("anomalib-exdd")}
    post, pre = model.post_processor, getattr(model.pre_processor, "transform", None)
    resize = first_resize(pre)
    if resize is not None and len(resize.size) == 2:
        found["image_size"] = "{} {}".format(*resize.size)
    low, high = 0.0, 1.0
    if isinstance(post, PostProcessor):
        if post.enable_thresholding and not post.image_threshold.isnan():
            found["label_threshold"] = float(post.normalized_image_threshold)
        if post.enable_thresholding and not post.pixel_threshold.isnan():
            found["mask_threshold"] = float(post.normalized_pixel_threshold)
        span = float(post.image_max - post.image_min)
        if post.enable_normalization and span > 0:  # not if it is NaN
            low, high = (float(post.image_threshold) + side * span / 2 for side in (-1, 1))
    if model.decisions is not None:
        for name, limit in (("accept_below", model.decisions.accept), ("reject_from", model.decisions.reject)):
            found[name] = (limit - low) / (high - low)
        found |= {"probability_at_0": low, "probability_at_1": high}
    return {name: value if isinstance(value, str) else f"{value:.9g}" for name, value in found.items()}


def write_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Write metadata into an ONNX file, beside what it holds."""
    import onnx  # noqa: PLC0415  only exports need it

    # The weights are in a file of their own, which stays as it is.
    content = onnx.load(path, load_external_data=False)
    for name, value in metadata.items():
        content.metadata_props.add(key=name, value=value)
    with write_atomically(path) as partial:
        onnx.save(content, partial)
