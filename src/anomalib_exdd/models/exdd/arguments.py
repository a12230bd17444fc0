"""Checks of the model's arguments, and how they meet those that a checkpoint was trained with."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from anomalib_exdd.models.settings import (
    check,
    check_at_least,
    check_choice,
    check_image_size,
    check_rate,
    check_ratio,
    checkpoint_settings,
)

_FIXED_BY_BANKS = {
    *("backbone", "layers", "image_size", "tile_size", "tile_overlap", "top_fraction"),
    *("defect_rate", "unknown_rate", "synthetic_weight"),
}
"""Arguments that the memory banks or the calibration depend on."""


def check_settings(model: type, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if an argument of ``model`` is out of its range."""
    for name in ("negative_ratio", "positive_ratio", "min_coverage", "top_fraction"):
        check_ratio(name, arguments[name])
    for name in ("negative_minimum", "positive_minimum", "projected_dimension", "num_neighbors"):
        check_at_least(name, arguments[name], 1)
    check_at_least("explain", arguments["explain"], 0)
    weight, sigma = arguments["synthetic_weight"], arguments["sigma"]
    check("synthetic_weight", weight, "in [0, 1]", fits=0 <= weight <= 1)
    check("sigma", sigma, "positive or null", fits=sigma is None or sigma > 0)
    for name in ("false_reject_rate", "false_accept_rate", "defect_rate", "unknown_rate"):
        check_rate(name, arguments[name])
    for name, parameter in inspect.signature(model).parameters.items():
        if choices := _choices(parameter.annotation):
            check_choice(name, arguments[name], choices)
    check_image_size(arguments["image_size"])


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the choices of a literal type or of a union of them; none of another type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))


def adopted_settings(model: Any, given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a model takes over from a checkpoint; see :func:`.checkpoint_settings`."""
    changes = checkpoint_settings(type(model), given, saved, _FIXED_BY_BANKS)
    scoring, trained = changes.get("scoring", given.get("scoring")), saved.get("scoring", given.get("scoring"))
    if scoring != trained and "published" in {scoring, trained}:
        msg = (
            f"Argument `scoring` is {scoring!r}, but the checkpoint was trained with {trained!r}: train anew, because "
            "'published' pools features in another way than the other rules."
        )
        raise ValueError(msg)
    return changes
