"""Every command of README and documentation: `anomalib` accepts it, and it runs, on small images and networks.

`make docs-commands` runs this file alone. Files and folders that a page takes for granted are made up. The commands and
the Python code of a page run in its order; all pages share one folder.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from anomalib.cli import AnomalibCLI
from jsonargparse import ArgumentParser
from PIL import Image

from anomalib_exdd.comparison.command import Compare, read_config
from made_up_surfaces import make_surfaces

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

ONLY_PARSED = {
    "compare_patchcore.yaml": "downloads networks and takes a GPU for a day",
    "in_and_out/zero_shot.yaml": "trains a ResNet-50 for each cell of a table",
    "synthesize_diag.yaml": "downloads 7 GB for a GPU",
    "synthesize_dreambooth.yaml": "downloads 7 GB for a GPU",
    "--data.official_split": "names images that only KSDD2 has",
    "review --ckpt_path": "serves until it is stopped: tests/station",
    "last.ckpt": "goes on with an interrupted training: tests/models/test_defect_classifier.py",
}
SMALLER = {  # regular expression -> what is added to a command that it matches
    "^train .*ExDD": '--model.backbone resnet18 --model.pre_trained false --model.image_size "[96, 64]"',
    "^train .*[Cc]lassifier": "--model.backbone test_resnet --model.pre_trained false --trainer.max_epochs 1 "
    '--model.image_size "[96, 64]"',
    "^train .*SyntheticDefects": "--data.count 3",
    "^train ": "--data.num_workers 0",
    "^synthesize ": "--count 3",
    "^compare ": '--only "[ExDD]" --baseline ExDD --seeds "[0]"',
}
SMALL_MODEL = ("ExDD(image_size=(256, 256))", 'ExDD(image_size=(96, 64), backbone="resnet18", pre_trained=False)')


def steps(text: str) -> Iterator[str]:
    """Yield the arguments of `anomalib` commands and the Python code of a page, in its order."""
    for language, code in re.findall(r"^```(bash|python)\n(.+?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            yield code
        else:
            lines = code.replace("\\\n", " ").replace(" && uv run --no-sync ", "\n").splitlines()
            words = (shlex.split(line, comments=True) for line in lines)
            yield from (shlex.join(each[1:]) for each in words if each[:1] == ["anomalib"])


def commands_in_comments(config: Path) -> str:
    """Return the commands in a configuration's comments, which are indented there, as a page."""
    lines = re.findall(r"^#   (.+\n)", config.read_text(encoding="utf-8"), re.MULTILINE)
    return "".join(["```bash\n", *lines, "```"])


STEPS = [(page, step) for page in PAGES for step in steps(page.read_text(encoding="utf-8"))]
COMMANDS = [(page, step) for page, step in STEPS if "\n" not in step]
COMMANDS += [(config, step) for config in CONFIGS for step in steps(commands_in_comments(config))]


def names(cases: list[tuple[Path, str]]) -> list[str]:
    return [f"{page.name}: {step.splitlines()[0]}" for page, step in cases]


def test_commands_are_found() -> None:
    page = '```bash\npip install x && uv run --no-sync anomalib a --b "c d"  # e\nanomalib f \\\n    --g h\n```\n'
    page += "```text\nanomalib i\n```\n```python\nj = 1\n```\n"
    assert list(steps(page)) == ["a --b 'c d'", "f --g h", "j = 1\n"]


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    class Parsing(AnomalibCLI):
        def instantiate_classes(self) -> None:
            """Build nothing: the network would be downloaded."""

    return Parsing(["train", "--model", "ExDD"], run=False).parser


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=names(COMMANDS))
def test_arguments_are_accepted(
    page: Path, command: str, parser: ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parsed = parser.parse_args(shlex.split(command))
    if parsed.subcommand == "compare":
        assert read_config(Compare.get_parser(), parsed.compare).selected, "`--only` names methods of the file"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages name: photos, data sets, configurations and trained models."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "configs").symlink_to(ROOT / "configs")
    make_surfaces(folder / "datasets" / "KSDD2", train=(12, 50))
    data = make_surfaces(folder / "my_folder")
    for mask in sorted((data / "train").glob("*_GT.png")):
        image = mask.with_name(mask.name.replace("_GT", ""))
        for photos, masks in (("photos", "bad_masks"), ("scans", "masks")):
            if np.asarray(Image.open(mask)).any():
                copy(image, folder / photos / "bad" / image.name)
                copy(mask, folder / photos / masks / image.name)
            else:
                copy(image, folder / photos / "good" / image.name)
    annotate(data / "train", folder / "parts")
    for images in ("new_photos", "scans/new"):
        copy(data / "test" / "20000.png", folder / images / "20000.png")
    copy(data / "test" / "20000.png", folder / "good.png")
    for name in ("missed", "new", "part"):
        copy(data / "test" / "20007.png", folder / f"{name}.png")
        copy(data / "test" / "20007_GT.png", folder / f"{name}_mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for model in ("ExDD", "DefectClassifier"):
            run(f"train --model {model} --data KSDD2")
            copy(Path(f"results/{model}/KSDD2/latest/weights/lightning/model.ckpt"), Path(f"{model}.ckpt"))
        run("predict --model ExDD --data datasets/KSDD2/test --ckpt_path ExDD.ckpt --model.record line1.db")
    return folder


def annotate(images: Path, parts: Path) -> None:
    """Copy images of KSDD2's layout to a folder with a COCO file of boxes around their defects."""
    found: dict[str, list[dict[str, object]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "x"}],
    }
    for number, mask in enumerate(sorted(images.glob("*_GT.png"))):
        image = mask.with_name(mask.name.replace("_GT", ""))
        copy(image, parts / image.name)
        width, height = Image.open(image).size
        found["images"].append({"id": number, "file_name": image.name, "width": width, "height": height})
        if box := Image.open(mask).getbbox():
            corners = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            found["annotations"].append({"id": number, "image_id": number, "category_id": 1, "bbox": corners})
    (parts / "annotations.json").write_text(json.dumps(found))


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def run(command: str) -> None:
    """Run a command with a small network on few images."""
    smaller = [more for pattern, more in SMALLER.items() if re.search(pattern, command)]
    AnomalibCLI(shlex.split(" ".join([command, *smaller])))


@pytest.mark.documentation
@pytest.mark.parametrize(("page", "step"), STEPS, ids=names(STEPS))
def test_it_runs(page: Path, step: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, reason in ONLY_PARSED.items():
        if words in step:
            pytest.skip(f"only parsed: {reason}")
    monkeypatch.chdir(workspace)
    copy(Path("DefectClassifier.ckpt" if "DefectClassifier" in step else "ExDD.ckpt"), Path("MODEL.ckpt"))
    if "\n" in step:
        exec(step.replace(*SMALL_MODEL), {})  # noqa: S102
    else:
        run(step)
