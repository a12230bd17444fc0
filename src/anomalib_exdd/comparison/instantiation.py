"""Classes named in a configuration: found, their arguments checked, and built.

As Anomalib's command line does it, but one class at a time and with errors of one line.
"""

import difflib
import inspect
import json
from argparse import ArgumentError
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser


def find_class(class_path: str, base: type, home: str) -> type:
    """Find a class by its plain or dotted name.

    Args:
        class_path: Name, such as `Padim` or `my_package.MyModel`.
        base: Class that it has to be derived from.
        home: Module where plain names are.

    Raises:
        ValueError: If there is no such class.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module_name or home), name, None)
    except ImportError:
        found = None
    if inspect.isclass(found) and issubclass(found, base):
        return found
    known = sorted(
        name
        for name, each in vars(import_module(home)).items()
        if inspect.isclass(each) and issubclass(each, base) and each is not base
    )
    similar = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else f"known are {', '.join(known)}."
    msg = f"There is no {base.__name__} called {class_path!r}: {hint}"
    raise ValueError(msg)


def resolve_arguments(found: type, arguments: Mapping[str, Any], left_out: set[str], owner: str) -> dict[str, Any]:
    """Check a class's arguments and complete them by its defaults.

    Args:
        found: The class.
        arguments: What is given.
        left_out: Arguments that are none of the user's business.
        owner: Whose arguments they are, for errors.

    Returns:
        All arguments, as JSON holds them.

    Raises:
        ValueError: If there is no such argument or a value is of the wrong kind.
    """
    parser = _parser(found, left_out)
    try:
        parsed = parser.parse_object({"it": dict(arguments)})
    except (ArgumentError, ValueError, TypeError) as error:
        msg = f"{owner}: {one_line(error)}"
        raise ValueError(msg) from error
    content = json.loads(parser.dump(parsed, format="json", skip_none=False))
    resolved: dict[str, Any] = content.get("it", {})
    return resolved


def built_arguments(found: type, arguments: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Return a class's arguments as it takes them, objects among them built.

    Args:
        found: The class.
        arguments: What :func:`resolve_arguments` returned.
        left_out: Arguments that are none of the user's business.
    """
    parser = _parser(found, left_out)
    made = parser.instantiate_classes(parser.parse_object({"it": dict(arguments)})).get("it")
    return {} if made is None else dict(vars(made))


def build(found: type, arguments: Mapping[str, Any], **components: Any) -> Any:
    """Build an object from what :func:`resolve_arguments` returned, and arguments that were left out there."""
    return found(**built_arguments(found, arguments, set(components)), **components)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with changes; whatever is no mapping replaces what was there."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def one_line(error: BaseException | str) -> str:
    """Say in one line what an error says in many."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and not text:
        text = type(error).__name__
    return text.replace('Parser key "it.', 'argument "').replace("Key 'it.", "argument '")


def _parser(found: type, left_out: set[str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    skipped: set[str | int] = {name for name in inspect.signature(found).parameters if name in left_out}
    parser.add_class_arguments(found, "it", skip=skipped, instantiate=False, fail_untyped=False, sub_configs=True)
    return parser
