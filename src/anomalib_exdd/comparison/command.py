"""`anomalib compare`: any models of Anomalib's side by side, on the same data, measured alike."""

import json
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from tqdm import tqdm

from anomalib_exdd.commands.subcommand import Subcommand
from anomalib_exdd.comparison.machine import describe
from anomalib_exdd.comparison.report import write_report
from anomalib_exdd.comparison.results import (
    METRICS,
    Comparison,
    Method,
    Run,
    read_images,
    write_comparison,
    write_json,
)

from .allocation import conditions
from .bootstrap import RunScores, all_differences
from .config import ComparisonSettings, Methods, MethodSettings, folder_name
from .data import DataFiles, counts, test_images
from .histograms import PixelHistograms
from .instantiation import one_line
from .methods import PreparedMethod, prepare
from .progress import read_progress
from .scheduler import PlannedRun, stop, wait
from .tables import differences_table, failures, line, summary, write_csv, write_markdown

MARKER_NAME = "comparison.json"
"""File that says whose results a folder holds."""
_PACKAGES = ("anomalib-exdd", "anomalib", "torch", "torchvision", "timm", "lightning", "numpy")
_ENVIRONMENT = (*_PACKAGES, "processor", "accelerator", "memory allocation")  # that results depend on
_HOW = {"root", "base", "seed", "num_workers", "num_defects", "count"}
_HOW_ENDS = ("batch_size", "augmentations", "split_mode", "split_ratio")
"""Arguments of data modules that say how data are used, not which they are; folders are compared on their own."""
_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
_KEPT = "Finished runs are kept; the same command goes on from there."


class Compare(Subcommand):
    """Compare models on the same data: metrics, differences, time and memory, as tables and a report."""

    @staticmethod
    def get_parser() -> ArgumentParser:
        """Return the parser of the subcommand's arguments."""
        return _parser()

    def run(self, config: Namespace) -> None:
        """Run the subcommand, and end with one line where input or machine do not suffice, or when interrupted."""
        try:
            super().run(config)
        except (RuntimeError, OSError) as error:  # no network for the data, no space on the disk
            msg = f"Error: {one_line(error)} ({_KEPT})"
            raise SystemExit(msg) from error
        except KeyboardInterrupt as error:
            print(f"Interrupted. {_KEPT}", file=sys.stderr)
            raise SystemExit(_INTERRUPTED) from error

    def call(self, config: Namespace) -> None:
        """Run what is missing, write the results and say what came out."""
        comparison = run_comparison(settings_of(self.get_parser(), config), command=_this_command())
        failed = sum(bool(run.error) for run in comparison.runs)
        if failed:
            msg = f"{failed} of {len(comparison.runs)} runs failed; the same command tries them again."
            raise SystemExit(msg)


def _parser(*, exit_on_error: bool = True) -> ArgumentParser:
    parser = ArgumentParser(
        description="Compare models on the same data: same images, splits, input size and backbone for all, as far as "
        "they allow it; the results say where they do not. Every run has a process of its own on one device; what is "
        "finished is kept when the command is given again. Start with configs/compare_sample.yaml.",
        exit_on_error=exit_on_error,
    )
    add = parser.add_argument
    add("-c", "--config", action=ActionConfigFile, help="Configuration file in YAML, such as configs/compare_*.yaml.")
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    add(
        "--methods",
        type=Methods,
        required=True,
        help="List of methods in the order of the table. Each has a name, class_path and init_args of its model, and "
        "where needed: trainer (arguments such as max_epochs), data (arguments of the data module that it needs "
        "otherwise, such as train_batch_size), image_size (of its own), uses_defects (whether it sees defective "
        "training images; default: ExDD, DefectClassifier and supervised models do), notes (list of texts), published "
        "(metrics, 0 to 1, to print beside), published_source.",
    )
    add("--baseline", type=str | None, help="Method that the others are compared with; default: the first one.")
    add(
        "--only",
        type=list[str],
        default=[],
        help='Names of the methods to run and to show, such as --only "[ExDD, Patchcore]"; default: all. What others '
        "have finished in the folder is kept for a later call. Without its baseline they are compared with the first "
        "of them.",
    )
    add("--seeds", type=list[int], default=[0, 1, 2], help="Seeds of splits, models and trainings: a run for each.")
    add(
        "--image_size",
        type=tuple[int, int] | None,
        help="Height and width of every method's input; default: each model's own.",
    )
    add("--backbone", type=str | None, help="timm model for every method that lets one choose it.")
    add("--layers", type=list[str] | None, help="Its layers, likewise.")
    add("--weights", type=Path | None, help="Local file of its weights (.safetensors, .pth), for all of them.")
    add("--quick", type=bool, default=False, help="Cut every training to 3 epochs of 20 batches, to try things out.")
    add("--resamples", type=int, default=1000, help="Resamples of the bootstrap, for the confidence intervals.")
    add("--accelerator", type=str, default="auto", help="Kind of device, as of Lightning: auto, cpu, gpu, mps.")
    add("--title", type=str, default="", help="Heading of the results.")
    add("--output", type=Path, required=True, help="Folder to write; goes on with what an earlier call left.")
    return parser


