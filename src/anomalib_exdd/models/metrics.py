"""What a test reports."""

from typing import Any

from anomalib.metrics import AUPR, AUROC, Evaluator, F1Score


def default_evaluator() -> Evaluator:
    """Report ranking and F1 of images and pixels; average precision too, because AUROC saturates.

    Pixel metrics are left out where test images have no masks.
    """
    image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
    pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
    return Evaluator(
        test_metrics=[
            AUROC(**image),
            AUPR(**image),
            F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
            AUROC(**pixel),
            AUPR(**pixel),
            F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
        ]
    )
