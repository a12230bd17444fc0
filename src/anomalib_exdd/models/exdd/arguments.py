"""Checks of the model's arguments, and how they meet those that a checkpoint was trained with."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from anomalib_exdd.models.settings import (
    check_at_least,
    check_choice,
    check_image_size,
    check_rate,
    check_ratio,
    checkpoint_settings,
)
from anomalib_exdd.search import SearchBackend

from .memory_bank import BankPrecision
from .scoring import ScoringName
from .training_stores import FeatureStoreName

PositivePatches = Literal["mask", "crop", "farthest"]

_FIXED_BY_BANKS = {
    *("backbone", "layers", "image_size", "tile_size", "tile_overlap", "top_fraction"),
    *("defect_rate", "unknown_rate", "synthetic_weight"),
}
"""Arguments that the memory banks or the calibration depend on."""
_CHOICES = {
    "positive_patches": get_args(PositivePatches),
    "scoring": get_args(ScoringName),
    "image_scoring": (*get_args(ScoringName), "auto"),
    "bank_precision": get_args(BankPrecision),
    "feature_store": get_args(FeatureStoreName),
    "search": get_args(SearchBackend),
}


def check_settings(settings: Any) -> None:
    """Raise a ValueError if an argument of :class:`anomalib_exdd.models.exdd.ExDD`, an attribute, is out of range."""
    for name in ("negative_ratio", "positive_ratio", "min_coverage", "top_fraction"):
        check_ratio(name, getattr(settings, name))
    for name in ("negative_minimum", "positive_minimum", "projected_dimension", "num_neighbors"):
        check_at_least(name, getattr(settings, name), 1)
    check_at_least("explain", settings.explain, 0)
    if not 0 <= settings.synthetic_weight <= 1:
        msg = f"Argument `synthetic_weight` has to be in [0, 1], but got {settings.synthetic_weight}."
        raise ValueError(msg)
    for name in ("false_reject_rate", "false_accept_rate", "defect_rate", "unknown_rate"):
        check_rate(name, getattr(settings, name))
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(settings, name), choices)
    check_image_size(settings.image_size)
    if settings.sigma is not None and settings.sigma <= 0:
        msg = f"Argument `sigma` has to be positive or null, but got {settings.sigma}."
        raise ValueError(msg)


def adopted_settings(model: type, given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a model takes over from a checkpoint; see :func:`.checkpoint_settings`."""
    changes = checkpoint_settings(model, given, saved, _FIXED_BY_BANKS)
    scoring, trained = changes.get("scoring", given.get("scoring")), saved.get("scoring", given.get("scoring"))
    if scoring != trained and "published" in {scoring, trained}:
        msg = (
            f"Argument `scoring` is {scoring!r}, but the checkpoint was trained with {trained!r}. 'published' pools "
            "features in another way than the other rules: train anew."
        )
        raise ValueError(msg)
    return changes
