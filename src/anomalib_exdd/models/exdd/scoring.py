"""Scores as pure functions of distances to the two banks.

Every rule turns the distances of an image's patches into patch scores and one image score, the higher the more
defective. Equation numbers are those of Aqeel, Leonardi & Setti, "ExDD", arXiv:2507.15335.

Shape suffixes: B images, P patches of an image, K neighbours in the bank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

EPSILON = 1e-6
"""Keeps a ratio finite where a patch equals an entry of the positive bank (published code; "small" in the paper)."""

CALIBRATED_NEIGHBORS = (1, 3)  # the calibrated score looks at the first and the third nearest entry of each bank

EVIDENCE = ("d_N,1", "log d_N,1", "log d_N,3", "-log d_P,1", "-log d_P,3", "boundary")
"""What the calibrated score weighs: distances to both banks, and the log-odds of the learnt boundary."""

CERTAINTY = 6.0
"""Log-odds beyond which they grow with the logarithm only: no training set backs more certainty than 1 in 400."""

ScoringName = Literal["calibrated", "paper", "published", "normal", "ratio"]


class PatchDistances(NamedTuple):
    """Distances of patches to one bank, whose entry m* is the nearest to a patch."""

    nearest: Tensor  # distance to m*, float32, shape (B, P)
    neighborhood: Tensor | None  # to the K entries nearest to m* *in the bank*, m* itself first, (B, P, K), if wanted
    dimension: int  # of the features, d
    ranked: Tensor | None = None  # to the N entries nearest to the *patch*, nearest first, (B, P, N), if wanted
    entry: Tensor | None = None  # row of m* in the bank, int64, (B, P)


class Coefficients(NamedTuple):
    """What the calibrated score has learnt from the training images; see :mod:`.calibration`."""

    known_weights: Tensor  # of EVIDENCE for defects of known kinds, all >= 0, shape (6,)
    known_bias: Tensor  # added to it, the log of their share included, shape ()
    unknown_slope: Tensor  # weight of the distance to normal for defects of unknown kinds, > 0, shape ()
    unknown_offset: Tensor  # added to it, the log of their share included, shape ()
    slope: Tensor  # from the image score to the log-odds that the image is defective, > 0, shape ()
    offset: Tensor  # added to it, shape ()
    top_fraction: float  # share of an image's patches that make its score


def _identity(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class ScoringRule:
    """A named way to score patches and images from the distances to the negative and to the positive bank."""

    patch: Callable[..., Tensor]  # the map's scores, (B, P), from `PatchDistances` to the negative and positive bank
    image: Callable[..., Tensor]  # the same of images, (B,)
    needs_positive: bool = True
    patch_neighborhood: bool = False  # whether `patch` needs `PatchDistances.neighborhood`
    image_neighborhood: bool = False
    num_ranked: int = 1  # entries in `PatchDistances.ranked`
    map_values: Callable[[Tensor], Tensor] = _identity  # from patch scores to the map before smoothing, in their order
    smoothed_values: Callable[[Tensor], Tensor] = _identity  # from the smoothed map to the returned one, in its order


def top_mean(patch_scores: Tensor, fraction: float) -> Tensor:
    """Average the highest patch scores of an image: shape (B, P) to (B,)."""
    return patch_scores.topk(top_count(patch_scores.shape[-1], fraction), dim=-1).values.mean(dim=-1)


def top_count(patches: int, fraction: float) -> int:
    """Return how many of an image's patches make its score: their share, rounded up."""
    return min(patches, max(1, math.ceil(fraction * patches)))


def calibrated_patch(
    negative: PatchDistances, positive: PatchDistances | None, coefficients: Coefficients, boundary_BP: Tensor | None
) -> Tensor:
    """Score a patch by its log-likelihood ratio against a mixture of known and unknown kinds of defects.

    By k-nearest-neighbour density estimates, the log of a likelihood ratio is a weighted difference of log-distances
    (Wang, Kulkarni & Verdu, IEEE TIT 55(5), 2009); the learnt boundary adds what neighbours miss. Of unknown kinds it
    is only known that they are far from normal. Without a positive bank there is no known kind.
    """
    unknown = negative.nearest * coefficients.unknown_slope + coefficients.unknown_offset
    if positive is None:
        return unknown
    weights = coefficients.known_weights
    logs = torch.cat([_log_ranked(negative), -_log_ranked(positive)], dim=-1)
    known = negative.nearest * weights[0] + logs @ weights[1:5] + coefficients.known_bias
    if boundary_BP is not None:
        known = known + boundary_BP * weights[5]
    return unknown + F.softplus(known - unknown)


def _log_ranked(distances: PatchDistances) -> Tensor:
    """Return the log-distances to the entries that the calibrated score looks at, shape (B, P, 2)."""
    ranked = cast("Tensor", distances.ranked)
    chosen = torch.stack([ranked[..., k - 1] for k in CALIBRATED_NEIGHBORS], dim=-1)
    return chosen.clamp_min(EPSILON).log()


def calibrated_image(
    negative: PatchDistances, positive: PatchDistances | None, coefficients: Coefficients, boundary_BP: Tensor | None
) -> Tensor:
    """Score an image by its probability of being defective, from the mean of its highest patch scores."""
    patch_scores = calibrated_patch(negative, positive, coefficients, boundary_BP)
    return probability(top_mean(patch_scores, coefficients.top_fraction), coefficients)


def probability(score: Tensor, coefficients: Coefficients) -> Tensor:
    """Return how likely an image is defective whose highest patches score so, on average."""
    return torch.sigmoid(bounded_log_odds(coefficients.slope * score + coefficients.offset))


