"""Metrics from counts, against scikit-learn and Anomalib on the samples themselves."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.metrics import AUPRO
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_exdd.comparison.bootstrap import (
    aupro,
    auroc,
    average_precision,
    best_f1,
    pixel_histograms,
)
from anomalib_exdd.comparison.results import read_arrays, write_arrays


def counts(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of normal and of defective samples by score."""
    values, places = np.unique(scores, return_inverse=True)
    chosen = np.eye(len(values))[places]
    return (weights * (labels == 0)) @ chosen, (weights * labels) @ chosen


@pytest.fixture(params=[0, 1, 2])
def drawn(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, labels, and the weights of five resamples."""
    rng = np.random.default_rng(request.param)
    labels = rng.integers(0, 2, 60)
    return np.round(rng.normal(labels, 1), 1), labels, rng.integers(0, 4, (5, 60))


def test_ranking_metrics_are_those_of_scikit_learn(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, labels, weights = drawn
    normal, defect = counts(scores, labels, weights)
    for number, weight in enumerate(weights):
        assert auroc(normal, defect)[number] == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight))
        expected = average_precision_score(labels, scores, sample_weight=weight)
        assert average_precision(normal, defect)[number] == pytest.approx(expected)
        precision, recall, _ = precision_recall_curve(labels, scores, sample_weight=weight)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert best_f1(normal, defect)[number] == pytest.approx(f1.max())


def test_aupro_of_a_case_by_hand() -> None:
    # From the top: a region of 2 pixels is found whole, then 1 of 4 normal pixels, then one of a region of 1 pixel.
    normal, regions = np.array([[3.0, 0, 1, 0]]), np.array([[0, 1.0, 0, 1.0]])
    # Overlap 1/2 up to a rate of 1/4, then (at rate 1/4) both regions, flat to 0.3.
    expected = (0.25 * 0.5 + 0.05 * 1.0) / 0.3
    assert aupro(normal, regions, np.array([2.0]))[0] == pytest.approx(expected)


@pytest.fixture
def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """Maps and masks of six images, two of them normal and one with two defects."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(6, 40, 30, dtype=torch.bool)
    for number in range(4):
        masks[number, 5 : 12 + number, 4:9] = True
    masks[0, 30:33, 20:28] = True
    return torch.randn(6, 40, 30, generator=generator) * 2 + masks * 2.5 + 20, masks


def test_histograms_of_pixels_give_the_metrics_of_the_pixels(pixels: tuple[torch.Tensor, torch.Tensor]) -> None:
    maps, masks = pixels
    found = pixel_histograms(maps, masks)
    assert found.normal.sum() + found.defect.sum() == maps.numel()
    assert found.region_counts.tolist() == [2, 1, 1, 1, 0, 0]
    assert found.regions.sum(axis=1) == pytest.approx(found.region_counts, abs=1e-5)
    normal, defect = found.normal.sum(axis=0), found.defect.sum(axis=0)
    scores, labels = maps.flatten().numpy(), masks.flatten().numpy()
    assert auroc(normal, defect) == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert average_precision(normal, defect) == pytest.approx(average_precision_score(labels, scores), abs=2e-3)
    metric = AUPRO(fields=["maps", "masks"])
    metric.update(SimpleNamespace(maps=maps, masks=masks.float()))
    ours = aupro(normal, found.regions.sum(axis=0), found.region_counts.sum())
    assert ours == pytest.approx(float(metric.compute()), abs=2e-3)


def test_arrays_are_read_as_they_were_written(pixels: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    assert read_arrays(tmp_path / "histograms.npz") == {}
    written = pixel_histograms(*pixels)._asdict()
    write_arrays(tmp_path / "histograms.npz", **written)
    again = read_arrays(tmp_path / "histograms.npz")
    assert list(again) == list(written) == ["normal", "defect", "regions", "region_counts"]
    for name, kind in zip(written, ["uint32", "uint32", "float32", "uint32"], strict=True):
        assert np.array_equal(again[name], written[name])
        assert again[name].dtype == kind
    assert [path.name for path in tmp_path.iterdir()] == ["histograms.npz"]
