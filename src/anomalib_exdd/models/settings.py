"""Checks of models' arguments, and how they meet those that a checkpoint was trained with."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def check(name: str, value: object, has_to_be: str, *, fits: bool) -> None:
    """Raise a ValueError if the value of an argument does not fit, saying what it has to be."""
    if not fits:
        msg = f"Argument `{name}` has to be {has_to_be}, but got {value!r}."
        raise ValueError(msg)


def check_rate(name: str, value: float | None) -> None:
    """Raise a ValueError if an argument is not in (0, 1); None is left to the model."""
    check(name, value, "between 0 and 1, both excluded", fits=value is None or 0 < value < 1)


def check_ratio(name: str, value: float) -> None:
    """Raise a ValueError if an argument is not in (0, 1]."""
    check(name, value, "in (0, 1]", fits=0 < value <= 1)


def check_at_least(name: str, value: float, minimum: int) -> None:
    """Raise a ValueError if an argument is below its minimum."""
    check(name, value, f"at least {minimum}", fits=value >= minimum)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError if an argument is none of its choices."""
    check(name, value, f"one of {choices}", fits=value in choices)


def check_image_size(image_size: Sequence[int]) -> None:
    """Raise a ValueError if `image_size` is not two numbers of at least 32."""
    fits = len(image_size) == 2 and min(image_size) >= 32
    check("image_size", tuple(image_size), "(height, width), both at least 32", fits=fits)


def checkpoint_settings(
    model: type, given: Mapping[str, Any], saved: Mapping[str, Any], fixed: Collection[str]
) -> dict[str, Any]:
    """Return the arguments that a model takes over from a checkpoint that is restored into it.

    An argument that was left at its default takes the checkpoint's value. One that was given stays; a ValueError if it
    contradicts the checkpoint and is among those that its content depends on, ``fixed``.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(model).parameters.items()}
    changes = {}
    for name, value in saved.items():
        if name not in given or _is_same(given[name], value):
            continue
        if _is_same(given[name], defaults.get(name)):
            changes[name] = value
        elif name in fixed:
            msg = f"Argument `{name}` is {given[name]!r}, but the checkpoint was trained with {value!r}: leave it out."
            raise ValueError(msg)
    return changes


def _is_same(first: Any, second: Any) -> bool:
    """Compare arguments with those of a checkpoint, where paths are strings and tuples may be lists."""
    first, second = (str(value) if isinstance(value, Path) else value for value in (first, second))
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        return list(first) == list(second)
    return bool(first == second)
