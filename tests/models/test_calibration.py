"""What the calibration learns, against independent float64 computations and as properties."""

import math

import numpy as np
import pytest
import torch
from anomalib.post_processing import PostProcessor
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr

from anomalib_exdd.models.exdd import calibration as calibration_module
from anomalib_exdd.models.exdd.calibration import Calibration, ImagePatches, fit_probability
from anomalib_exdd.models.exdd.decisions import Thresholds
from anomalib_exdd.models.exdd.scoring import PatchDistances, calibrated_image, calibrated_patch

PATCHES, SAMPLED = 100, 20
TOP = 0.02  # two patches of a hundred
COLUMNS = [slice(0, 1), slice(1, 5), slice(5, 6)]
"""What the three pieces of evidence look at: unfamiliar, neighbours, boundary."""


def made_up(
    normal: int,
    defective: int,
    synthetic: int = 0,
    *,
    seed: int = 0,
    positive: bool = True,
    boundary: bool = True,
    shifts: tuple[float, float, float] = (0.3, 0.6, 3.0),
) -> ImagePatches:
    """Images whose defects, two patches each, are farther from normal, nearer to defects and beyond the boundary.

    The last patches of every image are its sample: of normal images patches as any, of defective ones defects.
    """
    rng = np.random.default_rng(seed)
    images = normal + defective + synthetic
    log_negative = rng.normal(0.5, 0.1, (images, PATCHES, 2)).cumsum(axis=2) / [1, 1.9]
    log_positive = rng.normal(1.0, 0.1, (images, PATCHES, 2)).cumsum(axis=2) / [1, 1.9]
    log_odds = rng.normal(-3, 1, (images, PATCHES))
    strength = rng.lognormal(0, 0.5, (images - normal, 1))
    for rows in (slice(0, 2), slice(PATCHES - SAMPLED, None)):
        log_negative[normal:, rows] += shifts[0] * strength[..., None]
        log_positive[normal:, rows] -= shifts[1] * strength[..., None]
        log_odds[normal:, rows] += shifts[2] * strength
    sampled = np.zeros((images, PATCHES), dtype=bool)
    sampled[:, -SAMPLED:] = True
    defective_I = torch.arange(images) >= normal
    return ImagePatches(
        torch.from_numpy(log_negative).reshape(-1, 2),
        torch.from_numpy(log_positive).reshape(-1, 2) if positive else None,
        torch.from_numpy(log_odds).flatten() if boundary else None,
        torch.arange(images).repeat_interleave(PATCHES),
        torch.from_numpy(sampled).flatten(),
        defective_I,
        torch.full((images,), PATCHES),
        torch.where(defective_I, 30, PATCHES),
        torch.arange(images) >= normal + defective,
    )


def select(patches: ImagePatches, images: list[int]) -> ImagePatches:
    """Return the patches of some images, in that order; an image may come twice."""
    rows = torch.cat([(patches.image == image).nonzero().flatten() for image in images])
    per_patch = [None if values is None else values[rows] for values in patches[:3]]
    number = torch.arange(len(images)).repeat_interleave(PATCHES)
    return ImagePatches(*per_patch, number, patches.sampled[rows], *(values[images] for values in patches[5:]))  # type: ignore[arg-type]


def fitted(patches: ImagePatches, unknown_rate: float = 0.1, synthetic_weight: float = 0.0) -> Calibration:
    calibration = Calibration(TOP)
    calibration.fit(patches, 0.1, unknown_rate, synthetic_weight)
    return calibration


def evidence(patches: ImagePatches) -> list[list[float]]:
    """Return the six columns of every patch, by loops in float64."""
    found = []
    for row, (first, third) in enumerate(patches.log_negative.tolist()):
        near = [0.0, 0.0] if patches.log_positive is None else [-value for value in patches.log_positive[row].tolist()]
        boundary = 0.0 if patches.log_odds is None else float(patches.log_odds[row])
        found.append([math.exp(first), first, third, *near, boundary])
    return found


