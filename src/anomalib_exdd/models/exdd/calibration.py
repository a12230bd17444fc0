"""Learns from the training images what each kind of evidence is worth, and what an image's score means.

Three pieces of evidence: a patch is *unfamiliar* (far from the negative bank), or it resembles a *known kind* of defect
by its neighbours (nearer to the positive bank than its distance to the negative one suggests) or by the learnt
boundary. The score is the log-likelihood ratio against a mixture of known and unknown kinds of defects, fitted to
out-of-fold scores. ``docs/calibration.md`` tells how the choices were made.

Shape suffixes: I images, C patches of all images together, E columns of evidence, J pieces of evidence.
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

from anomalib_exdd.utils.precision import Float32Buffers

from .decisions import Decisions, Floats, Thresholds, best_f1_threshold, decision_thresholds
from .scoring import EVIDENCE, Coefficients, bounded_log_odds, top_count

_NEIGHBOR_RIDGE = 0.3  # on the weights of the log-distances, per spread; weighs as much as so many images
_EQUAL_RIDGE = 10.0  # pulls the weights of the three pieces towards each other: so many images move them apart
_LEAST_GAP = 0.3  # between the mean log-odds of defective and good images, below which known defects tell nothing
_LEAST_UNKNOWN_SLOPE = 0.05  # of the unfamiliar piece against unknown defects
_LEAST_SLOPE = 1e-3
_RESEMBLANCE_SHARE = 0.9  # of the defect patches of the training images, which count as known
_NOTHING = -1e4  # log-odds of known kinds where there are none


class ImagePatches(NamedTuple):
    """Out-of-fold evidence of the training images' kept patches."""

    log_negative: Tensor  # log-distances to the first and third entry of the negative bank, float64, shape (C, 2)
    log_positive: Tensor | None  # the same of the positive bank; None if it cannot be measured out of fold
    log_odds: Tensor | None  # of the learnt boundary, float64, shape (C,); None without one
    image: Tensor  # of each patch, shape (C,)
    sampled: Tensor  # whether it was sampled from a normal image or a defect, not kept for its score, shape (C,)
    defective: Tensor  # whether each image is, boolean, shape (I,)
    patches: Tensor  # of each whole image, shape (I,)
    population: Tensor  # number of patches that each image's sample stands for, shape (I,)
    synthetic: Tensor  # whether each image is, boolean, shape (I,)

    def evidence(self) -> Floats:
        """Return the columns :data:`.scoring.EVIDENCE`, zero where there is none, shape (C, E)."""
        columns = np.zeros((len(self.image), len(EVIDENCE)))
        columns[:, 0] = self.log_negative[:, 0].exp().numpy()
        columns[:, 1:3] = self.log_negative.numpy()
        if self.log_positive is not None:
            columns[:, 3:5] = -self.log_positive.numpy()
        if self.log_odds is not None:
            columns[:, 5] = self.log_odds.numpy()
        return columns


class Piece(NamedTuple):
    """A piece of evidence as a linear function of the columns: weights >= 0, shape (E,), and a bias."""

    weights: Floats
    bias: float

    def of(self, evidence_CE: Floats) -> Floats:
        """Return the piece's value for every patch, shape (C,)."""
        return evidence_CE @ self.weights + self.bias


