"""Exports: what their metadata says of the model, and compression for OpenVINO.

NNCF quantises whatever looks like a layer, the product with a memory bank included. Distances between nearly equal
features do not survive 256 levels. Here NNCF is told to leave everything alone but the backbone, which is found by the
way from the image to the nearest-neighbour search.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.post_processing import PostProcessor
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset, Subset

from anomalib_exdd.models.transforms import first_resize
from anomalib_exdd.utils.files import write_atomically

if TYPE_CHECKING:
    from .lightning_model import ExDD

logger = logging.getLogger(__name__)

MAX_IMAGES = 300  # images that ranges are measured on, and that a compressed model is compared with the original on
TOLERATED_LOSS = 0.005
"""Of average precision. A compressed model that loses more is told of."""
_LAYERS = {"Convolution", "GroupConvolution", "MatMul"}  # what has weights
_PIXEL_STEP = 4  # every so-many-th row and column of a map counts for its average precision


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
    """Write metadata into an ONNX file, from where OpenVINO takes it over as ``rt_info`` under "framework"."""
    import onnx  # noqa: PLC0415  only exports need it

    # The weights are in a file of their own, which stays as it is.
    content = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(content, metadata)
    with write_atomically(path) as partial:
        onnx.save(content, partial)


def compress(
    model: Any, compression: CompressionType, data: AnomalibDataModule | None, metric: Any, max_drop: float
) -> Any:
    """Compress a model, of OpenVINO's ``Model``, and say what that costs on the test images, if there are any.

    Args:
        model: The exported model in full precision; it stays as it is.
        compression: ``INT8`` stores the backbone's weights in 8 bits. ``INT8_PTQ`` computes the backbone in 8 bits,
            with ranges from validation images or, where there are none, training images. ``INT8_ACQ`` does the same,
            and takes layers back to full precision until the metric is within ``max_drop``.
        data: Where these images come from; ``INT8`` needs none.
        metric: For ``INT8_ACQ``, Anomalib's metric, the higher the better; measured on test images.
        max_drop: Its largest allowed drop.

    Raises:
        ModuleNotFoundError: If NNCF is not installed.
        ValueError: If data are needed and there are none.
    """
    option = f"`--compression_type {compression.value}`"
    try:
        import nncf  # noqa: PLC0415  only compression needs it
    except ModuleNotFoundError as error:
        msg = f'{option} needs NNCF: `uv pip install "anomalib-exdd[openvino]"`. `fp16` does without.'
        raise ModuleNotFoundError(msg, name="nncf") from error
    if data is None and compression != CompressionType.INT8:
        msg = f"{option} measures ranges on images: give the training's, such as `--data KSDD2 --data.root FOLDER`."
        raise ValueError(msg)
    if data is not None:
        data.setup("fit")
    nncf.set_log_level(logging.WARNING)  # it would name every operation that stays as it is
    ours = backbone_operations(model)
    names = [op.get_friendly_name() for op in model.get_ops() if op.get_friendly_name() not in ours]
    scope = nncf.IgnoredScope(names=names, validate=False)
    if data is None or compression == CompressionType.INT8:
        found = nncf.compress_weights(model.clone(), ignored_scope=scope)
    else:
        images = image_loader(calibration_images(data))
        ranges = nncf.Dataset(images, lambda batch: model_input(model, batch.image))
        # Symmetric ranges, NNCF's default, cost three times as much pixel AP at the same speed.
        preset = nncf.QuantizationPreset.MIXED
        settings = {"preset": preset, "ignored_scope": scope, "subset_size": MAX_IMAGES}
        if compression == CompressionType.INT8_PTQ:
            found = nncf.quantize(model, ranges, **settings)
        else:
            tests = nncf.Dataset(image_loader(data.test_data))

            def measure(compiled: Any, batches: Iterable[Any]) -> float:
                metric.reset()
                for prediction in predictions(compiled, batches):
                    metric.update(prediction)
                return float(metric.compute())

            found = nncf.quantize_with_accuracy_control(model, ranges, tests, measure, max_drop=max_drop, **settings)
    if data is not None:
        tell_loss(model, found, data.test_data, compression)
    return found


def backbone_operations(model: Any) -> set[str]:
    """Name the operations of the backbone's layers, first to last, in an exported model.

    They lie before the average that makes patch features of their output, which feeds the search, the first TopK, and
    not before the first convolution, where images are resized and normalised. What follows the last layer stays out:
    its result are the features.
    """
    operations = model.get_ordered_ops()
    search = [op for op in operations if op.get_type_name() == "TopK"][:1]
    before_search = _before(search)
    way = [op for op in operations if op.get_friendly_name() in before_search]
    averages = [op for op in way if op.get_type_name() == "AvgPool"]
    inner = _before([op for op in way if op.get_type_name() in {"AvgPool", "Convolution"}])
    network = _before([op for op in averages if op.get_friendly_name() not in inner])
    layers = [op for op in way if op.get_friendly_name() in network and op.get_type_name() in _LAYERS]
    first = next(op for op in layers if op.get_type_name() == "Convolution")
    return (_before(layers) | {op.get_friendly_name() for op in layers}) - _before([first])


def _before(operations: Iterable[Any]) -> set[str]:
    """Name everything that operations are computed from."""
    found: set[str] = set()
    todo = list(operations)
    while todo:
        for value in todo.pop().input_values():
            source = value.get_node()
            if source.get_friendly_name() not in found:
                found.add(source.get_friendly_name())
                todo.append(source)
    return found


def model_input(model: Any, images_BCHW: Tensor) -> Any:
    """Return images as a model takes them, NumPy, float32, resized if it takes images of one size only."""
    height, width = list(model.input(0).partial_shape)[-2:]
    if height.is_static and width.is_static:
        size = (height.get_length(), width.get_length())
        images_BCHW = F.interpolate(images_BCHW, size=size, mode="bilinear", antialias=True)
    return images_BCHW.numpy()


def calibration_images(data: AnomalibDataModule) -> Dataset[Any]:
    """Return validation images, and training images where a data module keeps none aside."""
    return getattr(data, "val_data", None) or data.train_data


def image_loader(dataset: Any) -> DataLoader[Any]:
    """Load at most :data:`MAX_IMAGES` images from all over a data set, one by one: they may differ in size."""
    step = max(1, len(dataset) / MAX_IMAGES)
    rows = [int(number * step) for number in range(min(len(dataset), MAX_IMAGES))]
    return DataLoader(Subset(dataset, rows), collate_fn=dataset.collate_fn)


def predictions(compiled: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Predict batches of one image with a compiled model; yield them with their true labels and masks."""
    for batch in batches:
        result = compiled(model_input(compiled, batch.image))
        found: dict[str, Any] = {output.any_name: torch.from_numpy(result[output]) for output in compiled.outputs}
        mask_BHW = batch.gt_mask
        if mask_BHW is not None:  # a pixel of the map is defect if any pixel below it is
            pixels = mask_BHW.float().unsqueeze(1)
            mask_BHW = F.adaptive_max_pool2d(pixels, found["anomaly_map"].shape[-2:]).squeeze(1).bool()
        yield ImageBatch(image=batch.image, gt_label=batch.gt_label, gt_mask=mask_BHW, **found)


