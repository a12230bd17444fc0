"""`anomalib compare`: any models of Anomalib side by side, on the same data, measured alike."""

import json
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from anomalib_exdd.commands.subcommand import Subcommand

from .bootstrap import paired_differences
from .config import ComparisonConfig, MethodConfig, folder_of, one_line
from .data import DataFiles, counts, test_images
from .environment import PACKAGES, describe, describe_allocation
from .methods import resolve_method
from .report import REPORT_NAME, write_report
from .report.tables import CSV_NAME, MARKDOWN_NAME, write_tables
from .results import RESULTS_NAME, Comparison, Run, read_run, write_json
from .scheduler import PlannedRun, changed, execute_all

MARKER_NAME = "comparison.json"
"""File that identifies the data of a folder's results."""
_ENVIRONMENT = {*PACKAGES, "processor", "accelerator", "memory allocation"} - {"faiss-cpu", "faiss-gpu"}
"""Of the machine's description, what results depend on."""
_USE = {"root", "base", "seed", "num_workers", "num_defects", "count"}
_USE_ENDINGS = ("batch_size", "augmentations", "split_mode", "split_ratio")
"""Arguments of data modules that say how data are used, not which they are; folders are compared on their own."""
_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


class Compare(Subcommand):
    """Compare models on the same data: metrics, differences, time and memory, as tables and a report."""

    kept = "Finished runs are kept; the same command goes on from there."

    @staticmethod
    def get_parser(*, exit_on_error: bool = True) -> ArgumentParser:
        """Return the parser of the subcommand's arguments."""
        parser = ArgumentParser(
            description="Compare models on the same data: same images, splits, input size and backbone for all, as far "
            "as they allow it; the results say where they do not. Every run has a process of its own on one device; "
            "what is finished is kept when the command is given again. Start with configs/compare_sample.yaml.",
            exit_on_error=exit_on_error,
        )
        config_help = "Configuration file in YAML, such as configs/compare_*.yaml."
        parser.add_argument("-c", "--config", action=ActionConfigFile, help=config_help)
        parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
        settings = " ".join(str(MethodConfig.__doc__).partition("Attributes:")[2].split())
        methods_help = f"List of methods, in the order of the table. Each has a name and a class_path. {settings}"
        parser.add_argument("--methods", type=list[dict[str, Any]], required=True, help=methods_help)
        parser.add_class_arguments(ComparisonConfig, skip={"data", "methods"}, instantiate=False)
        return parser

    def run(self, config: Namespace) -> None:
        """Run the subcommand; end with one line when interrupted, too."""
        try:
            super().run(config)
        except KeyboardInterrupt as error:
            print(f"Interrupted. {self.kept}", file=sys.stderr)
            raise SystemExit(_INTERRUPTED) from error

    def call(self, config: Namespace) -> None:
        """Execute what is missing, write the results and print them."""
        command = shlex.join(["anomalib", *sys.argv[1:]]) if "compare" in sys.argv[1:2] else ""
        comparison = run_comparison(read_config(self.get_parser(), config), command)
        failed = sum(bool(run.error) for run in comparison.runs)
        if failed:
            msg = f"{failed} of {len(comparison.runs)} runs failed; the same command tries them again."
            raise SystemExit(msg)


def compare(config: str | Path | Mapping[str, Any], **changes: Any) -> Comparison:
    """Compare models from Python.

    Args:
        config: Configuration file of `anomalib compare`, or its content.
        changes: Settings to change, such as `seeds=[0]`.

    Returns:
        The content of `results.json`; a run that failed has an `error`.

    Raises:
        ValueError: If the settings are wrong.

    Example:
        >>> from anomalib_exdd import compare
        >>> results = compare("configs/compare_sample.yaml", seeds=[0])  # doctest: +SKIP
        >>> results.of("ExDD")[0].metrics["image_AUROC"]  # doctest: +SKIP
    """
    if isinstance(config, Mapping):
        content = dict(config)
    elif Path(config).is_file():
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    else:
        msg = f"Argument `config` has to be a file or a mapping, but there is no file {config}."
        raise ValueError(msg)
    parser = Compare.get_parser(exit_on_error=False)
    try:
        parsed = parser.parse_object({**content, **changes})
    except (ArgumentError, TypeError) as error:
        raise ValueError(one_line(error)) from error
    return run_comparison(read_config(parser, parsed))


def read_config(parser: ArgumentParser, config: Namespace) -> ComparisonConfig:
    """Turn parsed arguments into the settings of a comparison."""
    settings = config.as_dict()
    settings.pop("config", None)
    settings["data"] = json.loads(parser.dump(config, format="json", skip_none=False))["data"]
    settings["methods"] = [MethodConfig.from_dict(each) for each in config.methods]
    return ComparisonConfig(**settings)


