"""Every rule against an independent float64 computation, equation by equation."""

import math

import numpy as np
import pytest
import torch

from anomalib_exdd.models.exdd.memory_bank import BankContent, MemoryBank
from anomalib_exdd.models.exdd.scoring import (
    Coefficients,
    PatchDistances,
    get_scoring,
    paper_negative_weight,
    paper_positive_weight,
    patchcore_weight,
    published_negative_weight,
    published_positive_weight,
)
from anomalib_exdd.models.exdd.torch_model import ExDDModel

EPSILON = 1e-6
IMAGES, PATCHES, DIMENSION = 4, 12, 6
COEFFICIENTS = Coefficients(
    weights=torch.tensor([2.0, 0.5, 1.5, 0.25]),
    bias=torch.tensor(0.75),
    reference=torch.tensor([1.0, 1.2]),
    slope=torch.tensor(1.1),
    offset=torch.tensor(-2.0),
    top_fraction=0.2,
)


class Oracle:
    """The paper's quantities for one image, written out with loops in float64."""

    def __init__(self, patches: np.ndarray, negative: np.ndarray, positive: np.ndarray, k: int) -> None:
        self.patches, self.negative, self.positive, self.k = patches, negative, positive, k
        self.root = math.sqrt(patches.shape[1])

    def nearest(self, patch: np.ndarray, bank: np.ndarray) -> tuple[float, int]:
        distances = [math.dist(patch, entry) for entry in bank]
        return min(distances), int(np.argmin(distances))

    def around(self, bank: np.ndarray, entry: int) -> list[int]:
        """Return N_b(m*): the k entries nearest to an entry in its bank, itself included."""
        order = sorted(range(len(bank)), key=lambda other: (other != entry, math.dist(bank[entry], bank[other])))
        return order[: self.k]

    def paper_weights(self, patch: np.ndarray, bank: np.ndarray) -> float:
        """Return the share that equations 16 and 17 have in common."""
        distance, entry = self.nearest(patch, bank)
        total = sum(math.exp(-math.dist(patch, bank[m]) / self.root) for m in self.around(bank, entry))
        return math.exp(-distance / self.root) / total

    def published_weights(self, patch: np.ndarray, bank: np.ndarray) -> float:
        distance, entry = self.nearest(patch, bank)
        others = [m for m in self.around(bank, entry) if m != entry]
        total = sum(math.exp(math.dist(patch, bank[m]) / self.root) for m in others)
        return math.exp(distance / self.root) / total

    def farthest(self, bank: np.ndarray) -> np.ndarray:
        """Return the patch of equations 12 and 14."""
        return max(self.patches, key=lambda patch: self.nearest(patch, bank)[0])

    def two_patch_ratio(self, share: str) -> float:
        weights = getattr(self, share)
        least_normal, least_defective = self.farthest(self.negative), self.farthest(self.positive)
        score_negative = (1 - weights(least_normal, self.negative)) * self.nearest(least_normal, self.negative)[0]
        score_positive = weights(least_defective, self.positive) * self.nearest(least_defective, self.positive)[0]
        return score_negative / (score_positive + EPSILON)

    def paper_image(self) -> float:  # equations 12-20
        return self.two_patch_ratio("paper_weights")

    def published_image(self) -> float:
        return self.two_patch_ratio("published_weights")

    def paper_patch(self, patch: np.ndarray) -> float:  # equations 21-23
        negative = (1 - self.paper_weights(patch, self.negative)) * self.nearest(patch, self.negative)[0]
        positive = self.paper_weights(patch, self.positive) * self.nearest(patch, self.positive)[0]
        return negative / (positive + EPSILON)

    def ratio_patch(self, patch: np.ndarray) -> float:
        return self.nearest(patch, self.negative)[0] / (self.nearest(patch, self.positive)[0] + EPSILON)

    published_patch = ratio_patch

    def ratio_image(self) -> float:
        return max(self.ratio_patch(patch) for patch in self.patches)

    def normal_patch(self, patch: np.ndarray) -> float:
        return self.nearest(patch, self.negative)[0]

    def calibrated_patch(self, patch: np.ndarray) -> float:
        """Weigh the log-distances to the first and third neighbours; far defects count for a quarter."""
        logs = [
            [math.log(sorted(math.dist(patch, entry) for entry in bank)[i]) for i in (0, 2)]
            for bank in (self.negative, self.positive)
        ]
        score = COEFFICIENTS.bias.item()
        for weight, log in zip(COEFFICIENTS.weights[:2].tolist(), logs[0], strict=True):
            score += weight * log
        for weight, log, usual in zip(
            COEFFICIENTS.weights[2:].tolist(), logs[1], COEFFICIENTS.reference.tolist(), strict=True
        ):
            score -= weight * (log if log < usual else usual + 0.25 * (log - usual))
        return score

    def calibrated_image(self) -> float:
        scores = sorted(self.calibrated_patch(patch) for patch in self.patches)
        mean = sum(scores[-3:]) / 3  # a fifth of 12 patches, rounded up
        return 1 / (1 + math.exp(-COEFFICIENTS.slope.item() * mean - COEFFICIENTS.offset.item()))

    def normal_image(self) -> float:  # PatchCore, equation 7, as Anomalib computes it
        patch = self.farthest(self.negative)
        distance, entry = self.nearest(patch, self.negative)
        terms = [math.exp(math.dist(patch, self.negative[m])) for m in self.around(self.negative, entry)]
        return (1 - math.exp(distance) / sum(terms)) * distance