class Calibration(DynamicBufferMixin, Float32Buffers):
    """What the calibrated score has learnt, as buffers that are saved, moved and exported with the model.

    ``top_fraction`` is the share of an image's patches that make its score.
    """

    pieces: list[Piece]
    """After :meth:`fit`, not in the checkpoint: unfamiliar; with known defects resemblance by neighbours and boundary.

    Each has median 0 and its highest tenth from 1.28 on good images."""
    known_weights: Tensor  # this and the next five: see `Coefficients`
    known_bias: Tensor
    unknown_slope: Tensor
    unknown_offset: Tensor
    slope: Tensor
    offset: Tensor
    resemblance: Tensor  # log-ratio of positive to negative distance within which a patch resembles known defects
    training_probability: Tensor  # out of fold, of the real training images, shape (I,)
    training_defective: Tensor  # their labels, boolean, shape (I,)

    def __init__(self, top_fraction: float = 0.01) -> None:
        super().__init__()
        self.top_fraction = top_fraction
        self.clear()

    def clear(self) -> None:
        """Forget what was learnt."""
        device = self.slope.device if "slope" in self._buffers else None
        self.pieces = []
        self.register_buffer("known_weights", torch.zeros(len(EVIDENCE), device=device))
        numbers = {"known_bias": _NOTHING, "unknown_slope": 1.0, "slope": 1.0}
        for name in ("known_bias", "unknown_slope", "unknown_offset", "slope", "offset", "resemblance"):
            self.register_buffer(name, torch.tensor(numbers.get(name, 0.0), device=device))
        self.register_buffer("training_probability", torch.empty(0, device=device))
        self.register_buffer("training_defective", torch.empty(0, dtype=torch.bool, device=device))

    @property
    def is_fitted(self) -> bool:
        """Whether anything has been learnt."""
        return len(self.training_probability) > 0

    @property
    def coefficients(self) -> Coefficients:
        """What :func:`.scoring.calibrated_patch` needs."""
        return Coefficients(*(getattr(self, name) for name in Coefficients._fields))

    def fit(
        self, patches: ImagePatches, defect_rate: float, unknown_rate: float = 0.1, synthetic_weight: float = 0.0
    ) -> Thresholds:
        """Learn everything from the patches of the training images; return what Anomalib's post-processor needs.

        Args:
            patches: The patches.
            defect_rate: Share of defective images among those to come, in (0, 1), for the probability.
            unknown_rate: Share of the defects to come that are of no known kind, in (0, 1).
            synthetic_weight: How much a synthetic image counts beside a real one, 0 to 1. Without any real defect they
                count nothing below 1. Thresholds come from real images.
        """
        images = _Images(patches, self.top_fraction, synthetic_weight)
        self.pieces = [images.standardised(Piece(np.eye(len(EVIDENCE))[0], 0.0))]
        known, unknown = Piece(np.zeros(len(EVIDENCE)), _NOTHING), self.pieces[0]
        if images.count_I[images.defective_I].sum() >= 2 and patches.log_positive is not None:
            self.pieces.append(images.standardised(_neighbor_piece(images)))
            if patches.log_odds is not None:
                self.pieces.append(images.standardised(Piece(np.eye(len(EVIDENCE))[5], 0.0)))
            known, unknown = _mixture(self.pieces, images, unknown_rate)
        score_C = np.logaddexp(known.of(images.evidence_CE), unknown.of(images.evidence_CE))
        score_I = images.top_means(score_C)
        slope, offset = fit_probability(score_I, images.defective_I, defect_rate, images.count_I)
        log_odds_I, log_odds_C = (
            bounded_log_odds(torch.from_numpy(slope * score + offset)).numpy() for score in (score_I, score_C)
        )
        values = {
            "known_weights": known.weights,
            "known_bias": known.bias,
            "unknown_slope": unknown.weights[0],
            "unknown_offset": unknown.bias,
            "slope": slope,
            "offset": offset,
            "resemblance": resemblance_limit(patches),
            "training_probability": expit(log_odds_I[images.real_I]),
            "training_defective": images.defective_I[images.real_I],
        }
        for name, value in values.items():  # as copies, which may be resized
            setattr(self, name, torch.tensor(value).to(getattr(self, name)))
        return _thresholds(images, patches.population.numpy(), log_odds_I, log_odds_C)

    def decisions(self, false_reject_rate: float, false_accept_rate: float) -> Decisions:
        """Set the two thresholds from the training images; see :func:`.decisions.decision_thresholds`."""
        probability = self.training_probability.double().cpu().numpy()
        defective = self.training_defective.cpu().numpy()
        return decision_thresholds(
            probability[~defective], probability[defective], false_reject_rate, false_accept_rate
        )


