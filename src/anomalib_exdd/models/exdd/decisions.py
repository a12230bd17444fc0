"""What the probability of a defect means for an image: accept, review or reject, and how sure the error rates are."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import beta
from scipy.stats import t as student

from anomalib_exdd.models.regions import Reason

Floats = NDArray[np.float64]

_CONFIDENCE = 0.9  # of the intervals of the error rates
_PRIOR_IMAGES = 1  # how many images the good images' spread counts for in that of few defective ones
_EPSILON = 1e-9  # distance that probabilities are kept from 0 and 1


class Decisions(NamedTuple):
    """Two thresholds on the probability."""

    accept: float  # images below it are good
    reject: float  # images at or above it are defective; those between the two are for review
    accept_backed: bool  # whether there are enough defective training images to back the false-accept rate
    reject_backed: bool  # whether there are enough normal ones to back the false-reject rate
    false_accepts: tuple[float, float] = (0.0, 1.0)  # interval of the false-accept rate, at 90 % confidence
    false_rejects: tuple[float, float] = (0.0, 1.0)  # the same of the false-reject rate
    review_share: float = 0.0  # of the good training images
    defects: int = 0  # defective training images that the thresholds come from

    def name(self, probability: float) -> str:
        """Return "accept", "review" or "reject"."""
        if probability >= self.reject:
            return "reject"
        return "accept" if probability < self.accept else "review"

    def describe(self, probability: float, reason: Reason | None = None) -> str:
        """Return the decision on an image, what it stands on and, if there is one, its reason, in one line."""
        limits = f"accept below {self.accept:.3f}, reject from {self.reject:.3f}"
        line = f"{self.name(probability)}: probability {probability:.3f} ({limits})"
        return line if reason is None else f"{line}; {reason}"

    def __str__(self) -> str:
        """State the thresholds and how far they can be trusted."""
        limits = f"accept below {self.accept:.3f}, reject from {self.reject:.3f}, review between"
        parts = [
            f"Decisions by the probability of a defect: {limits}, {self.review_share:.1%} of the good training images.",
            f"At {_CONFIDENCE:.0%} confidence {_interval(self.false_rejects)} of further good images are rejected"
            + (f" and {_interval(self.false_accepts)} of further defective ones accepted," if self.defects else ",")
            + " if they are like the training images: new kinds of defects, another lamp or camera are not covered.",
        ]
        if not self.accept_backed:
            parts.append(
                f"{self.defects} defective training images are too few to back the false-accept rate: `accept` is "
                "extrapolated from them, and more images are for review."
                if self.defects
                else "Without defective training images nothing backs a false-accept rate: `accept` equals `reject`."
            )
        if not self.reject_backed:
            parts.append("Too few normal training images back the false-reject rate: `reject` is extrapolated.")
        return " ".join(parts)


def _interval(rates: tuple[float, float]) -> str:
    return f"{100 * rates[0]:.1f} to {100 * rates[1]:.1f} %"


class Thresholds(NamedTuple):
    """Thresholds and ranges of Anomalib's post-processor, for images and for pixels."""

    image_threshold: float
    image_min: float
    image_max: float
    pixel_threshold: float
    pixel_min: float
    pixel_max: float

    @classmethod
    def around(
        cls, image: float, image_range: tuple[float, float], pixel: float, pixel_range: tuple[float, float]
    ) -> "Thresholds":
        """Make ranges with the thresholds in their middle: Anomalib's normalisation then clips nothing inside them."""
        found = []
        for threshold, (low, high) in ((image, image_range), (pixel, pixel_range)):
            reach = max(threshold - low, high - threshold, 1e-3)
            found += [threshold, threshold - reach, threshold + reach]
        return cls(*found)