def compare(config: str | Path | Mapping[str, Any], **changes: Any) -> Comparison:
    """Compare models from Python.

    Args:
        config: Configuration file of `anomalib compare`, or its content.
        changes: Settings to change, such as `seeds=[0]`.

    Returns:
        What `results.json` holds; a run that failed has an `error`.

    Raises:
        ValueError: If the settings are wrong.

    Example:
        >>> from anomalib_exdd import compare
        >>> results = compare("configs/compare_sample.yaml", seeds=[0])  # doctest: +SKIP
        >>> results.of("ExDD")[0].metrics["image_AUROC"]  # doctest: +SKIP
    """
    content = dict(config) if isinstance(config, Mapping) else _read_config(Path(config))
    parser = _parser(exit_on_error=False)
    try:
        parsed = parser.parse_object({**content, **changes})
    except (ArgumentError, TypeError) as error:
        raise ValueError(one_line(error)) from error
    return run_comparison(settings_of(parser, parsed))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        msg = f"Argument `config` has to be a file or a mapping, but there is no file {path}."
        raise ValueError(msg)
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def settings_of(parser: ArgumentParser, config: Namespace) -> ComparisonSettings:
    """Turn parsed arguments into settings."""
    plain = json.loads(parser.dump(config, format="json", skip_none=False))
    return ComparisonSettings(
        data=plain["data"],
        methods=[MethodSettings.read(each) for each in config.methods],
        output=config.output,
        seeds=list(config.seeds),
        baseline=config.baseline,
        only=list(config.only),
        image_size=None if config.image_size is None else (config.image_size[0], config.image_size[1]),
        backbone=config.backbone,
        layers=config.layers,
        weights=config.weights,
        quick=config.quick,
        accelerator=config.accelerator,
        resamples=config.resamples,
        title=config.title,
    )


def run_comparison(settings: ComparisonSettings, command: str = "") -> Comparison:
    """Run what is missing of a comparison and write its folder.

    Args:
        settings: What to compare.
        command: Command that does it again.

    Raises:
        ValueError: If the settings, the data or the folder do not allow it.
    """
    methods = [prepare(method, settings) for method in settings.selected]
    files = DataFiles()
    by_seed = {seed: [m.run_settings(settings, seed) for m in methods] for seed in settings.seeds}
    files.read_all(run["data"] for runs in by_seed.values() for run in runs)
    _check_test_images(by_seed, files)
    _claim(settings)
    machine = describe() | conditions()
    environment = {name: machine[name] for name in _ENVIRONMENT if name in machine}
    planned = [_plan(run, files, environment, settings.output) for seed in settings.seeds for run in by_seed[seed]]
    manifest = files.write({s: [run["data"] for run in runs] for s, runs in by_seed.items()}, settings.output)
    first = by_seed[settings.seeds[0]][0]["data"]
    facts: dict[str, Any] = {"name": _name(settings.data), "root": _root(settings.data), "sha256": manifest}
    facts |= counts(files.images(first))
    finished: list[Run] = []
    try:
        _run_all(planned, finished)
    finally:  # an interrupted comparison leaves tables of what there is
        comparison = _collect(settings, methods, finished, machine, facts, command)
        _write(comparison, settings)
    return comparison


def _run_all(planned: Sequence[PlannedRun], finished: list[Run]) -> None:
    known = [run.finished() for run in planned]
    finished += [run for run in known if run is not None]
    todo = [run for run, result in zip(planned, known, strict=True) if result is None]
    if finished:
        print(f"{len(finished)} of {len(planned)} runs are there already and are kept.")
    pause = 1 if sys.stderr.isatty() else 60  # seconds between two states of the bar: a file keeps them all
    bar = tqdm(
        total=len(planned),
        initial=len(finished),
        smoothing=0,
        mininterval=pause,
        miniters=0,
        bar_format="{desc}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",  # what of a run is left, not of all runs
    )
    with bar:
        for run in todo:
            if changes := run.changes():
                bar.write(f"{run.method}, seed {run.seed}: run again, because of {', '.join(changes)}.")
            bar.set_description(f"{run.method}, seed {run.seed}")
            process = run.execute()
            try:
                code = wait(process, partial(_show, bar, run.folder))
            except BaseException:
                stop(process)
                run.clean()
                raise
            bar.set_postfix_str("", refresh=False)
            result = run.result(code)
            finished.append(result)
            bar.write(line(result))
            bar.update()


def _show(bar: Any, folder: Path) -> None:
    """Let the bar tell how far the run of a folder is, when it is next drawn."""
    progress = read_progress(folder)
    bar.set_postfix_str("" if progress is None else str(progress), refresh=False)
    bar.update(0)


def _plan(run: dict[str, Any], files: DataFiles, environment: dict[str, str], output: Path) -> PlannedRun:
    place = f"runs/{folder_name(run['method'])}/{run['seed']}"
    named = (run["weights"], run["model"]["init_args"].get("weights"))
    weights = [files.sha256(str(path)) for path in named if path and Path(path).is_file()]
    settings = {"run": run, "data": files.fingerprint(run["data"]), "weights": weights, "environment": environment}
    # As a file holds them, so that they compare equal to those of an earlier call.
    return PlannedRun(output / place, place, json.loads(json.dumps(settings)))