class _Images:
    """What calibration is fitted to, as NumPy arrays, with the rows of the patches that were kept for their score."""

    def __init__(self, patches: ImagePatches, top_fraction: float, synthetic_weight: float) -> None:
        self.evidence_CE = patches.evidence()
        self.image_C, self.sampled_C = patches.image.numpy(), patches.sampled.numpy()
        self.defective_I, self.real_I = patches.defective.numpy(), ~patches.synthetic.numpy()
        if synthetic_weight < 1 and not (self.defective_I & self.real_I).any():
            synthetic_weight = 0.0
        self.count_I = np.where(self.real_I, 1.0, synthetic_weight)
        kept_I = np.bincount(self.image_C[~self.sampled_C], minlength=len(self.real_I))
        self.row_IR = np.full((len(kept_I), int(kept_I.max())), -1)
        for image, count in enumerate(kept_I):
            self.row_IR[image, :count] = np.flatnonzero(~self.sampled_C & (self.image_C == image))
        self.top_I = np.minimum([top_count(int(n), top_fraction) for n in patches.patches.tolist()], kept_I)

    def top_means(self, score_C: Floats) -> Floats:
        """Average the highest scores of every image, shape (I,)."""
        score_IR = np.where(self.row_IR >= 0, score_C[self.row_IR], -np.inf)
        score_IR = -np.sort(-score_IR, axis=1)
        used_IR = np.arange(score_IR.shape[1]) < self.top_I[:, None]
        return np.where(used_IR, score_IR, 0.0).sum(axis=1) / self.top_I

    def standardised(self, piece: Piece) -> Piece:
        """Scale a piece by its values on good images: median 0, and the highest tenth from 1.28."""
        good_I = self.real_I & ~self.defective_I
        value_C = piece.of(self.evidence_CE)
        middle, high = np.quantile(self.top_means(value_C)[good_I], [0.5, 0.9])
        spread = value_C[self.sampled_C & good_I[self.image_C]].std()
        scale = max((high - middle) / 1.2816, 0.05 * spread, 1e-9)
        return Piece(piece.weights / scale, float((piece.bias - middle) / scale))

    def likelihood_ratio(
        self, pieces_IJ: Floats, prior_J: Floats | None = None, ridge: float = 0.0, least: float = 0.0
    ) -> Floats:
        """Fit log-odds for as many defective as normal images, with Platt's targets; return weights and bias."""
        count_I, defective_I = self.count_I, self.defective_I
        defects, normals = count_I[defective_I].sum(), count_I[~defective_I].sum()
        target_I = np.where(defective_I, (defects + 1) / (defects + 2), 1 / (normals + 2))
        weight_I = np.where(defective_I, count_I, count_I * defects / normals)
        prior_J = np.zeros(pieces_IJ.shape[1]) if prior_J is None else prior_J
        return _logistic(pieces_IJ, target_I, weight_I, prior_J, ridge, least=least)


def resemblance_limit(patches: ImagePatches) -> float:
    """Find the log-ratio of the two distances up to which a patch resembles known defects.

    Nine tenths of the defect patches of real training images are within it, out of fold, every image with the same
    weight. With fewer than two such images it is 0.
    """
    defective_I = (patches.defective & ~patches.synthetic).numpy()
    image_C = patches.image.numpy()
    rows = np.flatnonzero(patches.sampled.numpy() & defective_I[image_C])
    if patches.log_positive is None or len(np.unique(image_C[rows])) < 2:
        return 0.0
    ratio = (patches.log_positive[:, 0] - patches.log_negative[:, 0]).numpy()[rows]
    weight = 1 / np.bincount(image_C[rows])[image_C[rows]]
    order = np.argsort(ratio)
    below = np.cumsum(weight[order])
    wanted = _RESEMBLANCE_SHARE * below[-1] - 1e-9  # a share that is met exactly is met in spite of rounding
    return float(ratio[order][np.searchsorted(below, wanted)])


def _neighbor_piece(images: _Images) -> Piece:
    """Weigh the log-distances by a logistic regression on sampled patches of normal images and of defects.

    Weights are >= 0 and shrunk a little. Defective images count the same each, the normal patches as much together.
    """
    sampled_C, defect_C = images.sampled_C, images.defective_I[images.image_C]
    sizes_I = np.bincount(images.image_C[sampled_C], minlength=len(images.count_I)).clip(1)
    weight_C = np.where(defect_C, (images.count_I / sizes_I)[images.image_C], 0.0)
    weight_C = np.where(defect_C, weight_C, weight_C[sampled_C].sum() / max(1, (sampled_C & ~defect_C).sum()))
    columns = slice(1, 5)
    log_CE = images.evidence_CE[sampled_C, columns]
    normal = log_CE[~defect_C[sampled_C]]
    centre, spread = normal.mean(axis=0), normal.std(axis=0).clip(1e-6)
    target_C = defect_C[sampled_C].astype(np.float64)
    found = _logistic((log_CE - centre) / spread, target_C, weight_C[sampled_C], np.zeros(4), _NEIGHBOR_RIDGE)
    weights = np.zeros(len(EVIDENCE))
    weights[columns] = found[:-1] / spread
    return Piece(weights, float(found[-1] - weights[columns] @ centre))