def run_comparison(config: ComparisonConfig, command: str = "") -> Comparison:
    """Execute the missing runs of a comparison and write its folder.

    Raises:
        ValueError: If the settings, the data or the folder do not allow it.
    """
    methods = [resolve_method(method, config) for method in config.selected]
    settings = [method.run_settings(config, seed) for seed in config.seeds for method in methods]
    files = DataFiles()
    _check_test_images(settings, files)
    claim_folder(config)
    data = _identity(config.data)
    facts: dict[str, Any] = {"name": data["data"], "root": data["root"], "sha256": files.write(settings, config.output)}
    facts |= counts(files.images(settings[0]["data"]))
    machine = describe() | describe_allocation()
    environment = {name: value for name, value in machine.items() if name in _ENVIRONMENT}
    planned = [_plan(run, files, environment, config.output) for run in settings]
    finished: list[Run] = []
    try:
        execute_all(planned, finished)
    finally:  # also after an interruption, with the runs that have finished
        order = [method.config.name for method in methods]
        runs = sorted(finished, key=lambda run: (order.index(run.method), run.seed))
        comparison = Comparison(
            title=(config.title or f"{len(methods)} methods on {facts['name']}")
            + (" (a quick try: trainings were cut short)" if config.quick else ""),
            command=command,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            configuration=json.loads(json.dumps(asdict(config), default=str)),
            machine=machine,
            data=facts,
            methods=[each.described for each in methods],
            runs=runs,
            differences=paired_differences(
                [read_run(run, config.output) for run in runs if not run.error], config.reference, config.resamples
            ),
        )
        if runs:
            _write(comparison, config.output)
    return comparison


def claim_folder(config: ComparisonConfig) -> None:
    """Mark the output folder with the data of this comparison.

    Raises:
        ValueError: If it holds a comparison on other data, or something else.
    """
    marker, ours = config.output / MARKER_NAME, _identity(config.data)
    if marker.is_file():
        if differing := changed(json.loads(marker.read_text(encoding="utf-8")), ours):
            names = ", ".join(sorted(differing))
            msg = f"The folder {config.output} has a comparison on other data: {names} differ. Give another --output."
            raise ValueError(msg)
        return
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        msg = f"Argument `output` has to be a new or empty folder, or that of a comparison, but got {config.output}."
        raise ValueError(msg)
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(ours, marker)


def _check_test_images(runs: Iterable[Mapping[str, Any]], files: DataFiles) -> None:
    expected: dict[int, tuple[str, list[str]]] = {}  # by seed: the first method and its test images
    for run in runs:
        tested = test_images(files.images(run["data"]))
        first, images = expected.setdefault(run["seed"], (run["method"], tested))
        if tested != images:
            msg = (
                f"Methods {first!r} and {run['method']!r} have different test images with seed {run['seed']}: "
                "they can only be compared on the same. Check their `data`."
            )
            raise ValueError(msg)


def _plan(run: Mapping[str, Any], files: DataFiles, environment: Mapping[str, str], output: Path) -> PlannedRun:
    """Plan a run with all that its result depends on."""
    named = (run["weights"], run["model"]["init_args"].get("weights"))
    weights = [files.sha256(str(path)) for path in named if path and Path(path).is_file()]
    settings = {"run": run, "data": files.fingerprint(run["data"]), "weights": weights, "environment": environment}
    folder = output / "runs" / folder_of(run["method"]) / str(run["seed"])
    return PlannedRun(folder, json.loads(json.dumps(settings)))


def _write(comparison: Comparison, folder: Path) -> None:
    """Write the results, tables and report, and print the tables."""
    write_json(asdict(comparison), folder / RESULTS_NAME)
    print(write_tables(folder))
    write_report(folder)
    for name in (CSV_NAME, RESULTS_NAME, MARKDOWN_NAME, REPORT_NAME):
        print(f"{name}: {(folder / name).resolve()}")


def _identity(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return name and root of the data, and the arguments that say which data they are, including those of a base."""
    arguments = data.get("init_args") or {}
    base: dict[str, Any] = {"root": "", "arguments": {}}
    if isinstance(arguments.get("base"), Mapping):
        base = _identity(arguments["base"])
    chosen = {f"base.{name}": value for name, value in base["arguments"].items()}
    chosen |= {name: value for name, value in arguments.items() if name not in _USE and not name.endswith(_USE_ENDINGS)}
    return {
        "data": str(data["class_path"]).rpartition(".")[2],
        "root": str(Path(arguments["root"]).resolve()) if arguments.get("root") else base["root"],
        "arguments": json.loads(json.dumps(chosen, default=str)),
    }