def _check_test_images(by_seed: Mapping[int, Sequence[Mapping[str, Any]]], files: DataFiles) -> None:
    for seed, runs in by_seed.items():
        expected = test_images(files.images(runs[0]["data"]))
        for run in runs[1:]:
            if test_images(files.images(run["data"])) != expected:
                msg = (
                    f"Methods {runs[0]['method']!r} and {run['method']!r} have different test images with seed {seed}: "
                    "they can only be compared on the same. Check their `data`."
                )
                raise ValueError(msg)


def _claim(settings: ComparisonSettings) -> None:
    """Make the folder that of this comparison's data, or refuse one that is another's."""
    marker = settings.output / MARKER_NAME
    ours = {"data": _name(settings.data), "root": _root(settings.data), "arguments": _which(settings.data)}
    if marker.is_file():
        theirs = json.loads(marker.read_text(encoding="utf-8"))
        if theirs != ours:
            msg = (
                f"The folder {settings.output} has a comparison on other data ({_described(theirs)}) than this one "
                f"({_described(ours)}). Give another --output."
            )
            raise ValueError(msg)
        return
    if settings.output.exists() and (not settings.output.is_dir() or any(settings.output.iterdir())):
        msg = f"Argument `output` has to be a new or empty folder, or that of a comparison, but got {settings.output}."
        raise ValueError(msg)
    settings.output.mkdir(parents=True, exist_ok=True)
    write_json(ours, marker)


def _collect(
    settings: ComparisonSettings,
    methods: Sequence[PreparedMethod],
    finished: Sequence[Run],
    machine: dict[str, str],
    facts: dict[str, Any],
    command: str,
) -> Comparison:
    order = {method.settings.name: number for number, method in enumerate(methods)}
    runs = sorted(finished, key=lambda run: (order[run.method], run.seed))
    scores: dict[str, dict[int, RunScores]] = {}
    for run in runs:
        if not run.error:
            folder = settings.output / run.folder
            scores.setdefault(run.method, {})[run.seed] = RunScores(
                read_images(folder), PixelHistograms.load(folder), run.metrics
            )
    configuration = json.loads(json.dumps(asdict(settings), default=str))
    quick = " (a quick try: trainings were cut short)" if settings.quick else ""
    return Comparison(
        title=(settings.title or f"{len(methods)} methods on {facts['name']}") + quick,
        command=command,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        configuration=configuration,
        machine=machine,
        data=facts,
        methods=[
            Method(
                name=method.settings.name,
                class_path=method.class_path,
                arguments=method.arguments,
                notes=method.notes,
                published=method.settings.published,
                published_source=method.settings.published_source,
            )
            for method in methods
        ],
        runs=runs,
        differences=all_differences(scores, settings.reference, list(METRICS), settings.resamples),
    )


def _write(comparison: Comparison, settings: ComparisonSettings) -> None:
    folder = settings.output
    if not comparison.runs:
        return
    written = [
        write_csv(comparison, folder),
        write_comparison(comparison, folder),
        write_markdown(comparison, folder),
        write_report(folder),
    ]
    print(f"\n{comparison.title}\n\n{summary(comparison)}")
    table = differences_table(comparison)
    if table:
        print(f"\nAgainst {comparison.differences[0].baseline}, points with 95 % confidence intervals:\n\n{table}")
    for each in comparison.methods:
        if each.notes:
            print(f"\n{each.name}: {' '.join(each.notes)}", end="")
    print()
    for failure in failures(comparison):
        print(f"Failed: {failure}")
    for path in written:
        print(f"{path.name}: {path.resolve()}")


def _name(data: Mapping[str, Any]) -> str:
    return str(data["class_path"]).rpartition(".")[2]


def _root(data: Mapping[str, Any]) -> str:
    arguments = data.get("init_args") or {}
    base = arguments.get("base")
    root = arguments.get("root") or (_root(base) if isinstance(base, Mapping) else "")
    return str(Path(root).resolve()) if root else ""


def _which(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that say which data they are, those of a base included."""
    arguments = data.get("init_args") or {}
    base = arguments.get("base")
    found = {f"base.{name}": value for name, value in _which(base).items()} if isinstance(base, Mapping) else {}
    chosen = {name: value for name, value in arguments.items() if name not in _HOW and not name.endswith(_HOW_ENDS)}
    return json.loads(json.dumps({**found, **chosen}, default=str))  # type: ignore[no-any-return]


def _described(marker: Mapping[str, Any]) -> str:
    given = [f"{name} {value}" for name, value in marker.get("arguments", {}).items() if value is not None]
    return ", ".join([f"{marker['data']} in {marker['root']}", *given])


def _this_command() -> str:
    return shlex.join(["anomalib", *sys.argv[1:]]) if "compare" in sys.argv[1:2] else ""
