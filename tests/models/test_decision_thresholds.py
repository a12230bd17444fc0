"""What decisions promise: on the training images, by exchangeability, and with few defects by simulation."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, logit

from anomalib_exdd.models.exdd.decisions import Decisions, Thresholds, best_f1_threshold, decision_thresholds

probabilities = st.floats(2.0**-27, 1, width=32)  # no score gives lower ones: log-odds are bounded
rates = st.floats(0.01, 0.5)


class TestDecisionThresholds:
    @settings(deadline=None, max_examples=300)
    @given(st.lists(probabilities, min_size=1, max_size=80), st.lists(probabilities, max_size=80), rates, rates)
    @example([0.5] * 80, [0.5] * 80, 0.05, 0.05)
    @example([1.0] * 80, [1.0] * 80, 0.05, 0.05)
    def test_rates_hold_on_the_training_images(
        self, normal: list[float], defective: list[float], false_reject: float, false_accept: float
    ) -> None:
        good, bad = np.array(normal), np.array(defective)
        decisions = decision_thresholds(good, bad, false_reject, false_accept)
        assert decisions.accept <= decisions.reject
        assert (good >= decisions.reject).mean() <= false_reject
        if len(bad):
            assert (bad < decisions.accept).mean() <= false_accept
        assert decisions.reject_backed == ((len(good) + 1) * false_reject >= 1)
        assert decisions.accept_backed == (len(bad) > 0 and (len(bad) + 1) * false_accept >= 1)
        assert decisions.defects == len(bad)
        review = [decisions.name(value) == "review" for value in normal]
        assert decisions.review_share == pytest.approx(np.mean(review))

    def test_thresholds_are_order_statistics_where_images_are_enough(self) -> None:
        rng = np.random.default_rng(0)
        good, bad = (rng.random(count).astype(np.float32).astype(np.float64) for count in (199, 99))
        decisions = decision_thresholds(rng.permutation(good), rng.permutation(bad), 0.02, 0.05)
        assert decisions.accept == np.sort(bad)[4]
        assert decisions.reject == np.nextafter(np.float32(np.sort(good)[-4]), np.float32(2))

    def test_further_images_err_at_the_allowed_rates(self) -> None:
        """Exchangeability: a fresh image from the same source errs with at most the rate, at most 1/(n + 1) less."""
        rng = np.random.default_rng(0)
        rejected, accepted = [], []
        for _ in range(3000):
            good, bad = rng.random(41), 0.9 * rng.random(31)
            decisions = decision_thresholds(good[:-1], bad[:-1], 0.1, 0.2)
            assert decisions.accept_backed
            assert decisions.reject_backed
            rejected.append(good[-1] >= decisions.reject)
            accepted.append(bad[-1] < decisions.accept)
        assert np.mean(rejected) == pytest.approx(4 / 41, abs=0.02)
        assert np.mean(accepted) == pytest.approx(6 / 31, abs=0.025)

    @pytest.mark.parametrize("defects", [5, 12])
    @pytest.mark.parametrize(("good_spread", "most"), [(0.5, 0.1), (1.0, 0.07), (2.0, 0.07)])
    @pytest.mark.parametrize(
        "kind",
        [
            stats.norm(0, 1),
            stats.logistic(0, 3**0.5 / np.pi),
            stats.gumbel_l(0, 6**0.5 / np.pi),  # skewed: a long tail towards good images
            stats.gumbel_r(0, 6**0.5 / np.pi),
        ],
        ids=["normal", "logistic", "skewed low", "skewed high"],
    )
    def test_few_defects_are_passed_at_about_the_allowed_rate(
        self, kind: stats.rv_continuous, good_spread: float, most: float, defects: int
    ) -> None:
        """Allowed are 5 %, of five defects the lowest alone would give 17: whatever the shape of the distribution.

        Where good images spread half as much as defects, which the limit cannot know, it is up to twice the rate.
        """
        rng = np.random.default_rng(0)
        good = expit(np.append(rng.normal(2, good_spread, 200), 8))  # up to where no threshold meets the other
        realised = []
        for _ in range(200):
            bad = kind.rvs(defects, random_state=rng)
            decisions = decision_thresholds(good, expit(bad), 0.005, 0.05)
            assert not decisions.accept_backed
            assert decisions.accept < decisions.reject
            assert decisions.accept <= np.float32(expit(bad.min()))
            realised.append(kind.cdf(logit(decisions.accept)))
        assert np.mean(realised) < most

    def test_more_spread_among_few_defects_lowers_the_threshold(self) -> None:
        good = expit(np.random.default_rng(0).normal(0, 1, 300))
        accept = [
            decision_thresholds(good, expit(1 + spread * np.array([-1, 0, 1])), 0.01, 0.05).accept
            for spread in (0.1, 1, 3)
        ]
        assert accept[0] > accept[1] > accept[2]

    @pytest.mark.parametrize(("count", "rate"), [(99, 0.05), (40, 0.05), (19, 0.05), (500, 0.01), (7, 0.3)])
    def test_intervals_are_those_of_the_beta_distribution(self, count: int, rate: float) -> None:
        """The share below the r-th of n: Clopper and Pearson's limits for r and for r - 1 of n."""
        scores = (np.arange(count) + 0.5) / count
        decisions = decision_thresholds(scores, scores, rate, rate)
        rank = int((count + 1) * rate + 1e-9)
        low = stats.binomtest(rank, count).proportion_ci(0.9, "exact").low
        high = stats.binomtest(rank - 1, count).proportion_ci(0.9, "exact").high
        for found in (decisions.false_accepts, decisions.false_rejects):
            assert found == pytest.approx((low, high), abs=1e-9)

    def test_intervals_without_backing_go_from_zero_to_what_no_miss_is_compatible_with(self) -> None:
        decisions = decision_thresholds(np.linspace(0.1, 0.9, 30), np.linspace(0.2, 0.8, 7), 0.01, 0.05)
        for count, (low, high) in ((30, decisions.false_rejects), (7, decisions.false_accepts)):
            assert low == 0
            assert high == pytest.approx(stats.binomtest(0, count).proportion_ci(0.9, "exact").high)

    def test_intervals_cover_the_rates_at_their_confidence(self) -> None:
        rng = np.random.default_rng(0)
        inside = []
        for _ in range(1000):
            scores = rng.random(60)
            decisions = decision_thresholds(scores, 0.5 * scores, 0.05, 0.05)
            inside.append(decisions.false_accepts[0] <= 2 * decisions.accept <= decisions.false_accepts[1])
            inside.append(decisions.false_rejects[0] <= 1 - decisions.reject <= decisions.false_rejects[1])
        assert np.mean(inside) == pytest.approx(0.9, abs=0.03)

    def test_nothing_to_review_where_one_threshold_serves_both(self) -> None:
        decisions = decision_thresholds(np.linspace(0, 0.2, 99), np.linspace(0.8, 1, 99), 0.01, 0.05)
        assert decisions.accept == decisions.reject
        assert 0.2 < decisions.accept < 0.85
        assert decisions.review_share == 0

    def test_without_defects_there_is_one_threshold(self) -> None:
        decisions = decision_thresholds(np.linspace(0, 0.5, 199), np.empty(0), 0.01, 0.05)
        assert decisions.accept == decisions.reject
        assert decisions.reject_backed
        assert not decisions.accept_backed
        assert decisions.false_accepts == (0.0, 1.0)


