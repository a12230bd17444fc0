"""Classes named in a configuration: found, their arguments resolved, and instantiated.

As Anomalib's command line does it, but for one class at a time and with errors of one line.
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
    """Find a class by its dotted name, or by its plain name in the module `home`.

    Raises:
        ValueError: If there is no such class derived from `base`.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module_name or home), name, None)
    except ImportError:
        found = None
    if inspect.isclass(found) and issubclass(found, base):
        return found
    classes = [each for each in vars(import_module(home)).values() if inspect.isclass(each) and each is not base]
    known = sorted(each.__name__ for each in classes if issubclass(each, base))
    similar = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else f"known are {', '.join(known)}."
    msg = f"There is no {base.__name__} called {class_path!r}: {hint}"
    raise ValueError(msg)


def resolve_arguments(found: type, arguments: Mapping[str, Any], left_out: set[str], owner: str) -> dict[str, Any]:
    """Check a class's arguments and complete them by its defaults.

    Args:
        found: The class.
        arguments: Given arguments.
        left_out: Arguments that must not be given.
        owner: Whose arguments they are, for errors.

    Returns:
        All arguments as JSON holds them.

    Raises:
        ValueError: If there is no such argument or a value is of the wrong type.
    """
    parser = _parser(found, left_out)
    try:
        parsed = parser.parse_object({"it": dict(arguments)})
    except (ArgumentError, ValueError, TypeError) as error:
        msg = f"{owner}: {one_line(error)}"
        raise ValueError(msg) from error
    resolved: dict[str, Any] = json.loads(parser.dump(parsed, format="json", skip_none=False)).get("it", {})
    return resolved


def instantiate_arguments(found: type, arguments: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Return resolved arguments as the class takes them, with objects instantiated."""
    parser = _parser(found, left_out)
    made = parser.instantiate_classes(parser.parse_object({"it": dict(arguments)})).get("it")
    return {} if made is None else dict(vars(made))


def instantiate(found: type, arguments: Mapping[str, Any], **components: Any) -> Any:
    """Build an object from resolved arguments, and others that were left out there."""
    return found(**instantiate_arguments(found, arguments, set(components)), **components)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings; a value that is not a mapping replaces the previous one."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, with jsonargparse's names of arguments made plain."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.replace('Parser key "it.', 'argument "').replace("Key 'it.", "argument '")
    return text.replace("'it.", "'").replace("Group 'it' ", "")


def _parser(found: type, left_out: set[str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    skipped: set[str | int] = {name for name in inspect.signature(found).parameters if name in left_out}
    parser.add_class_arguments(found, "it", skip=skipped, instantiate=False, fail_untyped=False, sub_configs=True)
    return parser