def bounded_log_odds(values: Tensor) -> Tensor:
    """Let log-odds grow with the logarithm only beyond :data:`CERTAINTY`, so that the order survives in a sigmoid."""
    inside = values.clamp(-CERTAINTY, CERTAINTY)
    beyond = values - inside
    return inside + beyond.sign() * beyond.abs().log1p()


def log_odds(probabilities: Tensor) -> Tensor:
    """Return the log-odds of probabilities, which are kept :data:`EPSILON` away from 0 and 1.

    Of probabilities, mostly near 0 with a high threshold, Anomalib's normalisation would clip most of the map.
    """
    inside = probabilities.clamp(EPSILON, 1 - EPSILON)
    return inside.log() - (1 - inside).log()


def negative_weight(distances: PatchDistances, *, published: bool = False) -> Tensor:
    """Compute w_N of equation 16: ``1 - exp(-s/sqrt(d)) / sum over N_b(m*) of exp(-dist/sqrt(d))``.

    With ``published`` as the published code does: positive exponents, m* itself left out of the sum. The weights, shape
    (B, P), are 1 if the neighbourhood is m* alone, where the equation would always give 0.
    """
    around = cast("Tensor", distances.neighborhood)
    if around.shape[-1] < 2:
        return torch.ones_like(distances.nearest)
    return -torch.expm1(_log_share(around, distances.dimension, published=published))


def positive_weight(distances: PatchDistances, *, published: bool = False) -> Tensor:
    """Compute w_P of equation 17: ``exp(-s/sqrt(d)) / sum over N_b(m+) of exp(-dist/sqrt(d))``, shape (B, P)."""
    around = cast("Tensor", distances.neighborhood)
    if around.shape[-1] < 2:
        return torch.ones_like(distances.nearest)
    return torch.exp(_log_share(around, distances.dimension, published=published))


def _log_share(neighborhood: Tensor, dimension: int, *, published: bool) -> Tensor:
    """Compute the logarithm of a share from differences of distances, which keep the digits of shares near 1."""
    sign = 1.0 if published else -1.0
    others = torch.logsumexp(sign * (neighborhood[..., 1:] - neighborhood[..., :1]) / dimension**0.5, dim=-1)
    return -others if published else -F.softplus(others)


def patchcore_weight(distances: PatchDistances) -> Tensor:
    """Compute PatchCore's weight (Roth et al., CVPR 2022, equation 7): one minus a softmax over the neighbourhood.

    Shape (B, P); 1 if the neighbourhood is m* alone, as Anomalib's ``Patchcore`` does.
    """
    around = cast("Tensor", distances.neighborhood)
    if around.shape[-1] < 2:
        return torch.ones_like(distances.nearest)
    return 1 - torch.softmax(around, dim=-1)[..., 0]


def normal_patch(negative: PatchDistances, _: PatchDistances | None) -> Tensor:
    """Score a patch by its distance to the negative bank alone (equation 21)."""
    return negative.nearest


def normal_image(negative: PatchDistances, _: PatchDistances | None) -> Tensor:
    """Score an image by its least normal patch, with PatchCore's weight."""
    return _at_farthest(negative, patchcore_weight(negative))


def ratio_patch(negative: PatchDistances, positive: PatchDistances) -> Tensor:
    """Score a patch by the unweighted ratio of its two distances, ``d_N / (d_P + eps)``."""
    return negative.nearest / (positive.nearest + EPSILON)


def ratio_image(negative: PatchDistances, positive: PatchDistances) -> Tensor:
    """Score an image by its largest patch ratio: one patch for both distances."""
    return ratio_patch(negative, positive).amax(dim=1)


def paper_patch(negative: PatchDistances, positive: PatchDistances) -> Tensor:
    """Score a patch by the ratio of its weighted distances (equations 21-23)."""
    weighted_positive = positive_weight(positive) * positive.nearest
    return negative_weight(negative) * negative.nearest / (weighted_positive + EPSILON)


def paper_image(negative: PatchDistances, positive: PatchDistances, *, published: bool = False) -> Tensor:
    """Score an image by equations 12-20, or with the published weights: each distance is from its own patch."""
    score_negative = _at_farthest(negative, negative_weight(negative, published=published))
    score_positive = _at_farthest(positive, positive_weight(positive, published=published))
    return score_negative / (score_positive + EPSILON)


def _at_farthest(distances: PatchDistances, weight: Tensor) -> Tensor:
    """Take every image's weighted distance at the patch that is farthest from the bank (equations 12 and 14)."""
    farthest = distances.nearest.argmax(dim=1, keepdim=True)
    return (weight * distances.nearest).gather(1, farthest).squeeze(1)


_RULES: dict[str, ScoringRule] = {
    "normal": ScoringRule(normal_patch, normal_image, needs_positive=False, image_neighborhood=True),
    "paper": ScoringRule(paper_patch, paper_image, patch_neighborhood=True, image_neighborhood=True),
    "published": ScoringRule(ratio_patch, partial(paper_image, published=True), image_neighborhood=True),
    "ratio": ScoringRule(ratio_patch, ratio_image),
}


def get_scoring(name: str, coefficients: Coefficients | None = None, boundary_BP: Tensor | None = None) -> ScoringRule:
    """Look a scoring rule up by name.

    Args:
        name: The rule.
        coefficients: What "calibrated" has learnt; the others need none.
        boundary_BP: Log-odds of the learnt boundary for the patches that "calibrated" scores, if there is one.
    """
    if name != "calibrated" or coefficients is None:
        return _RULES[name]
    return ScoringRule(
        partial(calibrated_patch, coefficients=coefficients, boundary_BP=boundary_BP),
        partial(calibrated_image, coefficients=coefficients, boundary_BP=boundary_BP),
        num_ranked=max(CALIBRATED_NEIGHBORS),
        map_values=partial(probability, coefficients=coefficients),
        smoothed_values=log_odds,
    )