class TestTexts:
    def test_names(self) -> None:
        decisions = decision_thresholds(np.linspace(0, 0.5, 99), np.linspace(0.3, 1, 99), 0.1, 0.05)
        middle = (decisions.accept + decisions.reject) / 2
        names = [decisions.name(value) for value in (0.0, decisions.accept, middle, decisions.reject, 1.0)]
        assert names == ["accept", "review", "review", "reject", "reject"]
        limits = f"(accept below {decisions.accept:.3f}, reject from {decisions.reject:.3f})"
        assert decisions.describe(0.9) == f"reject: probability 0.900 {limits}"

    def test_backed_rates_are_stated_with_their_intervals(self) -> None:
        decisions = Decisions(
            0.1,
            0.4,
            accept_backed=True,
            reject_backed=True,
            false_accepts=(0.012, 0.0345),
            false_rejects=(0.001, 0.02),
            review_share=0.125,
            defects=60,
        )
        assert str(decisions) == (
            "Decisions by the probability of a defect: accept below 0.100, reject from 0.400, review between, 12.5% of "
            "the good training images. At 90% confidence 0.1 to 2.0 % of further good images are rejected and 1.2 to "
            "3.5 % of further defective ones accepted, if they are like the training images: new kinds of defects, "
            "another lamp or camera are not covered."
        )

    def test_too_few_images_are_said(self) -> None:
        text = str(decision_thresholds(np.linspace(0, 0.5, 20), np.array([0.9]), 0.01, 0.05))
        assert "1 defective training images are too few to back the false-accept rate" in text
        assert "Too few normal training images back the false-reject rate" in text
        text = str(decision_thresholds(np.linspace(0, 0.5, 200), np.empty(0), 0.01, 0.05))
        assert "Without defective training images nothing backs a false-accept rate" in text
        assert "further defective ones" not in text
        assert "Too few" not in text


