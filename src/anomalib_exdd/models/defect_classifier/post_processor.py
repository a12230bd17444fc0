"""Thresholds for image scores that are probabilities, which stay as they are."""

from typing import Any

import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

_LOGIT_EPS = 1e-6  # probabilities are clipped so near to 0 and 1


class MidwayThreshold(F1AdaptiveThreshold):  # type: ignore[misc]
    """Anomalib's threshold of best F1, moved half-way to the next lower score.

    Anomalib's is a validation image's own score, and only what is above it is called defective. A classifier's scores
    lie near 0 and 1: that threshold would be as high as the score of the least certain defect, which would be missed.
    """

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the threshold, or the highest score of validation images without a defective one."""
        threshold: Tensor = super().compute()
        if not self._has_anomalous_samples():
            return threshold
        scores: Tensor = dim_zero_cat(self.preds).to(threshold.dtype)
        below = scores[scores < threshold]
        return (threshold + below.max()) / 2 if below.numel() else threshold / 2


class ProbabilityPostProcessor(PostProcessor):  # type: ignore[misc]
    """Anomalib's post-processor for a model whose image scores are probabilities and whose maps are log-odds.

    Image scores are not normalised: Anomalib's normalisation would clip most of the probabilities. Maps are normalised
    as Anomalib does, with the image threshold's log-odds in the middle: no masks are needed.
    """

    def __init__(self, image_sensitivity: float = 0.5, pixel_sensitivity: float = 0.5) -> None:
        super().__init__(image_sensitivity=image_sensitivity, pixel_sensitivity=pixel_sensitivity)
        self._image_threshold_metric = MidwayThreshold(fields=["pred_score", "gt_label"], strict=False)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Update the threshold by scores with labels, and the range of the maps."""
        self._image_threshold_metric.update(outputs)
        self._pixel_min_max_metric.update(outputs)

    @property
    def pixel_threshold(self) -> Tensor:
        """The image threshold in log-odds, as the maps are."""
        return torch.logit(self._image_threshold, _LOGIT_EPS)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """The threshold of image scores, moved by the sensitivity as Anomalib does."""
        return self._image_threshold + 0.5 - self.image_sensitivity


def decide_at_even_odds(post_processor: PostProcessor, max_log_odds: float) -> None:
    """Take a probability of 0.5 for the threshold, and maps from ``-max_log_odds`` to ``max_log_odds``."""
    for name, value in (("_image", 0.5), ("_pixel", 0.0)):  # Anomalib's wants log-odds for pixels
        getattr(post_processor, f"{name}_threshold").fill_(value)
    post_processor.pixel_min.fill_(-max_log_odds)
    post_processor.pixel_max.fill_(max_log_odds)