def average_precisions(model: Any, dataset: Any) -> dict[str, float]:
    """Compute the average precision of images and, where they have masks, of pixels, for a model in float32."""
    import openvino  # noqa: PLC0415  only exports need it

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    thin = (..., slice(None, None, _PIXEL_STEP), slice(None, None, _PIXEL_STEP))
    pairs: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for found in predictions(compiled, image_loader(dataset)):
        pairs["image AP"].append((found.gt_label, found.pred_score))
        if found.gt_mask is not None:
            pairs["pixel AP"].append((found.gt_mask[thin].flatten(), found.anomaly_map[thin].flatten()))
    sides = {name: [torch.cat(side).numpy() for side in zip(*each, strict=True)] for name, each in pairs.items()}
    return {name: float(average_precision_score(*each)) for name, each in sides.items()}


def tell_loss(model: Any, compressed: Any, dataset: Any, compression: CompressionType) -> None:
    """Log what compression costs on test images, as a warning where it is more than :data:`TOLERATED_LOSS`."""
    labels = {int(label) for label in dataset.samples["label_index"]}
    if len(labels) < 2:
        logger.warning("What `%s` costs is unknown: it takes normal and defective test images.", compression.value)
        return
    before, after = average_precisions(model, dataset), average_precisions(compressed, dataset)
    changes = ", ".join(f"{name} {100 * before[name]:.1f} to {100 * after[name]:.1f}" for name in before)
    loses = any(before[name] - after[name] > TOLERATED_LOSS for name in before)
    logger.log(
        logging.WARNING if loses else logging.INFO,
        "`%s`, average precision on %d test images: %s.%s",
        *(compression.value, min(len(dataset), MAX_IMAGES), changes),
        " That is a loss: use `fp16`, or `int8_acq` with a small `--max_drop`." if loses else "",
    )