def f1_at(threshold: float, score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float:
    found = score > threshold
    return 2 * weight[found & label].sum() / (weight[found].sum() + weight[label].sum())


scored = st.lists(st.tuples(st.integers(-8, 8), st.booleans(), st.integers(1, 5)), min_size=1, max_size=30)


class TestBestF1Threshold:
    @settings(deadline=None, max_examples=300)
    @given(scored, st.sampled_from([0.25, 1.0, 3.7]))
    def test_no_other_threshold_is_better_and_none_as_good_is_nearer_to_even_odds(
        self, rows: list[tuple[int, bool, int]], unit: float
    ) -> None:
        score, label, weight = (np.array(column) for column in zip(*rows, strict=True))
        score = score * unit
        found = best_f1_threshold(score, label, weight.astype(float))
        if not label.any():
            assert found > score.max()
            assert found >= 0
            return
        levels = np.unique(score)
        below = np.append(levels[0] - 1, levels[:-1])
        best = max(f1_at(low, score, label, weight) for low in below)
        assert f1_at(found, score, label, weight) == pytest.approx(best)
        for low, high in zip(below, levels, strict=True):  # everything from `low` to `high` divides the scores alike
            if f1_at(low, score, label, weight) >= best - 1e-12:
                assert abs(found) <= max(low, 0.0, -high) + 0.01 * (high - low) + 1e-12

    def test_it_keeps_a_margin_to_the_scores(self) -> None:
        assert best_f1_threshold(np.array([2.0, 3, 5, 6]), np.array([0, 0, 1, 1], bool), np.ones(4)) == pytest.approx(
            3.02
        )
        assert best_f1_threshold(-np.array([2.0, 3, 5, 6]), np.array([1, 1, 0, 0], bool), np.ones(4)) == pytest.approx(
            -3.02
        )
        assert best_f1_threshold(np.array([-1.0, 3]), np.array([False, True]), np.ones(2)) == 0


log_odds = st.floats(-16, 16)


@given(st.floats(0, 1), log_odds, log_odds, log_odds)
def test_ranges_have_the_threshold_in_their_middle_and_all_scores_inside(
    image: float, pixel: float, first: float, second: float
) -> None:
    low, high = sorted((first, second))
    found = Thresholds.around(image, (0.0, 1.0), pixel, (low, high))
    assert (found.image_threshold, found.pixel_threshold) == (image, pixel)
    assert (found.image_min + found.image_max) / 2 == pytest.approx(image)
    assert (found.pixel_min + found.pixel_max) / 2 == pytest.approx(pixel, abs=1e-9)
    assert found.image_min <= 1e-12
    assert found.image_max >= 1 - 1e-12
    assert found.pixel_min <= low + 1e-12
    assert found.pixel_max >= high - 1e-12
