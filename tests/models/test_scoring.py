"""Every rule against an independent float64 computation, equation by equation."""

import math

import numpy as np
import pytest
import torch

from anomalib_exdd.models.exdd.memory_bank import BankContent, MemoryBank
from anomalib_exdd.models.exdd.scoring import (
    CERTAINTY,
    Coefficients,
    PatchDistances,
    bounded_log_odds,
    get_scoring,
    negative_weight,
    patchcore_weight,
    positive_weight,
    probability,
)
from anomalib_exdd.models.exdd.torch_model import ExDDModel

EPSILON = 1e-6
IMAGES, PATCHES, DIMENSION = 4, 12, 6
COEFFICIENTS = Coefficients(
    known_weights=torch.tensor([0.4, 2.0, 0.5, 1.5, 0.25, 0.6]),
    known_bias=torch.tensor(-0.75),
    unknown_slope=torch.tensor(0.8),
    unknown_offset=torch.tensor(-2.5),
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

    def known(self, patch: np.ndarray, boundary: float) -> float:
        """Return the evidence of a known kind: distance, log-distances to the first and third neighbours, boundary."""
        evidence = [self.nearest(patch, self.negative)[0]]
        for bank, sign in ((self.negative, 1), (self.positive, -1)):
            distances = sorted(math.dist(patch, entry) for entry in bank)
            evidence += [sign * math.log(distances[0]), sign * math.log(distances[2])]
        evidence.append(boundary)
        return float(COEFFICIENTS.known_weights.double().numpy() @ evidence) + COEFFICIENTS.known_bias.item()

    def unknown(self, patch: np.ndarray) -> float:
        distance = self.nearest(patch, self.negative)[0]
        return COEFFICIENTS.unknown_slope.item() * distance + COEFFICIENTS.unknown_offset.item()

    def calibrated_patch(self, patch: np.ndarray, boundary: float = 0.0) -> float:
        return float(np.logaddexp(self.known(patch, boundary), self.unknown(patch)))

    def calibrated_image(self, boundary_P: np.ndarray | None = None) -> float:
        boundary_P = np.zeros(PATCHES) if boundary_P is None else boundary_P
        scores = sorted(self.calibrated_patch(*each) for each in zip(self.patches, boundary_P, strict=True))
        mean = sum(scores[-3:]) / 3  # a fifth of 12 patches, rounded up
        return expit(bounded(COEFFICIENTS.slope.item() * mean + COEFFICIENTS.offset.item()))

    def normal_image(self) -> float:  # PatchCore, equation 7, as Anomalib computes it
        patch = self.farthest(self.negative)
        distance, entry = self.nearest(patch, self.negative)
        terms = [math.exp(math.dist(patch, self.negative[m])) for m in self.around(self.negative, entry)]
        return (1 - math.exp(distance) / sum(terms)) * distance


def expit(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def bounded(value: float) -> float:
    """Return log-odds of which what is beyond 6 counts by the logarithm of one more than it."""
    return value if abs(value) <= 6 else math.copysign(6 + math.log(1 + abs(value) - 6), value)


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


def test_the_learnt_boundary_adds_to_the_evidence_of_known_kinds() -> None:
    rng = np.random.default_rng(1)
    patches = rng.normal(size=(IMAGES, PATCHES, DIMENSION)).astype(np.float32)
    negative, positive = (rng.normal(size=(count, DIMENSION)).astype(np.float32) for count in (30, 11))
    boundary_BP = rng.normal(0, 4, (IMAGES, PATCHES)).astype(np.float32)
    rule = get_scoring("calibrated", COEFFICIENTS, torch.from_numpy(boundary_BP))
    distances = [
        bank(each, 1).distances(torch.from_numpy(patches), neighborhood=False, num_ranked=rule.num_ranked)
        for each in (negative, positive)
    ]
    patch_scores, image_scores = rule.patch(*distances), rule.image(*distances)
    for image in range(IMAGES):
        oracle = Oracle(*(values.astype(float) for values in (patches[image], negative, positive)), k=1)
        values = boundary_BP[image].astype(float)
        expected = [oracle.calibrated_patch(*each) for each in zip(oracle.patches, values, strict=True)]
        np.testing.assert_allclose(patch_scores[image].numpy(), expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(image_scores[image].item(), oracle.calibrated_image(values), rtol=2e-5)


@pytest.mark.parametrize("bias", [-1e4, -30.0, -2.0, 0.0, 2.0, 30.0, 1e4])
def test_the_mixture_is_finite_and_right_however_far_apart_its_parts_are(bias: float) -> None:
    generator = torch.Generator().manual_seed(0)
    distances = [
        PatchDistances(ranked[..., 0], None, 8, ranked) for ranked in torch.rand(2, 1, 50, 3, generator=generator)
    ]
    found = get_scoring("calibrated", COEFFICIENTS._replace(known_bias=torch.tensor(bias))).patch(*distances)
    (near, far), weights = (each.ranked.double().numpy()[0] for each in distances), COEFFICIENTS.known_weights.numpy()
    known = (
        weights[0] * near[:, 0] + np.log(near[:, [0, 2]]) @ weights[1:3] - np.log(far[:, [0, 2]]) @ weights[3:5] + bias
    )
    unknown = COEFFICIENTS.unknown_slope.item() * near[:, 0] + COEFFICIENTS.unknown_offset.item()
    np.testing.assert_allclose(found[0].numpy(), np.logaddexp(known, unknown), rtol=1e-5, atol=1e-5)


def test_without_known_defects_patches_are_ranked_by_their_distance_to_normal() -> None:
    nearest = torch.linspace(0, 9, 12).reshape(1, 12)
    rule = get_scoring("calibrated", COEFFICIENTS)
    negative = PatchDistances(nearest, None, 4, nearest[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(rule.patch(negative, None), 0.8 * nearest - 2.5)
    mean = float(0.8 * nearest[0, -3:].double().mean() - 2.5)
    assert rule.image(negative, None).item() == pytest.approx(expit(bounded(1.1 * mean - 2)), rel=1e-5)


@pytest.mark.parametrize("name", ["calibrated", "normal", "paper", "published", "ratio"])
def test_the_map_shows_probabilities_or_the_scores_themselves(name: str) -> None:
    patch_scores = torch.linspace(-40, 40, 12).reshape(1, 3, 4)
    shown = get_scoring(name, COEFFICIENTS).map_values(patch_scores)
    if name == "calibrated":  # what an image of nothing but such patches would score
        expected = [expit(bounded(1.1 * score - 2)) for score in patch_scores.double().flatten().tolist()]
        np.testing.assert_allclose(shown.flatten().numpy(), expected, rtol=1e-5)
    else:
        torch.testing.assert_close(shown, patch_scores, rtol=0, atol=0)


class TestBoundedLogOdds:
    def test_they_are_as_they_are_inside(self) -> None:
        values = torch.linspace(-CERTAINTY, CERTAINTY, 101)
        assert torch.equal(bounded_log_odds(values), values)

    def test_they_are_odd_continuous_and_grow_by_the_logarithm_beyond(self) -> None:
        values = torch.linspace(-50, 50, 4001, dtype=torch.float64)
        found = bounded_log_odds(values)
        np.testing.assert_allclose(found.numpy(), [bounded(value) for value in values.tolist()], rtol=1e-12)
        assert torch.equal(bounded_log_odds(-values), -found)
        step = float(values[1] - values[0])
        assert float(found.diff().max()) <= step + 1e-12  # no jump, at the bounds neither
        assert float(found.diff().min()) > 0

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_the_order_survives_in_float32(self, sign: int) -> None:
        """Where a plain sigmoid is 1 from log-odds of 17 on: scores up to 10 000, a third apart."""
        scores = torch.cat([torch.arange(0, 12, 0.01), 12 * 1.33 ** torch.arange(0, 24)])
        assert scores[-1] > 8000
        coefficients = COEFFICIENTS._replace(slope=torch.tensor(1.0), offset=torch.tensor(0.0))
        found = sign * probability(sign * scores, coefficients)
        assert (found.diff() > 0).all()
        every = probability(torch.arange(-1e4, 1e4, 0.5), coefficients)
        assert (every.diff() >= 0).all()
        assert 0 < float(every[0]) < float(every[-1]) < 1


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
        (negative_weight, False): falling[1:].sum() / falling.sum(),
        (positive_weight, False): 1 / falling.sum(),
        (negative_weight, True): (rising[1:].sum() - 1) / rising[1:].sum(),
        (positive_weight, True): 1 / rising[1:].sum(),
    }
    for (weight, published), expected in weights.items():
        found = weight(distances, published=published).item()
        assert found == pytest.approx(expected, rel=1e-5), (weight.__name__, published)


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
    for other in scores[1:]:
        assert torch.equal(other.patches, scores[0].patches)
        assert torch.equal(other.images, scores[0].images)
