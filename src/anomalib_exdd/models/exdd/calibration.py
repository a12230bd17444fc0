"""Learns the calibrated score: weights of the evidence, a probability, and thresholds for decisions.

Everything is fitted on distances of training images that leave out the bank entries of the same image; with them, every
training patch would be close to itself. What counts is images, not patches: an image's score is the mean of its highest
patch scores, and a penalised logistic regression on those means finds the weights. Which patches are the highest
depends on the weights, so the two alternate until nothing changes, as in multiple-instance learning (Andrews et al.,
NIPS 2002). The weights are non-negative and shrunk towards the distance to normal alone; an image's evidence outweighs
that prior only where there are enough of them. The choices were made on validation folds of training images: see
``docs/calibration.md``.

Shape suffixes: I images, C candidate patches of all images together, E pieces of evidence.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from anomalib.models.components import DynamicBufferMixin
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from anomalib_exdd.precision import Float32Buffers

from .scoring import Coefficients, log_evidence, top_count

Floats = NDArray[np.float64]

PRIOR_WEIGHT = 2.0
"""Prior mean of a_1, per spread of the log-distance to normal; that of all other weights is 0."""
PRIOR_PRECISION = (1.0, 3.0, 3.0, 3.0)
"""Precision of the prior on a_1, a_3, c_1, c_3: it takes about so many images to move a weight by 1 per spread."""
_MAX_ROUNDS = 60
_LEAST_SLOPE = 1e-3


class Decisions(NamedTuple):
    """Two thresholds on the probability.

    Attributes:
        accept: Images below it are good.
        reject: Images at or above it are defective; those between the two are for review.
        accept_backed: Whether there are enough defective training images to back the false-accept rate.
        reject_backed: Whether there are enough normal ones to back the false-reject rate.
    """

    accept: float
    reject: float
    accept_backed: bool
    reject_backed: bool

    def name(self, probability: float) -> str:
        """Return "accept", "review" or "reject"."""
        if probability >= self.reject:
            return "reject"
        return "accept" if probability < self.accept else "review"

    def describe(self, probability: float) -> str:
        """Return the decision on an image and what it stands on, in one line."""
        limits = f"accept below {self.accept:.3f}, reject from {self.reject:.3f}"
        return f"{self.name(probability)}: probability {probability:.3f} ({limits})"

    def __str__(self) -> str:
        """State the thresholds and how far they can be trusted."""
        limits = f"accept below {self.accept:.3f}, reject from {self.reject:.3f}, review between"
        parts = [f"Decisions by the probability of a defect: {limits}."]
        if not self.accept_backed:
            parts.append(
                "Too few defective training images back the false-accept rate: `accept` is the least of them, or "
                "`reject` where there are none."
            )
        if not self.reject_backed:
            parts.append("Too few normal training images back the false-reject rate: `reject` is the highest of them.")
        return " ".join(parts)


class ImagePatches(NamedTuple):
    """Log-distances of the training images' candidate patches, their own images' bank entries left out.

    Attributes:
        log_negative: To the negative bank, float64, shape (C, 2).
        log_positive: To the positive bank, shape (C, 2); None if it says nothing of images that are not in it.
        image: Image of each patch, shape (C,).
        typical: Whether the patch was drawn at random from a normal image, instead of for its high score, shape (C,).
        defective: Whether each image is, boolean, shape (I,).
        patches: Number of patches of each whole image, shape (I,).
        synthetic: Whether each image is, boolean, shape (I,).
    """

    log_negative: Tensor
    log_positive: Tensor | None
    image: Tensor
    typical: Tensor
    defective: Tensor
    patches: Tensor
    synthetic: Tensor


class Calibration(DynamicBufferMixin, Float32Buffers):
    """What the calibrated score has learnt, as buffers that are saved, moved and exported with the model.

    Args:
        top_fraction: Share of an image's patches that make its score.

    Attributes:
        training_probability: Probabilities of the real training images that it was fitted on, shape (I,).
        training_defective: Their labels, boolean, shape (I,).
    """

    weights: Tensor
    bias: Tensor
    reference: Tensor
    slope: Tensor
    offset: Tensor
    training_probability: Tensor
    training_defective: Tensor

    def __init__(self, top_fraction: float = 0.01) -> None:
        super().__init__()
        self.top_fraction = top_fraction
        self.register_buffer("weights", torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.register_buffer("bias", torch.tensor(0.0))
        self.register_buffer("reference", torch.zeros(2))
        self.register_buffer("slope", torch.tensor(1.0))
        self.register_buffer("offset", torch.tensor(0.0))
        self.register_buffer("training_probability", torch.empty(0))
        self.register_buffer("training_defective", torch.empty(0, dtype=torch.bool))

    @property
    def is_fitted(self) -> bool:
        """Whether anything has been learnt."""
        return len(self.training_probability) > 0

    @property
    def coefficients(self) -> Coefficients:
        """What :func:`.scoring.calibrated_patch` needs."""
        return Coefficients(self.weights, self.bias, self.reference, self.slope, self.offset, self.top_fraction)

    def fit(self, patches: ImagePatches, defect_rate: float, synthetic_weight: float = 0.0) -> None:
        """Learn everything from the training images.

        Args:
            patches: Their candidate patches.
            defect_rate: Share of defective images among those to come, in (0, 1), for the probability.
            synthetic_weight: How much a synthetic image counts beside a real one, 0 to 1. Where no real defect bears
                the synthetic ones out, they count nothing below 1. Thresholds for decisions come from real images.
        """
        reference = torch.zeros(2, dtype=torch.float64)
        if patches.log_positive is not None:
            reference = patches.log_positive[patches.typical].median(dim=0).values
        evidence_CE = log_evidence(patches.log_negative, patches.log_positive, reference).numpy()
        typical = patches.typical.numpy()
        spread = max(float(evidence_CE[typical, 0].std()), 1e-6)
        centre_E = evidence_CE[typical].mean(axis=0)
        groups = _Groups(patches, self.top_fraction)
        defective_I, real_I = patches.defective.numpy(), ~patches.synthetic.numpy()
        if synthetic_weight < 1 and not (defective_I & real_I).any():
            synthetic_weight = 0.0
        count_I = np.where(real_I, 1.0, synthetic_weight)
        weights_E, bias = fit_weights((evidence_CE - centre_E) / spread, groups, defective_I, count_I)
        weights_E = weights_E / spread
        bias -= float(centre_E @ weights_E)
        score_I = groups.top_means(evidence_CE, weights_E) @ weights_E + bias
        slope, offset = fit_probability(score_I, defective_I, defect_rate, count_I)
        device = self.weights.device
        self.weights = torch.zeros(4, device=device)
        self.weights[: len(weights_E)] = torch.from_numpy(weights_E).to(self.weights)
        self.reference = reference.to(self.weights)
        for name, value in (("bias", bias), ("slope", slope), ("offset", offset)):
            setattr(self, name, torch.tensor(value, dtype=torch.float32, device=device))
        self.training_probability = torch.from_numpy(expit(slope * score_I[real_I] + offset)).to(self.weights)
        self.training_defective = torch.from_numpy(defective_I[real_I]).to(device)

    def decisions(self, false_reject_rate: float, false_accept_rate: float) -> Decisions:
        """Set the two thresholds from the training images; see :func:`decision_thresholds`."""
        probability = self.training_probability.double().cpu().numpy()
        defective = self.training_defective.cpu().numpy()
        return decision_thresholds(
            probability[~defective], probability[defective], false_reject_rate, false_accept_rate
        )


class _Groups:
    """Patches by image, padded to equal numbers, so that the highest of every image are found at once."""

    def __init__(self, patches: ImagePatches, top_fraction: float) -> None:
        image_C = patches.image.numpy()
        chosen = ~patches.typical.numpy()
        counts = np.bincount(image_C[chosen], minlength=len(patches.defective))
        self.row_IR = np.full((len(counts), int(counts.max())), -1)
        for image in range(len(counts)):
            rows = np.flatnonzero(chosen & (image_C == image))
            self.row_IR[image, : len(rows)] = rows
        self.top_I = np.minimum([top_count(int(n), top_fraction) for n in patches.patches.tolist()], counts)

    def top_means(self, evidence_CE: Floats, weights_E: Floats) -> Floats:
        """Average the evidence of the patches that score highest under the weights, shape (I, E)."""
        evidence_IRE = evidence_CE[self.row_IR]
        score_IR = np.where(self.row_IR >= 0, evidence_IRE @ weights_E, -np.inf)
        order = np.argsort(-score_IR, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
        used_IR = rank < self.top_I[:, None]
        means: Floats = (evidence_IRE * used_IR[..., None]).sum(axis=1) / self.top_I[:, None]
        return means


def fit_weights(
    evidence_CE: Floats, groups: _Groups, defective_I: NDArray[np.bool_], count_I: Floats
) -> tuple[Floats, float]:
    """Find the weights of the evidence that tell defective images from normal ones.

    Args:
        evidence_CE: Evidence of all patches, in units of its spread.
        groups: Which patches belong to which image.
        defective_I: Labels.
        count_I: How much each image counts, 1 for a real one.

    Returns:
        Weights, shape (E,), and bias; without defective images the prior's weights and a bias of 0.
    """
    pieces = evidence_CE.shape[1]
    prior = np.zeros(pieces)
    prior[0] = PRIOR_WEIGHT
    defects, normals = float(count_I[defective_I].sum()), float(count_I[~defective_I].sum())
    if defects == 0:
        return prior, 0.0
    # The normal images count as much as the defective ones all together.
    weight_I = np.where(defective_I, count_I, count_I * defects / max(1.0, normals))
    found = np.append(prior, 0.0)
    for _ in range(_MAX_ROUNDS):
        means_IE = groups.top_means(evidence_CE, found[:-1])
        best = _logistic(
            means_IE, defective_I.astype(np.float64), weight_I, prior, np.array(PRIOR_PRECISION[:pieces]), least=0.0
        )
        step = (best - found) / 2  # half a step: whole ones may swing between two selections for ever
        found = found + step
        if np.abs(step).max() < 1e-7:
            break
    return found[:-1], float(found[-1])


def fit_probability(
    score_I: Floats, defective_I: NDArray[np.bool_], defect_rate: float, count_I: Floats
) -> tuple[float, float]:
    """Map image scores to log-odds of being defective, by Platt's method.

    Targets are smoothed by one image of each kind (Platt, 1999; Lin, Lin & Weng, Machine Learning 68, 2007), so that
    few images never give certainty. With fewer than two defective images there is nothing to fit: then the mapping only
    keeps the order, with 0.5 where a score exceeds the normal images' median by three of their robust deviations.

    Returns:
        Slope (> 0) and offset.
    """
    defects, normals = float(count_I[defective_I].sum()), float(count_I[~defective_I].sum())
    if defects < 2:
        low, middle, high = np.quantile(score_I[~defective_I], [0.25, 0.5, 0.75])
        deviation = max((high - low) / 1.349, 1e-3)
        return 1 / deviation, -float(middle / deviation + 3)
    target_I = np.where(defective_I, (defects + 1) / (defects + 2), 1 / (normals + 2))
    deviation = max(float(score_I.std()), 1e-6)
    slope, offset = _logistic(
        score_I[:, None] / deviation, target_I, count_I, np.zeros(1), np.zeros(1), least=_LEAST_SLOPE
    )
    shift = math.log(defect_rate / (1 - defect_rate)) - math.log(defects / normals)
    return float(slope) / deviation, float(offset) + shift


def decision_thresholds(
    normal: Floats, defective: Floats, false_reject_rate: float, false_accept_rate: float
) -> Decisions:
    """Choose thresholds that keep the two kinds of error at the rates that the user allows.

    The thresholds are order statistics of the training images' probabilities (split conformal prediction; Vovk et al.,
    2005): a further good image exceeds ``reject`` with at most the first rate, a further defective one of the known
    kinds falls below ``accept`` with at most the second. That takes ``1 / rate - 1`` images; with fewer, the extreme
    one stands in, and the threshold is not backed. Where both rates hold without a gap, there is nothing to review.

    Args:
        normal: Probabilities of normal training images, shape (N,), N >= 1.
        defective: Probabilities of defective training images, shape (M,); may be empty.
        false_reject_rate: Share of good images that may be rejected, in (0, 1).
        false_accept_rate: Share of defective images that may be accepted, in (0, 1).
    """
    normal, defective = np.sort(normal), np.sort(defective)
    rank = math.ceil((len(normal) + 1) * (1 - false_reject_rate))
    reject_backed = rank <= len(normal)
    # The next number up: the image at the threshold itself is not rejected.
    reject = float(np.nextafter(np.float32(normal[min(rank, len(normal)) - 1]), np.float32(2)))
    if len(defective) == 0:
        return Decisions(reject, reject, accept_backed=False, reject_backed=reject_backed)
    rank = math.floor((len(defective) + 1) * false_accept_rate)
    accept = float(np.float32(defective[max(rank, 1) - 1]))
    if accept > reject:
        accept = reject = (accept + reject) / 2
    return Decisions(accept, reject, accept_backed=rank >= 1, reject_backed=reject_backed)


def _logistic(
    features_ID: Floats, target_I: Floats, weight_I: Floats, prior_D: Floats, precision_D: Floats, *, least: float
) -> Floats:
    """Minimise a weighted logistic loss with a Gaussian prior; coefficients have a lower bound, the bias is free.

    Returns:
        Coefficients and bias, shape (D + 1,).
    """
    design = np.c_[features_ID, np.ones(len(features_ID))]
    prior, precision = np.append(prior_D, 0.0), np.append(precision_D, 0.0)

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        logit = design @ coefficients
        away = coefficients - prior
        value = weight_I @ (np.logaddexp(0, logit) - target_I * logit) + precision @ (away * away) / 2
        return float(value), design.T @ (weight_I * (expit(logit) - target_I)) + precision * away

    bounds = [(least, None)] * len(prior_D) + [(None, None)]
    start = np.append(np.maximum(prior_D, least), 0.0)
    options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9}
    found: Floats = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return found