def top_means(patches: ImagePatches, score_C: np.ndarray) -> np.ndarray:
    """Return the mean of the two highest patches of every image, the sample left out."""
    found = []
    for image in range(len(patches.defective)):
        rows = np.flatnonzero((patches.image.numpy() == image) & ~patches.sampled.numpy())
        found.append(np.mean(sorted(score_C[rows])[-2:]))
    return np.array(found)


def patch_scores(patches: ImagePatches, calibration: Calibration) -> np.ndarray:
    columns_CE = np.array(evidence(patches))
    known = columns_CE @ calibration.known_weights.double().numpy() + calibration.known_bias.item()
    unknown = columns_CE[:, 0] * calibration.unknown_slope.item() + calibration.unknown_offset.item()
    return np.logaddexp(known, unknown)


def log_odds(scores: np.ndarray, calibration: Calibration) -> np.ndarray:
    linear = calibration.slope.item() * scores + calibration.offset.item()
    return np.where(np.abs(linear) <= 6, linear, np.sign(linear) * (6 + np.log1p(np.maximum(np.abs(linear) - 6, 0))))


def voices(calibration: Calibration) -> np.ndarray:
    """Return the weight of every piece of evidence of known kinds."""
    weights = calibration.known_weights.double().numpy()
    found = [
        np.linalg.norm(weights[columns]) / np.linalg.norm(piece.weights[columns])
        for piece, columns in zip(calibration.pieces, COLUMNS, strict=False)
    ]
    return np.array(found)


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize(("normal", "defective"), [(30, 0), (30, 1), (30, 2), (40, 12)])
def test_probabilities_are_those_of_the_equations(normal: int, defective: int, boundary: bool) -> None:
    patches = made_up(normal, defective, boundary=boundary)
    calibration = fitted(patches)
    expected = expit(log_odds(top_means(patches, patch_scores(patches, calibration)), calibration))
    np.testing.assert_allclose(calibration.training_probability.numpy(), expected, rtol=2e-4)
    assert torch.equal(calibration.training_defective, patches.defective)
    assert (calibration.known_weights >= 0).all()
    assert calibration.unknown_slope > 0
    assert calibration.slope > 0


def test_training_and_prediction_score_alike() -> None:
    """The same patches, as distances, get the same probability from what predicts."""
    patches = made_up(20, 6)
    calibration = fitted(patches)
    kept = ~patches.sampled
    ranked = [logs[kept].exp().float().reshape(26, -1, 2)[..., [0, 0, 1]] for logs in patches[:2]]  # type: ignore[index]
    distances = [PatchDistances(each[..., 0], None, 8, each) for each in ranked]
    boundary_BP = patches.log_odds[kept].float().reshape(26, -1)  # type: ignore[index]
    # The sample is a part of the whole image: two of a hundred patches are two of these eighty.
    coefficients = calibration.coefficients._replace(top_fraction=2 / (PATCHES - SAMPLED))
    found = calibrated_image(distances[0], distances[1], coefficients, boundary_BP)
    torch.testing.assert_close(found, calibration.training_probability, rtol=2e-4, atol=1e-6)
    expected = patch_scores(patches, calibration)[kept.numpy()].reshape(26, -1)
    scores = calibrated_patch(distances[0], distances[1], coefficients, boundary_BP)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_pieces_are_on_the_scale_of_good_images() -> None:
    """Median 0, and the highest tenth from where that of a standard normal distribution begins."""
    patches = made_up(41, 12)
    calibration = fitted(patches)
    assert len(calibration.pieces) == 3
    for piece, columns in zip(calibration.pieces, COLUMNS, strict=True):
        assert (piece.weights >= 0).all()
        assert set(np.flatnonzero(piece.weights)) <= set(range(6)[columns])
        top = top_means(patches, np.array(evidence(patches)) @ piece.weights + piece.bias)[:41]
        assert np.median(top) == pytest.approx(0, abs=1e-9)
        assert np.quantile(top, 0.9) == pytest.approx(1.2816)


