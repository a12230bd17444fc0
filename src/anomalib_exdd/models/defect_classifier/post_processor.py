"""Thresholds for image scores that are probabilities, which stay as they are."""

from typing import Any

import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

_CERTAIN = 1e-6  # nearest to 0 or 1 that a probability is taken for when its log-odds are needed


class MidwayThreshold(F1AdaptiveThreshold):  # type: ignore[misc]
    """Anomalib's threshold of best F1, moved half-way to the next lower score.

    Anomalib's is a validation image's own score, and calls only what is above it defective. A classifier's scores lie
    near 0 and 1: there that threshold would be as high as the least certain defect, and itself missed.
    """

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the threshold, or the highest score of validation images without a defective one."""
        threshold: Tensor = super().compute()
        scores: Tensor = dim_zero_cat(self.preds).to(threshold.dtype)
        if not self._has_anomalous_samples():
            return threshold
        below = scores[scores < threshold]
        return (threshold + below.max()) / 2 if below.numel() else threshold / 2


class ProbabilityPostProcessor(PostProcessor):  # type: ignore[misc]
    """Anomalib's post-processor for a model whose image scores are probabilities and whose maps are log-odds.

    Image scores are not normalised: what the model returns is a probability, and Anomalib's normalisation would clip
    most of it. Maps are normalised as Anomalib does, with the image threshold's log-odds in the middle: no masks are
    needed, and none are looked at.
    """

    def __init__(self, image_sensitivity: float = 0.5, pixel_sensitivity: float = 0.5) -> None:
        super().__init__(image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity)
        self._image_threshold_metric = MidwayThreshold(fields=["pred_score", "gt_label"], strict=False)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Take in a batch: scores with labels for the threshold, and the range of the maps."""
        del trainer, pl_module, args, kwargs
        self._image_threshold_metric.update(outputs)
        self._pixel_min_max_metric.update(outputs)

    @property
    def pixel_threshold(self) -> Tensor:
        """The image threshold as log-odds, which is what maps are made of."""
        return torch.logit(self._image_threshold, _CERTAIN)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """The threshold of image scores, moved by the sensitivity as Anomalib does."""
        return self._image_threshold + 0.5 - self.image_sensitivity


def decide_at_even_odds(post_processor: PostProcessor, reach: float) -> None:
    """Set threshold and ranges where there are no validation images to find them on: a probability of 0.5.

    Args:
        post_processor: This package's or Anomalib's; changed.
        reach: Log-odds in maps that become 1, and 0 where they are negative.
    """
    for name, value in (("_image", 0.5), ("_pixel", 0.0)):  # Anomalib's wants log-odds for pixels
        getattr(post_processor, f"{name}_threshold").fill_(value)
    post_processor.pixel_min.fill_(-reach)
    post_processor.pixel_max.fill_(reach)
