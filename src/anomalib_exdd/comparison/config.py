"""Settings of a comparison, and the classes that they name: found, their arguments resolved, and instantiated.

Classes are treated as Anomalib's command line does it, but one at a time and with errors of one line.
"""

import inspect
import json
import pydoc
import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from .results import METRICS


@dataclass(frozen=True)
class MethodConfig:
    """A method of the comparison.

    Attributes:
        name: Name in tables, unique.
        class_path: Class of the model, plain or dotted, as for `anomalib train`.
        init_args: Its arguments; those that all methods share are added to them.
        trainer: Arguments of Lightning's trainer, such as `max_epochs`.
        data: Arguments of the data module that this method needs otherwise, such as `train_batch_size`.
        image_size: Height and width of its input, if it cannot take that of the others.
        uses_defects: Whether it sees defective training images; default: ExDD, DefectClassifier and supervised models.
        notes: Texts to show below the table.
        published: Published metrics on the same data, 0 to 1.
        published_source: Where they were published.
    """

    name: str
    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    uses_defects: bool | None = None
    notes: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    published_source: str = ""

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        for metric, value in self.published.items():
            if metric not in METRICS or not 0 <= value <= 1:
                known = ", ".join(METRICS)
                msg = f"Method {self.name!r}: `published` takes {known}, from 0 to 1, but got {metric}: {value}."
                raise ValueError(msg)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "MethodConfig":
        """Read a method of a configuration file.

        Raises:
            ValueError: If a setting is missing, unknown or of the wrong type.
        """
        # One method at a time: of a list of dataclasses, jsonargparse takes `class_path` for the dataclass's own.
        given = {name: value for name, value in content.items() if value is not None}
        return instantiate(cls, resolve_arguments(cls, given, f"Method {content.get('name')!r}"))


@dataclass(frozen=True)
class ComparisonConfig:
    """Which methods are compared, on which data, and how.

    Attributes:
        data: Data module: `class_path` and `init_args`.
        methods: Methods, in the order of the table.
        output: Folder to write; goes on with what an earlier call left.
        baseline: Method that the others are compared with; default: the first one.
        only: Names of the methods to run and to show, such as --only "[ExDD, Patchcore]"; default: all. What others
            have finished in the folder is kept for a later call. Without its baseline they are compared with the first
            of them.
        seeds: Seeds of splits, models and trainings: a run for each.
        image_size: Height and width of every method's input; default: each model's own.
        backbone: timm model for every method that lets one choose it.
        layers: Its layers, likewise.
        weights: Local file of its weights (.safetensors, .pth), for all of them.
        quick: Cut every training to 3 epochs of 20 batches, to try things out.
        resamples: Resamples of the bootstrap, for the confidence intervals.
        accelerator: Kind of device, as of Lightning: auto, cpu, gpu, mps.
        title: Heading of the results.
    """

    data: dict[str, Any]
    methods: list[MethodConfig]
    output: Path
    baseline: str | None = None
    only: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    image_size: tuple[int, int] | None = None
    backbone: str | None = None
    layers: list[str] | None = None
    weights: Path | None = None
    quick: bool = False
    resamples: int = 1000
    accelerator: str = "auto"
    title: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        names = [method.name for method in self.methods]
        folders = [folder_of(name) for name in names]
        twice = [name for name in names if folders.count(folder_of(name)) > 1]
        unknown = [name for name in self.only if name not in names]
        given = self.weights
        for is_wrong, msg in (
            (not names, "Argument `methods` has to name at least one method."),
            (twice, f"Argument `methods` has several for the same folder of runs: rename all but one of {twice}."),
            (
                self.baseline not in {None, *names},
                f"Argument `baseline` has to be one of the methods, {names}, but got {self.baseline!r}.",
            ),
            (unknown, f"Argument `only` has to name some of the methods, {names}, but got {unknown}."),
            (
                not self.seeds or len(set(self.seeds)) < len(self.seeds),
                f"Argument `seeds` has to be a list of different numbers, but got {self.seeds}.",
            ),
            (given and not given.is_file(), f"Argument `weights` has to be a file, but there is none at {given}."),
            (given and not self.backbone, f"Argument `weights` ({given}) needs the `backbone` that they belong to."),
            (self.resamples < 100, f"Argument `resamples` has to be at least 100, but got {self.resamples}."),
        ):
            if is_wrong:
                raise ValueError(msg)

    @property
    def selected(self) -> list[MethodConfig]:
        """The methods that take part, in their order."""
        return [method for method in self.methods if not self.only or method.name in self.only]

    @property
    def reference(self) -> str:
        """Name of the method that the others are compared with: the baseline, or the first if it takes no part."""
        names = [method.name for method in self.selected]
        return self.baseline if self.baseline in names else names[0]


def folder_of(method: str) -> str:
    """Return the name of the folder of a method's runs."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", method).strip("._") or "method"


def find_class(class_path: str, base: type) -> type:
    """Find a class by its dotted name, or by its plain name in Anomalib's package of the base class.

    Raises:
        ValueError: If there is no such class derived from `base`.
    """
    home = ".".join(base.__module__.split(".")[:2])  # anomalib.models or anomalib.data
    found = pydoc.locate(class_path if "." in class_path else f"{home}.{class_path}")
    if inspect.isclass(found) and issubclass(found, base):
        return found
    classes = [each for each in vars(import_module(home)).values() if inspect.isclass(each) and each is not base]
    known = sorted(each.__name__ for each in classes if issubclass(each, base))
    msg = f"There is no {base.__name__} called {class_path!r}: known are {', '.join(known)}."
    raise ValueError(msg)


def resolve_arguments(
    found: type, arguments: Mapping[str, Any], owner: str, left_out: Iterable[str] = ()
) -> dict[str, Any]:
    """Check a class's arguments, complete them by its defaults, and return them as JSON holds them.

    Raises:
        ValueError: If there is no such argument or a value is of the wrong type; `owner` says whose it is.
    """
    parser = _parser(found, left_out)
    try:
        parsed = parser.parse_object(dict(arguments))
    except (ArgumentError, ValueError, TypeError) as error:
        msg = f"{owner}: {one_line(error)}"
        raise ValueError(msg) from error
    return dict(json.loads(parser.dump(parsed, format="json", skip_none=False)))


def instantiate_arguments(found: type, arguments: Mapping[str, Any], left_out: Iterable[str] = ()) -> dict[str, Any]:
    """Return resolved arguments as the class takes them, with objects instantiated."""
    parser = _parser(found, left_out)
    return dict(vars(parser.instantiate_classes(parser.parse_object(dict(arguments)))))


def instantiate(found: type, arguments: Mapping[str, Any], **components: Any) -> Any:
    """Build an object from resolved arguments, and others that were left out there."""
    return found(**instantiate_arguments(found, arguments, components), **components)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings; a value that is not a mapping replaces the previous one."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, with jsonargparse's name for an argument made plain."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace('Parser key "', 'argument "').replace("Key '", "argument '")


def _parser(found: type, left_out: Iterable[str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, skip={*left_out}, instantiate=False, fail_untyped=False, sub_configs=True)
    return parser