def best_f1_threshold(log_odds: Floats, defective: NDArray[np.bool_], weight: Floats) -> float:
    """Find the threshold with the best F1 score; of several equally good ones that nearest to even odds.

    What is above it counts as defective; without defects it is above all scores. ``weight`` is how many images or
    pixels each of the N >= 1 scores stands for.
    """
    order = np.argsort(-log_odds, kind="stable")
    score, weight, label = log_odds[order], weight[order], defective[order]
    if not label.any():
        return max(float(score[0]) + 1e-3, 0.0)
    hits = np.cumsum(weight * label)
    f1 = 2 * hits / (np.cumsum(weight) + hits[-1])
    lower = np.append(score[1:], score[-1] - 1.0)  # the next score down, which the threshold may touch
    f1[score <= lower] = -1.0  # no threshold divides equal scores
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    inside = (score[best] - lower[best]) * 0.01
    nearest = np.clip(0.0, lower[best] + inside, score[best] - inside)
    return float(nearest[np.abs(nearest).argmin()])


def decision_thresholds(
    normal: Floats, defective: Floats, false_reject_rate: float, false_accept_rate: float
) -> Decisions:
    """Choose thresholds that keep the two kinds of error at the rates that the user allows.

    With images enough (``1 / rate - 1``) they are order statistics of the training images' out-of-fold probabilities
    (cross-conformal prediction; Barber et al., 2021): a further good image exceeds ``reject`` with at most the first
    rate, a further defective one of the known kinds falls below ``accept`` with at most the second. With fewer, the
    threshold is the prediction limit of Student's t on the log-odds, if that is lower, with a spread to which the good
    images' counts for one more image. Where both rates hold without a gap, there is nothing to review.

    Args:
        normal: Out-of-fold probabilities of normal training images, one at least.
        defective: The same of defective training images; may be empty.
        false_reject_rate: Share of good images that may be rejected, in (0, 1).
        false_accept_rate: Share of defective images that may be accepted, in (0, 1).
    """
    normal, defective = np.sort(normal), np.sort(defective)
    # By symmetry: the highest good image is the lowest of the negated ones.
    spread = float(_log_odds(normal).std())
    reject, reject_backed, false_rejects = _lower_limit(-_log_odds(normal)[::-1], false_reject_rate, spread)
    # The next number up: the image at the threshold itself is not rejected.
    reject = float(np.nextafter(np.float32(expit(-reject)), np.float32(2)))
    if len(defective) == 0:
        return Decisions(reject, reject, accept_backed=False, reject_backed=reject_backed, false_rejects=false_rejects)
    accept, accept_backed, false_accepts = _lower_limit(_log_odds(defective), false_accept_rate, spread)
    accept = float(np.float32(expit(accept)))
    if accept > reject:
        accept = reject = (accept + reject) / 2
        false_accepts, false_rejects = (0.0, false_accepts[1]), (0.0, false_rejects[1])  # both are rarer now
    review = float(((normal >= accept) & (normal < reject)).mean())
    return Decisions(accept, reject, accept_backed, reject_backed, false_accepts, false_rejects, review, len(defective))


def _lower_limit(score: Floats, rate: float, spread: float) -> tuple[float, bool, tuple[float, float]]:
    """Find what a further score falls below at a rate: the limit, whether it is backed, and the rate's interval.

    Scores are log-odds, ascending; ``spread`` is the standard deviation to expect where there are few.
    """
    count = len(score)
    tail = (1 - _CONFIDENCE) / 2
    rank = math.floor((count + 1) * rate)
    if rank >= 1:
        # The share of the population below the r-th of n is distributed as Beta(r, n + 1 - r).
        low, high = beta.ppf([tail, 1 - tail], rank, count + 1 - rank)
        return float(score[rank - 1]), True, (float(low), float(high))
    centre = score.mean()
    degrees = _PRIOR_IMAGES + count - 1
    deviation = math.sqrt((_PRIOR_IMAGES * spread**2 + ((score - centre) ** 2).sum()) / degrees)
    limit = centre + student.ppf(rate, degrees) * deviation * math.sqrt(1 + 1 / count)
    # No image was below: the most that is compatible with that.
    return float(min(score[0], limit)), False, (0.0, float(1 - tail ** (1 / count)))


def _log_odds(probability: Floats) -> Floats:
    return logit(np.clip(probability, _EPSILON, 1 - _EPSILON))