def test_defects_that_look_like_anything_else_do_not_change_the_order() -> None:
    """Small weights fitted to noise would make the order of images random; defects that show get weights."""

    def weighed(shifts: tuple[float, float, float]) -> list[bool]:
        made = [fitted(made_up(40, 8, seed=seed, shifts=shifts)) for seed in range(8)]
        assert all(calibration.unknown_slope.item() > 0 for calibration in made)
        return [bool(calibration.known_weights.any()) for calibration in made]

    assert sum(weighed((0.0, 0.0, 0.0))) <= 2  # eight images may look special by chance
    assert all(weighed((0.3, 0.6, 3.0)))
    assert all(weighed((3.0, 6.0, 30.0)))  # weights are small here, because so much is told apart


def test_the_mixture_minimises_its_losses() -> None:
    """No step within the bounds makes the losses smaller; the prior is the best weight that all pieces share."""
    patches = made_up(40, 12, shifts=(0.15, 0.2, 1.5))
    calibration = fitted(patches, unknown_rate=0.2)
    label = patches.defective.numpy()
    target, weight = np.where(label, 13 / 14, 1 / 42), np.where(label, 1.0, 12 / 40)
    columns_CE = np.array(evidence(patches))
    top_IJ = np.stack(
        [top_means(patches, columns_CE @ each.weights + each.bias) for each in calibration.pieces], axis=1
    )

    def loss(weights: np.ndarray, bias: float, pieces: np.ndarray = top_IJ) -> float:
        logit = pieces @ weights + bias
        return float(weight @ (np.logaddexp(0, logit) - target * logit))

    def check(value: float, moved: list[float]) -> None:
        assert all(each > value - 1e-6 for each in moved)

    shared = minimize(lambda x: loss(np.full(3, x[0]), x[1]), np.zeros(2), method="Nelder-Mead", tol=1e-10).x[0]
    found = voices(calibration)
    pieces_bias = sum(weight * piece.bias for weight, piece in zip(found, calibration.pieces, strict=True))
    bias = calibration.known_bias.item() - math.log(0.8) - pieces_bias

    def penalised(weights: np.ndarray, bias: float) -> float:
        return loss(weights, bias) + 5 * float(((weights - shared) ** 2).sum())

    steps = [step * row for step in (1e-2, -1e-2) for row in np.eye(4)]
    moved = [np.append(found, bias) + step for step in steps]
    check(penalised(found, bias), [penalised(each[:3].clip(0), each[3]) for each in moved])
    unfamiliar = calibration.pieces[0]
    alone = calibration.unknown_slope.item() / unfamiliar.weights[0]
    offset = calibration.unknown_offset.item() - math.log(0.2) - alone * unfamiliar.bias
    values = [
        loss(np.array([alone + dx]), offset + dy, top_IJ[:, :1])
        for dx, dy in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01))
    ]
    assert alone > 0.05
    check(loss(np.array([alone]), offset, top_IJ[:, :1]), values)


@pytest.mark.parametrize("defective", [0, 1])
@pytest.mark.parametrize("positive", [False, True])
def test_without_known_kinds_the_order_is_that_of_the_distance_to_normal(defective: int, positive: bool) -> None:
    patches = made_up(30, defective, positive=positive)
    calibration = fitted(patches)
    assert calibration.known_weights.tolist() == [0] * 6
    distances = top_means(patches, patches.log_negative[:, 0].exp().numpy())
    assert (np.argsort(calibration.training_probability.numpy()) == np.argsort(distances)).all()


def test_unfamiliar_patches_keep_a_voice_where_they_tell_nothing() -> None:
    patches = made_up(40, 12)
    patches.log_negative[patches.defective[patches.image]] -= 0.6  # defects look more normal than normal images
    calibration = fitted(patches)
    assert calibration.unknown_slope.item() == pytest.approx(0.05 * calibration.pieces[0].weights[0], rel=1e-4)


