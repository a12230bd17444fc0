"""What a comparison is asked to do."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import register_type

from anomalib_exdd.comparison.results import METRICS


@dataclass(frozen=True)
class MethodSettings:
    """A method that takes part.

    Attributes:
        name: Name in tables, unique.
        class_path: Class of the model, plain or dotted, as for `anomalib train`.
        init_args: Its arguments; those that all methods share are added to them.
        trainer: Arguments of Lightning's trainer: how long it trains, such as `max_epochs`.
        data: What this method needs otherwise in the data module's `init_args`, such as `train_batch_size: 1`.
        image_size: Height and width of its input, if it cannot take that of the others.
        uses_defects: Whether it sees defective training images; None: ExDD, and models with `supervised: true`, do.
        notes: What the table has to say of it.
        published: Published metrics on the same data, 0 to 1, by their names in :data:`.METRICS`.
        published_source: Where those are from.
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

    @classmethod
    def read(cls, content: Any) -> "MethodSettings":
        """Read a method from a configuration.

        Raises:
            ValueError: If a setting is missing, unknown or of the wrong kind.
        """
        if not isinstance(content, Mapping) or not isinstance(content.get("name"), str) or not content["name"].strip():
            msg = f"Every method needs a `name`, but got {content}."
            raise ValueError(msg)
        owner = f"Method {content['name']!r}"
        kinds: dict[str, type] = {
            "init_args": Mapping,
            "trainer": Mapping,
            "data": Mapping,
            "published": Mapping,
            "notes": list,
        }
        kinds |= {"class_path": str, "published_source": str, "uses_defects": bool}
        known = {each.name: each for each in fields(cls)}
        if unknown := sorted(set(content) - set(known)):
            msg = f"{owner} has the unknown setting `{unknown[0]}`. Known are {', '.join(known)}."
            raise ValueError(msg)
        given = {name: value for name, value in content.items() if value is not None}
        for name, kind in kinds.items():
            if name in given and not isinstance(given[name], kind):
                word = {Mapping: "a mapping", list: "a list", str: "a text", bool: "true or false"}[kind]
                msg = f"{owner}: setting `{name}` has to be {word}, but got {given[name]}."
                raise ValueError(msg)
        for name, each in known.items():
            if each.default is MISSING and each.default_factory is MISSING and name not in given:
                msg = f"{owner} lacks the setting `{name}`."
                raise ValueError(msg)
        if "image_size" in given:
            given["image_size"] = _size(given["image_size"], f"{owner}: setting `image_size`")
        for metric, value in given.get("published", {}).items():
            if metric not in METRICS or not isinstance(value, int | float) or not 0 <= value <= 1:
                msg = (
                    f"{owner}: setting `published` has to give metrics of {', '.join(METRICS)} as numbers from 0 to 1, "
                    f"but got {metric}: {value}."
                )
                raise ValueError(msg)
        return cls(**given)

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return folder_name(self.name)


@dataclass(frozen=True)
class ComparisonSettings:
    """A comparison.

    Attributes:
        data: Data module: `class_path` and `init_args`, all of them.
        methods: Methods, in the order of the table.
        output: Folder to write.
        seeds: Seeds of splits, models and trainings.
        baseline: Method that the others are compared with.
        only: Names of the methods that take part this time; none: all.
        image_size: Height and width of every method's input; None: each model's own.
        backbone: timm model of every method that has a choice; None: each model's own.
        layers: Its layers, likewise.
        weights: File of its weights; None: timm's.
        quick: Cut every training short.
        accelerator: Kind of device, as of Lightning.
        resamples: Resamples of the bootstrap.
        title: Heading of the results.
    """

    data: dict[str, Any]
    methods: Sequence[MethodSettings]
    output: Path
    seeds: Sequence[int] = (0, 1, 2)
    baseline: str | None = None
    only: Sequence[str] = ()
    image_size: tuple[int, int] | None = None
    backbone: str | None = None
    layers: Sequence[str] | None = None
    weights: Path | None = None
    quick: bool = False
    accelerator: str = "auto"
    resamples: int = 1000
    title: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        names = [method.name for method in self.methods]
        if not names:
            msg = "Argument `methods` has to name at least one method."
            raise ValueError(msg)
        for kind, given in (("name", names), ("folder", [method.folder for method in self.methods])):
            twice = sorted({each for each in given if given.count(each) > 1})
            if twice:
                msg = (
                    f"Argument `methods` has several methods with the {kind} {twice[0]!r}: give each a name of its own."
                )
                raise ValueError(msg)
        if self.baseline is not None and self.baseline not in names:
            msg = f"Argument `baseline` has to be one of the methods, {names}, but got {self.baseline!r}."
            raise ValueError(msg)
        if unknown := [name for name in self.only if name not in names]:
            msg = f"Argument `only` has to name some of the methods, {names}, but got {unknown[0]!r}."
            raise ValueError(msg)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            msg = f"Argument `seeds` has to be a list of different numbers from 0 on, but got {list(self.seeds)}."
            raise ValueError(msg)
        if self.weights is not None and not self.weights.is_file():
            msg = f"Argument `weights` has to be a file, but there is none at {self.weights}."
            raise ValueError(msg)
        if self.weights is not None and self.backbone is None:
            msg = f"Argument `weights` is given ({self.weights}), but not `backbone`: name the network they belong to."
            raise ValueError(msg)
        if self.resamples < 100:
            msg = f"Argument `resamples` has to be at least 100, but got {self.resamples}."
            raise ValueError(msg)

    @property
    def selected(self) -> list[MethodSettings]:
        """The methods that take part, in their order."""
        return [method for method in self.methods if not self.only or method.name in self.only]

    @property
    def reference(self) -> str:
        """Name of the method that the others are compared with: the baseline, or the first if that takes no part."""
        names = [method.name for method in self.selected]
        return next((name for name in names if name == self.baseline), names[0])


class Methods(tuple[Any, ...]):
    """Methods as a configuration gives them: read by :meth:`MethodSettings.read`, not by jsonargparse.

    jsonargparse would take their `class_path` for that of a setting.
    """

    __slots__ = ()


def folder_name(method: str) -> str:
    """Return the name of the folder of a method's runs."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", method).strip("._") or "method"


def _read_methods(content: Any) -> Methods:
    if isinstance(content, str):
        content = yaml.safe_load(content)
    if not isinstance(content, list | tuple):
        msg = f"Argument `methods` has to be a list of methods, but got {content}."
        raise ValueError(msg)  # noqa: TRY004  what jsonargparse expects
    return Methods(content)


def _size(value: Any, owner: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        msg = f"{owner} has to be height and width, such as [224, 224], but got {value}."
        raise ValueError(msg)
    return value[0], value[1]


register_type(Methods, list, _read_methods)