def _mixture(pieces: list[Piece], images: _Images, unknown_rate: float) -> tuple[Piece, Piece]:
    """Find the log-likelihood ratios of known and of unknown kinds of defects, each with the log of its share.

    Known defects show in all pieces, whose weights are pulled towards equal ones; unknown ones are unfamiliar only.
    """
    top_IJ = np.stack([images.top_means(piece.of(images.evidence_CE)) for piece in pieces], axis=1)
    together = images.likelihood_ratio(top_IJ.sum(axis=1, keepdims=True))
    found = images.likelihood_ratio(top_IJ, np.full(len(pieces), together[0]), _EQUAL_RIDGE)
    alone = images.likelihood_ratio(top_IJ[:, :1], least=_LEAST_UNKNOWN_SLOPE)
    log_odds_I, count_I, defective_I = top_IJ @ found[:-1], images.count_I, images.defective_I
    means = [np.average(log_odds_I[rows], weights=count_I[rows]) for rows in (defective_I, ~defective_I)]
    if means[0] - means[1] < _LEAST_GAP:
        found[:-1] = 0.0  # small weights, fitted to noise, would decide the order of images
    weights = np.sum([weight * piece.weights for weight, piece in zip(found, pieces, strict=False)], axis=0)
    bias = sum(weight * piece.bias for weight, piece in zip(found, pieces, strict=False))
    known = Piece(weights, bias + found[-1] + math.log(1 - unknown_rate))
    unfamiliar = pieces[0]
    return known, Piece(alone[0] * unfamiliar.weights, alone[0] * unfamiliar.bias + alone[1] + math.log(unknown_rate))


def _thresholds(images: _Images, population_I: NDArray[np.int64], log_odds_I: Floats, log_odds_C: Floats) -> Thresholds:
    """Find Anomalib's thresholds and ranges: of images on their probabilities, of pixels on the map's log-odds.

    A sampled patch stands for a share of its image's patches, one that was kept for its score for itself.
    """
    real_I, defective_I, image_C, sampled_C = images.real_I, images.defective_I, images.image_C, images.sampled_C
    sizes_I = np.bincount(image_C[sampled_C], minlength=len(real_I)).clip(1)
    weight_C = np.where(sampled_C, (population_I / sizes_I)[image_C], 1.0)
    used_C = real_I[image_C] & (sampled_C | ~defective_I[image_C])
    image = best_f1_threshold(log_odds_I[real_I], defective_I[real_I], np.ones(int(real_I.sum())))
    pixels, defective = log_odds_C[used_C], defective_I[image_C[used_C]]
    pixel = best_f1_threshold(pixels, defective, weight_C[used_C])
    return Thresholds.around(float(expit(image)), (0.0, 1.0), pixel, (float(pixels.min()), float(pixels.max())))


def fit_probability(
    score_I: Floats, defective_I: NDArray[np.bool_], defect_rate: float, count_I: Floats
) -> tuple[float, float]:
    """Map image scores to log-odds of being defective, by Platt's method; return slope (> 0) and offset.

    Targets are smoothed by one image of each kind (Lin, Lin & Weng, Machine Learning 68, 2007): few images never give
    certainty. With fewer than two defective images the mapping only keeps the order, with 0.5 where a score exceeds
    the normal images' median by three of their robust deviations.
    """
    defects, normals = float(count_I[defective_I].sum()), float(count_I[~defective_I].sum())
    if defects < 2:
        low, middle, high = np.quantile(score_I[~defective_I], [0.25, 0.5, 0.75])
        deviation = max((high - low) / 1.349, 1e-3)
        return 1 / deviation, -float(middle / deviation + 3)
    target_I = np.where(defective_I, (defects + 1) / (defects + 2), 1 / (normals + 2))
    deviation = max(float(score_I.std()), 1e-6)
    slope, offset = _logistic(score_I[:, None] / deviation, target_I, count_I, np.zeros(1), 0.0, least=_LEAST_SLOPE)
    shift = math.log(defect_rate / (1 - defect_rate)) - math.log(defects / normals)
    return float(slope) / deviation, float(offset) + shift


def _logistic(
    features_ID: Floats, target_I: Floats, weight_I: Floats, prior_D: Floats, ridge: float, *, least: float = 0.0
) -> Floats:
    """Minimise a weighted logistic loss with a Gaussian prior; return bounded coefficients and bias, shape (D + 1,)."""
    design = np.c_[features_ID, np.ones(len(features_ID))]
    prior, precision = np.append(prior_D, 0.0), np.append(np.full(len(prior_D), ridge), 0.0)

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        logit = design @ coefficients
        away = coefficients - prior
        value = weight_I @ (np.logaddexp(0, logit) - target_I * logit) + precision @ (away * away) / 2
        return float(value), design.T @ (weight_I * (expit(logit) - target_I)) + precision * away

    bounds = [(least, None)] * len(prior_D) + [(None, None)]
    start = np.append(np.maximum(prior_D, least), 0.0)
    options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9}
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