def test_the_more_defects_are_of_unknown_kinds_the_nearer_is_the_order_to_that_of_the_distance() -> None:
    patches = made_up(60, 20, shifts=(0.1, 0.5, 3.0))
    distances = top_means(patches, patches.log_negative[:, 0].exp().numpy())
    agreement = [
        spearmanr(fitted(patches, unknown_rate=rate).training_probability.numpy(), distances).statistic
        for rate in (0.001, 0.1, 0.5, 0.9, 0.999)
    ]
    assert (np.diff(agreement) >= 0).all()
    assert agreement[-1] > agreement[0] + 0.1


def test_few_images_leave_the_weights_of_the_pieces_nearly_equal() -> None:
    """The boundary tells most, distances nearly nothing: it takes images to find that out."""
    spread = []
    for defective in (2, 8, 40):
        found = voices(fitted(made_up(60, defective, shifts=(0.0, 0.1, 4.0))))
        spread.append(found.std() / found.mean())
    assert spread[0] < 0.25
    assert spread[0] < spread[1] < spread[2]


def test_a_strong_pull_makes_the_weights_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "_EQUAL_RIDGE", 1e7)
    found = voices(fitted(made_up(60, 40, shifts=(0.0, 0.1, 4.0))))
    np.testing.assert_allclose(found, found.mean(), rtol=1e-3)


def test_the_fit_is_deterministic_and_blind_to_the_order_of_images() -> None:
    patches = made_up(20, 6)
    order = torch.randperm(26, generator=torch.Generator().manual_seed(0))
    first, again, other = fitted(patches), fitted(patches), fitted(select(patches, order.tolist()))
    for name, value in first.named_buffers():
        assert torch.equal(value, again.get_buffer(name)), name
    torch.testing.assert_close(first.known_weights, other.known_weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.training_probability[order], other.training_probability, rtol=1e-3, atol=1e-6)


class TestSyntheticImages:
    def close(self, first: Calibration, second: Calibration) -> None:
        for name in ("known_weights", "known_bias", "unknown_slope", "unknown_offset", "slope", "offset"):
            torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=2e-3, atol=2e-3, msg=name)
        torch.testing.assert_close(first.training_probability, second.training_probability, rtol=2e-3, atol=1e-5)

    def test_they_count_by_their_weight(self) -> None:
        """Two copies of each at half the weight are as one of each at the whole."""
        patches = made_up(30, 6, 4)
        twice = select(patches, [*range(40), *range(36, 40)])
        self.close(fitted(patches, synthetic_weight=1.0), fitted(twice, synthetic_weight=0.5))

    def test_with_no_weight_they_might_as_well_not_be_there(self) -> None:
        patches = made_up(30, 6, 4)
        self.close(fitted(patches, synthetic_weight=0.0), fitted(select(patches, list(range(36)))))

    def test_at_the_whole_weight_they_are_learnt_from_as_real_ones(self) -> None:
        patches = made_up(30, 6, 4)
        synthetic, real = (
            fitted(patches, synthetic_weight=1.0),
            fitted(patches._replace(synthetic=torch.zeros(40).bool())),
        )
        assert torch.equal(synthetic.known_weights, real.known_weights)
        assert torch.equal(synthetic.training_probability, real.training_probability[:36])

    def test_more_weight_moves_the_score(self) -> None:
        patches = made_up(30, 3, 20)
        slopes = [float(fitted(patches, synthetic_weight=weight).slope) for weight in (0.0, 0.1, 1.0)]
        assert len(set(slopes)) == 3

    def test_below_the_whole_weight_they_need_a_real_defect(self) -> None:
        patches = made_up(30, 0, 20)
        assert fitted(patches, synthetic_weight=0.5).known_weights.tolist() == [0] * 6
        assert fitted(patches, synthetic_weight=1.0).known_weights.sum() > 0

    def test_thresholds_and_decisions_come_from_real_images(self) -> None:
        patches = made_up(30, 0, 20)
        calibration = Calibration(TOP)
        thresholds = calibration.fit(patches, 0.1, 0.1, 1.0)
        assert len(calibration.training_probability) == 30
        assert calibration.decisions(0.01, 0.05).defects == 0
        assert thresholds.image_threshold > calibration.training_probability.max()


