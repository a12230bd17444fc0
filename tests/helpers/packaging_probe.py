"""Runs in the fresh environment of `test_packaging.py`: tries many things for the price of one start of torch.

Anomalib's dependencies are imported once; then every probe runs in a child process of its own (`os.fork`), which
imports Anomalib, and with it our package through the installed `.pth` file, as a new process would. The commands run
the installed scripts themselves. Prints one JSON object: probe -> {"code", "out"}.

Usage: python packaging_probe.py <anomalib script> <anomalib-exdd script> <scratch folder>
"""

# ruff: noqa: PLC0415, T201  (the moment of an import is what is tested, and the output is the result)

import contextlib
import csv
import importlib
import json
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

SCRIPTS = {"anomalib": sys.argv[1], "anomalib-exdd": sys.argv[2]}
SCRATCH = Path(sys.argv[3])
DEPENDENCIES = [
    "torch", "torchvision", "lightning.pytorch", "timm", "kornia", "cv2", "sklearn", "skimage", "pandas",
    "matplotlib.pyplot", "torchmetrics", "jsonargparse", "FrEIA", "onnx",
]  # fmt: skip

FIRST_IMPORTS = [
    "import anomalib.data",
    "from anomalib.models import Patchcore, ExDD",
    "import anomalib_exdd.models.exdd.lightning_model",
    "from anomalib_exdd.data import KSDD2",
    "from anomalib_exdd import SurfaceSample",
]
CHECK_REGISTRATION = """
import anomalib.data, anomalib.models, anomalib_exdd
assert anomalib.models.ExDD is anomalib_exdd.ExDD
for name in ("KSDD2", "DefectFolder", "SurfaceSample"):
    assert getattr(anomalib.data, name) is getattr(anomalib_exdd, name)
"""

SMALL = {"backbone": "resnet18", "pre_trained": False, "image_size": [64, 64]}
COMMANDS = {
    **{
        f"{command} plain names": ["anomalib", command, "--model", "ExDD", "--data", "KSDD2", "--print_config"]
        for command in ("train", "fit", "validate", "test", "export")
    },
    "train other data": ["anomalib", "train", "--model", "ExDD", "--data", "SurfaceSample", "--print_config"],
    "predict plain names": ["anomalib", "predict", "--model", "ExDD", "--data", ".", "--print_config"],
    "train dotted": [
        "anomalib", "train", "--model", "anomalib_exdd.ExDD", "--data", "anomalib_exdd.KSDD2", "--print_config",
    ],
    "train settings": [
        "anomalib", "train", "--model", "ExDD", "--model.negative_ratio", "0.5", "--data", "DefectFolder",
        "--print_config",
    ],
    "help of the model": ["anomalib", "train", "--model.help", "ExDD"],
    "own script": ["anomalib-exdd", "train", "--model", "ExDD", "--data", "KSDD2", "--print_config"],
}  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    for name in DEPENDENCIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.startswith("anomalib.") for name in sys.modules), "the hook has to meet Anomalib unloaded"

    results = {first: in_child(lambda first=first: exec(first + CHECK_REGISTRATION, {})) for first in FIRST_IMPORTS}  # noqa: S102
    import anomalib.cli.cli  # noqa: F401  # from here on the children share it

    results["library"] = in_child(use_library)
    results["benchmark"] = in_child(run_benchmark)
    for name, (script, *arguments) in COMMANDS.items():
        results[name] = in_child(lambda script=script, arguments=arguments: run_script(script, arguments))
    print(json.dumps(results))


def in_child(do: Callable[[], None]) -> dict[str, object]:
    """Run in a forked process and return its exit code and everything it wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        code = 1
        try:
            do()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:  # noqa: BLE001  # the parent shows it
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        out = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"code": os.waitstatus_to_exitcode(status), "out": out}


def run_script(name: str, arguments: list[str]) -> None:
    sys.argv = [SCRIPTS[name], *arguments]
    runpy.run_path(SCRIPTS[name], run_name="__main__")


def use_library() -> None:
    """Every way by which Anomalib's functions look a class up."""
    from anomalib.data import get_datamodule
    from anomalib.models import get_model, list_models

    import anomalib_exdd

    print("version", anomalib_exdd.__version__)
    print("file", anomalib_exdd.__file__)
    print("listed", "ExDD" in list_models("pascal"))
    for model in (
        get_model("exdd", **SMALL),
        get_model("ExDD", **SMALL),
        get_model({"class_path": "ExDD", "init_args": SMALL}),
        get_model({"class_path": "anomalib.models.ExDD", "init_args": SMALL}),
        get_model({"class_path": "anomalib_exdd.ExDD", "init_args": SMALL}),
    ):
        assert type(model) is anomalib_exdd.ExDD
    for class_path in ("KSDD2", "anomalib_exdd.KSDD2", "anomalib_exdd.data.KSDD2"):
        config = {"class_path": class_path, "init_args": {"root": str(SCRATCH / "absent")}}
        assert type(get_datamodule(config)) is anomalib_exdd.KSDD2
        assert type(get_datamodule({"data": config})) is anomalib_exdd.KSDD2


def run_benchmark() -> None:
    """Anomalib's own benchmark over a grid of ours: a tiny run, model and data set found by their plain names."""
    os.chdir(SCRATCH)
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {
                "class_path": "ExDD",
                "init_args": {**SMALL, "image_size": [64, 64], "scoring": {"grid": ["ratio", "normal"]}},
            },
            "data": {"class_path": "KSDD2", "init_args": {"root": str(tiny_ksdd2(SCRATCH / "tiny")), "num_workers": 0}},
        },
    }
    (SCRATCH / "benchmark.json").write_text(json.dumps(config))
    try:
        run_script("anomalib", ["benchmark", "--config", str(SCRATCH / "benchmark.json")])
    except SystemExit as stop:  # how a console script ends, well or not
        if stop.code:
            raise
    (table,) = SCRATCH.glob("runs/benchmark/*/results.csv")
    with table.open(newline="") as file:
        print(json.dumps(list(csv.DictReader(file))))


def tiny_ksdd2(root: Path) -> Path:
    """A data set in KSDD2's layout: grey images, the defective ones with a white square."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, first, count in (("train", 10_000, 16), ("test", 20_000, 6)):
        (root / split).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(90, 110, (64, 64, 3), dtype=np.uint8)
            mask = np.zeros((64, 64), dtype=np.uint8)
            if index % 2:
                image[20:40, 20:40] = 255
                mask[20:40, 20:40] = 255
            Image.fromarray(image).save(root / split / f"{first + index}.png")
            Image.fromarray(mask).save(root / split / f"{first + index}_GT.png")
    return root


if __name__ == "__main__":
    main()
