"""Checks of models' arguments, and how they meet those that a checkpoint was trained with."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def check_rate(name: str, value: float | None) -> None:
    """Raise a ValueError if an argument is not in (0, 1); None is left to the model."""
    if value is not None and not 0 < value < 1:
        msg = f"Argument `{name}` has to be between 0 and 1, both excluded, but got {value}."
        raise ValueError(msg)


def check_ratio(name: str, value: float) -> None:
    """Raise a ValueError if an argument is not in (0, 1]."""
    if not 0 < value <= 1:
        msg = f"Argument `{name}` has to be in (0, 1], but got {value}."
        raise ValueError(msg)


def check_at_least(name: str, value: float, minimum: int) -> None:
    """Raise a ValueError if an argument is below its minimum."""
    if value < minimum:
        msg = f"Argument `{name}` has to be at least {minimum}, but got {value}."
        raise ValueError(msg)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError if an argument is none of its choices."""
    if value not in choices:
        msg = f"Argument `{name}` has to be one of {choices}, but got {value!r}."
        raise ValueError(msg)


def check_image_size(image_size: Sequence[int]) -> None:
    """Raise a ValueError if `image_size` is not two numbers of at least 32."""
    if len(image_size) != 2 or min(image_size) < 32:
        msg = f"Argument `image_size` has to be (height, width), both at least 32, but got {tuple(image_size)}."
        raise ValueError(msg)


def checkpoint_settings(
    model: type, given: Mapping[str, Any], saved: Mapping[str, Any], fixed: Collection[str]
) -> dict[str, Any]:
    """Return the arguments that a model takes over from a checkpoint that is restored into it.

    An argument that was left at its default takes the checkpoint's value. One that was given stays, unless the
    checkpoint's content depends on it.

    Args:
        model: The model's class, whose signature has the defaults.
        given: The model's arguments.
        saved: The arguments that the checkpoint was trained with.
        fixed: Names of the arguments that the checkpoint's content depends on.

    Raises:
        ValueError: If a given argument contradicts what the checkpoint was trained with.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(model).parameters.items()}
    changes = {}
    for name, value in saved.items():
        if name not in given or _is_same(given[name], value):
            continue
        if _is_same(given[name], defaults.get(name)):
            changes[name] = value
        elif name in fixed:
            msg = (
                f"Argument `{name}` is {given[name]!r}, but the checkpoint was trained with {value!r}. "
                "Leave the argument out, or train anew."
            )
            raise ValueError(msg)
    return changes


def _is_same(first: Any, second: Any) -> bool:
    """Compare arguments with those of a checkpoint, where paths are strings and tuples may be lists."""
    first, second = (str(value) if isinstance(value, Path) else value for value in (first, second))
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        return list(first) == list(second)
    return bool(first == second)
