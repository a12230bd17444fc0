"""Metrics of a test."""

from anomalib.metrics import AUPR, AUROC, Evaluator, F1Score


def default_evaluator() -> Evaluator:
    """Report ranking and F1 of images and pixels; average precision too, because AUROC saturates."""
    scores = {"image_": ["pred_score", "gt_label"], "pixel_": ["anomaly_map", "gt_mask"]}
    labels = {"image_": ["pred_label", "gt_label"], "pixel_": ["pred_mask", "gt_mask"]}
    # Test images without masks have no pixel metrics.
    return Evaluator(
        test_metrics=[
            metric(fields=fields[prefix], prefix=prefix, strict=prefix == "image_")
            for prefix in ("image_", "pixel_")
            for metric, fields in ((AUROC, scores), (AUPR, scores), (F1Score, labels))
        ]
    )