def bank(features: np.ndarray, k: int) -> MemoryBank:
    memory = MemoryBank(num_neighbors=k, search="torch")
    count = len(features)
    content = BankContent(torch.from_numpy(features), torch.zeros(count).long(), torch.zeros(count, 2).long(), ["a"])
    memory.fill(content)
    return memory


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("name", ["calibrated", "normal", "paper", "published", "ratio"])
def test_rule_matches_its_equations(name: str, k: int) -> None:
    rng = np.random.default_rng(k)
    patches = rng.normal(size=(IMAGES, PATCHES, DIMENSION)).astype(np.float32)
    negative = rng.normal(size=(30, DIMENSION)).astype(np.float32)
    positive = (rng.normal(size=(11, DIMENSION)) + 1).astype(np.float32)
    rule = get_scoring(name, COEFFICIENTS)
    query = torch.from_numpy(patches)
    distances = [
        bank(features, k).distances(query, neighborhood=True, num_ranked=rule.num_ranked)
        for features in (negative, positive)
    ]
    patch_scores, image_scores = rule.patch(*distances), rule.image(*distances)
    for image in range(IMAGES):
        oracle = Oracle(*(values.astype(float) for values in (patches[image], negative, positive)), k=k)
        expected = [getattr(oracle, f"{name}_patch")(patch) for patch in oracle.patches]
        np.testing.assert_allclose(patch_scores[image].numpy(), expected, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(image_scores[image].item(), getattr(oracle, f"{name}_image")(), rtol=2e-5)


@pytest.mark.parametrize("name", ["calibrated", "normal", "paper", "published", "ratio"])
def test_the_map_shows_probabilities_or_the_scores_themselves(name: str) -> None:
    patch_scores = torch.linspace(-40, 40, 12).reshape(1, 3, 4)
    shown = get_scoring(name, COEFFICIENTS).map_values(patch_scores)
    if name == "calibrated":  # what an image of nothing but such patches would score
        logit = COEFFICIENTS.slope.double() * patch_scores.double() + COEFFICIENTS.offset.double()
        torch.testing.assert_close(shown.double(), 1 / (1 + torch.exp(-logit)), rtol=1e-5, atol=1e-12)
    else:
        torch.testing.assert_close(shown, patch_scores, rtol=0, atol=0)


def test_smoothed_probabilities_are_returned_as_log_odds() -> None:
    smoothed = torch.tensor([0.0, 1e-4, 0.02, 0.5, 0.9, 1.0])
    found = get_scoring("calibrated", COEFFICIENTS).smoothed_values(smoothed)
    assert torch.isfinite(found).all()
    assert (found.diff() > 0).all()
    torch.testing.assert_close(found[1:5].sigmoid(), smoothed[1:5])
    assert torch.equal(get_scoring("normal").smoothed_values(smoothed), smoothed)


@pytest.mark.parametrize("name", ["normal", "paper", "published", "ratio"])
def test_banks_smaller_than_the_neighbourhood(name: str) -> None:
    """One entry has no neighbourhood: weights are 1, so that the distances alone decide and nothing is lost."""
    patches = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    distances = [
        bank(np.full((1, 3), value, np.float32), 3).distances(patches, neighborhood=True) for value in (0.0, 2.0)
    ]
    rule = get_scoring(name)
    nearest_negative, nearest_positive = (found.nearest for found in distances)
    if name == "normal":
        expected, expected_image = nearest_negative, nearest_negative.amax(1)
    else:
        expected = nearest_negative / (nearest_positive + EPSILON)
        expected_image = expected.amax(1) if name == "ratio" else nearest_negative.amax(1) / nearest_positive.amax(1)
    torch.testing.assert_close(rule.patch(*distances), expected)
    torch.testing.assert_close(rule.image(*distances), expected_image, rtol=1e-5, atol=0)


def test_weights_do_not_overflow_far_away() -> None:
    far = PatchDistances(torch.full((1, 1), 1e5), torch.tensor([[[1e5, 1.1e5, 1.2e5]]]), 4)
    for name in ("paper", "published", "normal"):
        score = get_scoring(name).image(far, far)
        assert torch.isfinite(score).all()
    assert patchcore_weight(far).item() == pytest.approx(1.0)


@pytest.mark.parametrize("norm", [1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("gap", [0.01, 1.0, 12.0, 25.0])
def test_weights_keep_their_digits_whatever_the_norm_of_the_features(norm: float, gap: float) -> None:
    dimension = 64
    neighborhood = torch.tensor([[[norm, norm + 8 * gap, norm + 8 * gap + 1]]])  # float32, as the search returns them
    distances = PatchDistances(neighborhood[..., 0], neighborhood, dimension)
    scaled = (neighborhood.double().numpy()[0, 0] - neighborhood[0, 0, 0].double().item()) / dimension**0.5
    falling, rising = np.exp(-scaled), np.exp(scaled)  # both sides of the fractions divided by the same number
    weights = {
        paper_negative_weight: falling[1:].sum() / falling.sum(),
        paper_positive_weight: 1 / falling.sum(),
        published_negative_weight: (rising[1:].sum() - 1) / rising[1:].sum(),
        published_positive_weight: 1 / rising[1:].sum(),
    }
    for weight, expected in weights.items():
        assert weight(distances).item() == pytest.approx(expected, rel=1e-5), weight.__name__


def test_missing_pieces_are_named() -> None:
    distances = PatchDistances(torch.ones(1, 2), None, 4)
    with pytest.raises(ValueError, match="neighbourhood, but they were not computed"):
        get_scoring("paper").image(distances, distances)
    with pytest.raises(ValueError, match="needs distances to a positive bank"):
        get_scoring("ratio").patch(distances, None)
    with pytest.raises(ValueError, match="has to be one of"):
        get_scoring("best")
    with pytest.raises(ValueError, match="needs its coefficients"):
        get_scoring("calibrated")
    with pytest.raises(ValueError, match="only the nearest was searched"):
        get_scoring("calibrated", COEFFICIENTS).patch(distances, None)


def test_a_bank_with_fewer_entries_repeats_its_last_distance() -> None:
    found = bank(np.array([[0.0], [3.0]], np.float32), 3).distances(
        torch.tensor([[[1.0]]]), neighborhood=False, num_ranked=3
    )
    assert found.ranked is not None
    assert found.ranked.tolist() == [[[1.0, 2.0, 2.0]]]


def test_a_patch_that_is_a_known_defect_scores_finite_and_high() -> None:
    entry = np.ones((4, 3), np.float32) * np.arange(1, 5, dtype=np.float32)[:, None]
    known = torch.from_numpy(entry[None, :1])
    negative = bank(-entry, 3).distances(known, neighborhood=True)
    positive = bank(entry, 3).distances(known, neighborhood=True)
    score = get_scoring("ratio").patch(negative, positive)
    assert torch.isfinite(score).all()
    assert score.item() == pytest.approx(negative.nearest.item() / EPSILON, rel=1e-4)


def test_without_positive_bank_every_scoring_is_normal() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 384)).astype(np.float32)
    patches = torch.from_numpy(rng.normal(size=(2, 9, 384)).astype(np.float32))
    scores = []
    for scoring in ("normal", "paper", "published", "ratio"):
        model = ExDDModel("resnet18", ["layer2", "layer3"], pre_trained=False, scoring=scoring, image_scoring=scoring)
        model.negative_bank = bank(features, 3)
        scores.append(model.score(patches))
    for patch_scores, image_scores in scores[1:]:
        assert torch.equal(patch_scores, scores[0][0])
        assert torch.equal(image_scores, scores[0][1])
