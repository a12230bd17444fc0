"""Run every command on the generated sample and write down what came out, to compare two versions of the package.

    python benchmarks/regression.py before/                     # at the one commit
    python benchmarks/regression.py after/ --before before/     # at the other: prints what differs

A change that is to keep behaviour keeps all of this: metrics, tables, pictures (pixel by pixel), explanations, tensors
of checkpoints, outputs of exported models, synthetic images, the results of a comparison, and the names of all options.
Times, dates and places are left out. Nothing is downloaded; on two cores it takes about five minutes.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

PROGRAM = str(Path(sys.executable).with_name("anomalib-exdd"))
SIZE = "[96, 64]"
DATA = "--data SurfaceSample --data.root sample --data.num_workers 0 --data.num_defects 6"
SMALL = f"--model.backbone filter_bank --model.image_size {SIZE} --trainer.accelerator cpu"
MODEL = "results/ExDD/SurfaceSample/latest/weights/lightning/model.ckpt"
COMMANDS = {
    "train": f"train --model ExDD {DATA} {SMALL}",
    "test": f"test --model ExDD {DATA} --ckpt_path {MODEL} --trainer.accelerator cpu",
    "predict": f"predict --model ExDD --data photos --ckpt_path {MODEL} --model.explain 2 --default_root_dir predicted "
    "--trainer.accelerator cpu",
    "export": f"export --model ExDD --export_type openvino --ckpt_path {MODEL} --export_root exported",
    "export_torch": f"export --model ExDD --export_type torch --ckpt_path {MODEL} --export_root exported",
    "info": f"info --ckpt_path {MODEL} --json info.json",
    "teach": f"teach --ckpt_path {MODEL} --image photos/defect.png --mask defect_mask.png --kind new "
    "--output taught.ckpt",
    "forget": "forget --ckpt_path taught.ckpt --source defect.png --output forgotten.ckpt",
    "synthesize": "synthesize --data SurfaceSample --data.root sample --data.num_defects 5 --synthesizer "
    "PasteSynthesizer --output pasted --count 4",
    "train_synthetic": "train --model ExDD --data SyntheticDefects --data.base SurfaceSample --data.base.root sample "
    f"--data.base.num_defects 3 --data.base.num_workers 0 --data.synthetic_root pasted {SMALL}",
    "classify": f"train --model DefectClassifier {DATA} --data.val_split_ratio 0.2 --model.backbone resnet18 "
    f"--model.pre_trained false --model.image_size {SIZE} --trainer.max_epochs 1 --trainer.accelerator cpu",
    "compare": "compare --config comparison.yaml",
}
HELP = ("train", "predict", "export", "compare", "synthesize", "teach", "forget", "info")
COMPARISON = f"""
data:
  class_path: SurfaceSample
  init_args: {{root: sample, num_workers: 0, num_defects: 6, val_split_ratio: 0.2}}
image_size: {SIZE}
backbone: filter_bank
accelerator: cpu
seeds: [0]
methods:
  - {{name: ExDD, class_path: ExDD}}
  - {{name: normal, class_path: ExDD, init_args: {{scoring: normal}}, uses_defects: false}}
output: compared
"""
PLACES = re.compile(
    r"(created|time|second|date|memory|mb$|path|root|folder|command|machine|environment|version|_ms$|commit)",
    re.IGNORECASE,
)
"""Keys whose values differ from run to run."""


def run(work: Path) -> dict[str, Any]:
    """Run all commands in an empty folder and return what is to stay the same."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONHASHSEED": "0"}
    facts: dict[str, Any] = {}
    (work / "comparison.yaml").write_text(COMPARISON)
    for name, command in tqdm(COMMANDS.items(), "Commands"):
        arguments = re.findall(r"\[[^]]*\]|\S+", command)
        call = [PROGRAM, *arguments]
        done = subprocess.run(call, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            msg = f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise SystemExit(msg)
        facts[f"printed by {name}"] = sorted(set(re.findall(r"│\s+(\w+)\s+│\s+([\d.]+)\s+│", done.stdout)))
        if name == "train":
            some_photos(work)
    for name in HELP:
        call = [PROGRAM, name, "--help"]
        shown = subprocess.run(call, cwd=work, env=environment, capture_output=True, text=True, check=True).stdout
        facts[f"options of {name}"] = sorted(set(re.findall(r"--[\w.]+", shown)))
    for path in sorted(work.rglob("*")):
        if path.is_file() and "latest" not in path.parts and "sample" not in path.parts:
            facts |= dict(contents(path, str(path.relative_to(work))))
    return facts


def some_photos(work: Path) -> None:
    """Take test images of the sample to predict, and a defect to teach."""
    (work / "photos").mkdir()
    masks = sorted((work / "sample" / "test").glob("*_GT.png"))
    chosen = masks[:: max(1, len(masks) // 10)]
    for mask in chosen:
        image = mask.with_name(mask.name.replace("_GT", ""))
        shutil.copy(image, work / "photos" / image.name)
    shown = next(mask for mask in masks if Image.open(mask).convert("L").getbbox())
    shutil.copy(shown.with_name(shown.name.replace("_GT", "")), work / "photos" / "defect.png")
    shutil.copy(shown, work / "defect_mask.png")


def contents(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a file holds, without what differs from run to run."""
    if path.suffix == ".png":
        yield name, digest(np.asarray(Image.open(path)).tobytes())
    elif path.suffix == ".json":
        yield name, without_places(json.loads(path.read_text()))
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            yield name, [without_places(row) for row in csv.DictReader(file)]
    elif path.suffix == ".ckpt":
        state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
        for key, value in state.items():
            held = digest(value.contiguous().cpu().numpy().tobytes()) if isinstance(value, torch.Tensor) else str(value)
            yield f"{name}: {key}", held
    elif path.suffix == ".xml" and path.with_suffix(".bin").is_file():
        yield name, outputs(path)


def outputs(model: Path) -> dict[str, Any]:
    """Return what an exported model says of one made-up image."""
    from openvino import Core  # noqa: PLC0415

    image = np.random.default_rng(0).random((1, 3, 120, 90), dtype=np.float32)
    found = Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)
    return {out.any_name: [round(float(v), 4) for v in np.ravel(value)[::50]] for out, value in found.items()}


def without_places(value: Any) -> Any:
    """Leave out times and places, and round the last digits away."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items() if not PLACES.search(key)}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return without_places(json.loads(value))
        return Path(value).name if "/" in value else value
    return float(f"{value:.5g}") if isinstance(value, float) else value


def digest(content: bytes) -> str:
    """Return the first digits of a hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> None:
    """Run the commands, and compare with another run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="empty folder to work in")
    parser.add_argument("--before", type=Path, help="folder of the run to compare with")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    facts = json.loads(json.dumps(run(options.folder.resolve())))
    (options.folder / "facts.json").write_text(json.dumps(facts, indent=1))
    print(f"{len(facts)} facts in {options.folder / 'facts.json'}")
    if options.before is None:
        return
    before = json.loads((options.before / "facts.json").read_text())
    different = [name for name in sorted({*facts, *before}) if facts.get(name) != before.get(name)]
    for name in different:
        print(f"differs: {name}\n  before {str(before.get(name))[:300]}\n  after  {str(facts.get(name))[:300]}")
    if different:
        msg = f"{len(different)} of {len(facts)} facts differ"
        raise SystemExit(msg)
    print("Everything is the same.")


if __name__ == "__main__":
    main()