class TestThresholds:
    def fit(self, *, overlap: bool) -> tuple[ImagePatches, Calibration, Thresholds]:
        patches = made_up(40, 15, 5, shifts=(0.05, 0.15, 1.0) if overlap else (0.3, 0.6, 3.0))
        calibration = Calibration(TOP)
        return patches, calibration, calibration.fit(patches, 0.1, 0.1, 0.3)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_no_other_threshold_on_images_has_a_better_f1_score(self, overlap: bool) -> None:
        _, calibration, thresholds = self.fit(overlap=overlap)
        probability, label = calibration.training_probability.numpy(), calibration.training_defective.numpy()
        weight = np.ones(len(label))
        best = max(f1(probability > low, label, weight) for low in [0, *probability])
        assert f1(probability > thresholds.image_threshold, label, weight) == pytest.approx(best)
        assert (best < 1) == overlap

    @pytest.mark.parametrize("overlap", [False, True])
    def test_no_other_threshold_on_pixels_has_a_better_f1_score(self, overlap: bool) -> None:
        """Of defective images the sample of their defect patches, of normal ones all patches kept."""
        patches, calibration, thresholds = self.fit(overlap=overlap)
        scores = log_odds(patch_scores(patches, calibration), calibration)
        score, label, weight = [], [], []
        for row, image in enumerate(patches.image.tolist()):
            sampled, defective = bool(patches.sampled[row]), bool(patches.defective[image])
            if bool(patches.synthetic[image]) or (defective and not sampled):
                continue
            score.append(scores[row])
            label.append(defective)
            weight.append((30 if defective else PATCHES) / SAMPLED if sampled else 1.0)
        value, truth, share = np.array(score), np.array(label), np.array(weight)
        best = max(f1(value > low, truth, share) for low in [-99, *value])
        assert f1(value > thresholds.pixel_threshold, truth, share) == pytest.approx(best, rel=1e-3)
        assert thresholds.pixel_min == pytest.approx(min(thresholds.pixel_min, value.min()), rel=1e-3)
        assert thresholds.pixel_max == pytest.approx(max(thresholds.pixel_max, value.max()), rel=1e-3)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_normalisation_clips_no_training_score_and_puts_the_threshold_at_one_half(self, overlap: bool) -> None:
        patches, calibration, thresholds = self.fit(overlap=overlap)
        pixels = torch.from_numpy(log_odds(patch_scores(patches, calibration), calibration)).float()
        synthetic, defective = (values[patches.image] for values in (patches.synthetic, patches.defective))
        for values, limits in (
            (calibration.training_probability, thresholds[:3]),
            (pixels[~synthetic & (~defective | patches.sampled)], thresholds[3:]),
        ):
            threshold, low, high = (torch.tensor(value) for value in limits)
            normalised = PostProcessor._normalize(values, low, high, threshold)  # noqa: SLF001  Anomalib's rule
            assert normalised is not None
            torch.testing.assert_close(normalised, (values - low) / (high - low), atol=1e-5, rtol=0)
            assert ((normalised > 0.5) == (values > threshold)).all()
            at_threshold = PostProcessor._normalize(threshold, low, high, threshold)  # noqa: SLF001
            assert at_threshold is not None
            assert at_threshold.item() == 0.5


def f1(found: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    return 2 * weight[found & label].sum() / (weight[found].sum() + weight[label].sum())


class TestSavedState:
    def test_what_was_learnt_is_restored(self) -> None:
        first, second = fitted(made_up(20, 6)), Calibration(TOP)
        assert not second.is_fitted
        second.load_state_dict(first.state_dict())
        assert second.is_fitted
        for name, value in first.named_buffers():
            assert torch.equal(value, second.get_buffer(name)), name
        assert second.decisions(0.01, 0.05) == first.decisions(0.01, 0.05)


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
