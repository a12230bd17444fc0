"""What the calibration learns, against independent float64 computations and as properties."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from anomalib_exdd import ExDD
from anomalib_exdd.models.exdd.calibration import (
    PRIOR_PRECISION,
    PRIOR_WEIGHT,
    Calibration,
    ImagePatches,
    decision_thresholds,
    fit_probability,
)
from anomalib_exdd.models.exdd.calibration_set import (
    TYPICAL_PATCHES,
    CalibrationImage,
    CalibrationSet,
    drawn,
    high_patches,
    others_distances,
)
from anomalib_exdd.models.exdd.patches import farthest_patches
from anomalib_exdd.models.exdd.rough_ranking import RoughRanking
from anomalib_exdd.models.exdd.scoring import top_count

PATCHES = 100
TOP = 0.02  # two patches of a hundred


def made_up(normal: int, defective: int, *, seed: int = 0, shift: float = 1.0) -> ImagePatches:
    """Images whose defects, two patches each, are farther from normal and nearer to defects than the rest."""
    rng = np.random.default_rng(seed)
    images = normal + defective
    log_negative = rng.normal(0.0, 0.1, (images, PATCHES, 2))
    log_positive = rng.normal(1.0, 0.1, (images, PATCHES, 2))
    log_negative[normal:, :2] += 0.3 * shift
    log_positive[normal:, :2] -= 0.6 * shift
    typical = np.zeros((images, PATCHES), dtype=bool)
    typical[:normal, -20:] = True
    return ImagePatches(
        torch.from_numpy(log_negative).reshape(-1, 2),
        torch.from_numpy(log_positive).reshape(-1, 2) if defective > 1 else None,
        torch.arange(images).repeat_interleave(PATCHES),
        torch.from_numpy(typical).flatten(),
        torch.arange(images) >= normal,
        torch.full((images,), PATCHES),
        torch.zeros(images, dtype=torch.bool),
    )


def fitted(patches: ImagePatches, defect_rate: float = 0.1) -> Calibration:
    calibration = Calibration(TOP)
    calibration.fit(patches, defect_rate)
    return calibration


def image_scores(patches: ImagePatches, calibration: Calibration) -> np.ndarray:
    """Score images by loops in float64: mean of the two highest patches."""
    weights, reference = calibration.weights.double().numpy(), calibration.reference.double().numpy()
    scores = []
    for image in range(len(patches.defective)):
        rows = np.flatnonzero((patches.image.numpy() == image) & ~patches.typical.numpy())
        values = []
        for row in rows:
            value = float(calibration.bias) + float(weights[:2] @ patches.log_negative[row].numpy())
            if patches.log_positive is not None:
                for k, log in enumerate(patches.log_positive[row].tolist()):
                    value -= weights[2 + k] * (min(log, reference[k]) + 0.25 * max(log - reference[k], 0))
            values.append(value)
        scores.append(np.mean(sorted(values)[-2:]))
    return np.array(scores)


@pytest.mark.parametrize(("normal", "defective"), [(30, 0), (30, 1), (30, 2), (40, 12)])
def test_probabilities_are_those_of_the_equations(normal: int, defective: int) -> None:
    patches = made_up(normal, defective)
    calibration = fitted(patches)
    scores = image_scores(patches, calibration)
    expected = expit(float(calibration.slope) * scores + float(calibration.offset))
    np.testing.assert_allclose(calibration.training_probability.numpy(), expected, rtol=2e-4)
    assert (calibration.weights >= 0).all()


def test_weights_minimise_the_penalised_loss() -> None:
    """Any step away from the weights found, within their bounds, makes the loss of the last selection larger."""
    patches = made_up(40, 12)
    calibration = fitted(patches)
    spread = float(patches.log_negative[patches.typical, 0].std(correction=0))
    reference = patches.log_positive[patches.typical].median(0).values  # type: ignore[index]
    logs = patches.log_positive
    assert logs is not None
    near = torch.minimum(logs, reference) + 0.25 * (logs - reference).clamp_min(0)
    evidence = torch.cat([patches.log_negative, -near], 1).numpy()
    weights = calibration.weights.double().numpy()
    means = []
    for image in range(len(patches.defective)):
        rows = np.flatnonzero((patches.image.numpy() == image) & ~patches.typical.numpy())
        means.append(evidence[sorted(rows, key=lambda row: evidence[row] @ weights)[-2:]].mean(0))
    label = patches.defective.numpy()
    weight = np.where(label, 1.0, 12 / 40)

    def loss(scaled: np.ndarray, bias: float) -> float:
        logit = np.array(means) @ (scaled / spread) + bias
        away = scaled - np.array([PRIOR_WEIGHT, 0, 0, 0])
        return float(
            weight @ (np.logaddexp(0, logit) - label * logit) + (np.array(PRIOR_PRECISION) * away**2).sum() / 2
        )

    best, bias = weights * spread, float(calibration.bias)
    least = loss(best, bias)
    for step in (1e-2, -1e-2):
        assert loss(best, bias + step) > least - 1e-6
        for piece in range(4):
            moved = best.copy()
            moved[piece] = max(0.0, moved[piece] + step)
            assert loss(moved, bias) > least - 1e-6
    assert weights[2] > 0


def test_without_defects_the_order_is_that_of_the_distance_to_normal() -> None:
    patches = made_up(30, 0)
    calibration = fitted(patches)
    assert calibration.weights[1:].tolist() == [0, 0, 0]
    distances = [
        np.sort(patches.log_negative[(patches.image == image) & ~patches.typical, 0].numpy())[-2:].mean()
        for image in range(30)
    ]
    assert (np.argsort(calibration.training_probability.numpy()) == np.argsort(distances)).all()


def test_more_evidence_moves_the_weights_further_from_the_prior() -> None:
    moved = [float(fitted(made_up(60, defective)).weights[2:].sum()) for defective in (2, 8, 30)]
    assert moved[0] < moved[1] < moved[2]


def test_the_fit_is_deterministic_and_blind_to_the_order_of_images() -> None:
    patches = made_up(20, 6)
    order = torch.randperm(26, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.arange(PATCHES) + PATCHES * image for image in order])
    shuffled = ImagePatches(
        patches.log_negative[rows],
        patches.log_positive[rows],  # type: ignore[index]
        torch.arange(26).repeat_interleave(PATCHES),
        patches.typical[rows],
        patches.defective[order],
        patches.patches,
        patches.synthetic,
    )
    first, again, other = fitted(patches), fitted(patches), fitted(shuffled)
    assert torch.equal(first.weights, again.weights)
    torch.testing.assert_close(first.weights, other.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.training_probability[order], other.training_probability, rtol=1e-4, atol=1e-6)


class TestProbability:
    def test_it_is_monotone_and_never_certain_after_few_images(self) -> None:
        scores = np.array([0.0, 1, 2, 3, 10, 11])
        slope, offset = fit_probability(scores, np.array([False] * 4 + [True] * 2), 1 / 3, np.ones(6))
        assert slope > 0
        probability = expit(slope * scores + offset)
        assert probability.min() > 0.05
        assert probability.max() < 0.95

    def test_scores_that_tell_nothing_keep_their_order(self) -> None:
        slope, _ = fit_probability(np.array([3.0, 2, 1, 0]), np.array([False, False, True, True]), 0.5, np.ones(4))
        assert slope > 0

    def test_a_rarer_defect_is_less_probable(self) -> None:
        scores, defective = np.r_[np.zeros(50), np.ones(50)] + np.linspace(0, 1, 100), np.arange(100) >= 50
        rare, common = (fit_probability(scores, defective, rate, np.ones(100)) for rate in (0.01, 0.5))
        assert rare[0] == pytest.approx(common[0])
        assert common[1] - rare[1] == pytest.approx(math.log(99))

    def test_it_is_right_on_average(self) -> None:
        rng = np.random.default_rng(0)
        scores = np.r_[rng.normal(0, 1, 2000), rng.normal(2, 1, 500)]
        defective = np.arange(2500) >= 2000
        slope, offset = fit_probability(scores, defective, 0.2, np.ones(2500))
        probability = expit(slope * scores + offset)
        for low, high in ((0.1, 0.3), (0.3, 0.6), (0.6, 0.9)):
            inside = (probability > low) & (probability < high)
            assert defective[inside].mean() == pytest.approx(probability[inside].mean(), abs=0.06)


class TestDecisions:
    @settings(deadline=None)
    @given(
        st.lists(st.floats(0, 1, width=32), min_size=1, max_size=80),
        st.lists(st.floats(0, 1, width=32), max_size=80),
        st.floats(0.01, 0.5),
        st.floats(0.01, 0.5),
    )
    def test_rates_hold_on_the_training_images(
        self, normal: list[float], defective: list[float], false_reject: float, false_accept: float
    ) -> None:
        good, bad = np.array(normal), np.array(defective)
        decisions = decision_thresholds(good, bad, false_reject, false_accept)
        assert decisions.accept <= decisions.reject
        assert (good >= decisions.reject).mean() <= false_reject
        if len(bad) and decisions.accept_backed:
            assert (bad < decisions.accept).mean() <= false_accept
        assert decisions.reject_backed == (math.ceil((len(good) + 1) * (1 - false_reject)) <= len(good))

    def test_a_further_image_errs_at_the_allowed_rate(self) -> None:
        """Exchangeability: a fresh image from the same source exceeds the threshold with at most the rate."""
        rng = np.random.default_rng(0)
        errors = []
        for _ in range(2000):
            scores = rng.random(40)
            errors.append(scores[-1] >= decision_thresholds(scores[:-1], np.empty(0), 0.1, 0.1).reject)
        assert np.mean(errors) == pytest.approx(0.1, abs=0.02)

    def test_names(self) -> None:
        decisions = decision_thresholds(np.linspace(0, 0.5, 99), np.linspace(0.3, 1, 99), 0.1, 0.05)
        assert [decisions.name(p) for p in (0.0, (decisions.accept + decisions.reject) / 2, 1.0)] == [
            "accept",
            "review",
            "reject",
        ]
        assert decisions.describe(0.9).startswith("reject: probability 0.900")

    def test_nothing_to_review_where_one_threshold_serves_both(self) -> None:
        decisions = decision_thresholds(np.linspace(0, 0.2, 99), np.linspace(0.8, 1, 99), 0.01, 0.05)
        assert decisions.accept == decisions.reject
        assert 0.2 < decisions.accept < 0.85

    def test_too_few_images_are_said(self) -> None:
        text = str(decision_thresholds(np.linspace(0, 0.5, 20), np.array([0.9]), 0.01, 0.05))
        assert "Too few defective training images" in text
        assert "Too few normal training images" in text


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_others_distances_leave_sources_out(entries: int, sources: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = np.r_[np.arange(sources), rng.integers(sources, size=entries)]
    bank = rng.normal(size=(len(source), 5)).astype(np.float32)
    left_out = [sorted(rng.choice(sources, rng.integers(sources), replace=False).tolist()) for _ in range(4)]
    image = np.repeat(rng.permutation(4), 3)
    query = np.concatenate([bank[rng.integers(len(bank), size=2)], rng.normal(size=(len(image) - 2, 5))])
    query = query.astype(np.float32)
    found = others_distances(
        torch.from_numpy(query), torch.from_numpy(image), left_out, torch.from_numpy(bank), torch.from_numpy(source), k
    )
    for row, (patch, number) in enumerate(zip(query, image, strict=True)):
        others = [entry for entry, s in zip(bank, source, strict=True) if s not in left_out[number]]
        expected = sorted(math.dist(patch, entry) for entry in others)[:k]
        expected += expected[-1:] * (k - len(expected))
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-5, atol=1e-6)


def an_image(name: str, *, defective: bool = False, seed: int = 0) -> CalibrationImage:
    return CalibrationImage(name, torch.randn(50, 7, generator=torch.Generator().manual_seed(seed)), defective)


def test_a_calibration_set_forgets_what_is_removed() -> None:
    high = torch.tensor([3, 5])
    images = [an_image(name, defective=name == "b", seed=seed) for seed, name in enumerate("abc")]
    everything, without = CalibrationSet(), CalibrationSet()
    everything.add([image.keep(high) for image in images])
    without.add([images[0].keep(high), images[2].keep(high)])
    everything.remove("b")
    everything.remove("unknown")
    assert everything.sources == without.sources == ["a", "c"]
    for name in ("features", "image", "typical", "defective", "patches"):
        assert torch.equal(getattr(everything, name), getattr(without, name))
    assert int(everything.typical.sum()) == 2 * TYPICAL_PATCHES
    assert torch.equal(everything.features[:2], images[0].features[high].half())


def test_an_image_added_again_is_replaced() -> None:
    kept = CalibrationSet()
    kept.add([an_image("a").keep(torch.tensor([1]))])
    kept.add([an_image("a", defective=True).keep(torch.tensor([2, 4]))])
    assert kept.sources == ["a"]
    assert kept.defective.tolist() == [True]
    assert len(kept.features) == 2


def test_images_are_drawn_by_name_alone() -> None:
    paths = [f"/somewhere/{index:04d}.png" for index in range(500)]
    chosen = drawn(paths, 50)
    assert len(chosen) == 50
    assert chosen == drawn(paths[::-1], 50)
    moved = drawn([path.replace("/somewhere", "C:\\elsewhere") for path in paths], 50)
    assert [path[-8:] for path in moved] == [path[-8:] for path in chosen]


def test_high_patches_hold_the_highest_by_both_rankings() -> None:
    negative, positive = torch.zeros(200), torch.full((200,), 1.0)
    negative[[7, 90]] = 2.0
    positive[[11, 13]] = -4.0
    rows = high_patches(negative, positive, 4)
    assert {7, 90, 11, 13} <= set(rows.tolist())
    assert len(rows) <= 8


def test_the_rough_ranking_keeps_what_is_far_from_normal_or_near_to_defects(trained: tuple[ExDD, Path]) -> None:
    model = trained[0]
    negative, positive = model.model.negative_bank, model.model.positive_bank
    ranking = RoughRanking(model.model, model.settings)
    generator = torch.Generator().manual_seed(5)
    wanted = top_count(400, model.settings.top_fraction)
    spread = negative.features.std(dim=0)
    for path in [*negative.sources[:3], *positive.sources[:3], "unknown.png"]:
        own = positive.source == (positive.sources.index(path) if path in positive.sources else -1)
        defects = positive.features[~own]
        patches = negative.features[torch.randint(len(negative), (400,), generator=generator)]
        patches = patches + 0.1 * spread * torch.randn(patches.shape, generator=generator)
        patches[:wanted] += 6 * spread * torch.randn(wanted, patches.shape[1], generator=generator)
        patches[-wanted:] = defects[torch.randint(len(defects), (wanted,), generator=generator)]
        kept = ranking.high(CalibrationImage(path, patches, defective=False)).tolist()
        assert {*range(wanted), *range(400 - wanted, 400)} <= set(kept)
        assert len(kept) <= 4 * wanted


def test_farthest_patches_take_what_no_normal_image_shows() -> None:
    distances = torch.tensor([0.1, 5.0, 0.2, 4.0, 3.0, 0.3] + [0.1] * 94)
    assert farthest_patches(distances, usual=3.5, most=0.1).nonzero().flatten().tolist() == [1, 3]
    assert farthest_patches(distances, usual=9.0, most=0.1).nonzero().flatten().tolist() == [1]
    assert int(farthest_patches(distances, usual=0.0, most=0.03).sum()) == 3
