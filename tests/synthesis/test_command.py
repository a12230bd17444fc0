"""`anomalib synthesize`, by Anomalib's own command line; only two processes need a real one."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from PIL import Image

from anomalib_exdd.data import KSDD2
from anomalib_exdd.data.synthetic_defects import SyntheticDefects
from anomalib_exdd.synthesis.command import Synthesize, read_pixels, source_images
from anomalib_exdd.synthesis.manifest import read_synthetic
from made_up_records import read_records
from made_up_surfaces import make_surfaces

# What the installed command does, whether or not this package is registered already.
SCRIPT = """
import sys
from anomalib.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from anomalib_exdd.synthesis.command import Synthesize
PIPELINE_REGISTRY.setdefault("synthesize", Synthesize)
AnomalibCLI()
assert "diffusers" not in sys.modules, "diffusers was imported without need"
"""

Command = Callable[..., str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder in KSDD2's layout: 12 normal and 6 defective training images, 2 and 2 test images."""
    return make_surfaces(tmp_path_factory.mktemp("data") / "tiny", test=(2, 2))


@pytest.fixture
def command(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `anomalib synthesize` in this process, and return what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PIPELINE_REGISTRY, "synthesize", Synthesize)

    def run(*arguments: str) -> str:
        capsys.readouterr()
        AnomalibCLI(["synthesize", "--data", "KSDD2", "--data.root", str(root), *arguments])
        return capsys.readouterr().out

    return run


PERLIN = ["--synthesizer", "PerlinSynthesizer", "--accelerator", "cpu", "--mask_mode", "input"]


@contextmanager
def refused(match: str) -> Iterator[None]:
    with pytest.raises(SystemExit, match=match) as caught:
        yield
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).startswith("Error: ")


def content(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "synthesis.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_writes_a_reviewed_folder_that_trains(command: Command, root: Path, tmp_path: Path) -> None:
    arguments = [*PERLIN, "--count", "5", "--output", "out", "--data.num_defects", "5", "--data.seed", "3"]
    printed = command(*arguments)
    assert "5 images: 5 accepted, 0 rejected." in printed
    out = tmp_path / "out"
    files = content(out)
    assert {f"train/{number:05d}{end}.png" for number in range(5) for end in ("", "_GT")} <= set(files)
    assert f'src="previews/{4:05d}.jpg"' in files["index.html"].decode()
    assert Image.open(BytesIO(files["contact_sheet.png"])).format == "PNG"

    base = KSDD2(root, num_defects=5, seed=3)
    base.setup()
    training = set(base.train_data.samples["image_path"])
    assert {record.source for record in read_records(out)} <= training
    for image in read_synthetic(out):
        changed = np.asarray(Image.open(image.image_path), dtype=int) - read_pixels(image.record.source)
        mask = np.asarray(Image.open(image.mask_path)) > 0
        assert not changed[~mask].any()
        assert changed[mask].any()

    command(*arguments)
    assert content(out) == files

    (out / "review.csv").write_text("image,decision,comment\ntrain/00001.png,reject,ugly\n")
    printed = command(*arguments)
    assert "Reviewed: 1; training uses 4." in printed
    assert 'value="ugly"' in (out / "index.html").read_text()
    assert (out / "review.csv").read_text().endswith("ugly\n")

    words = shlex.split(printed.partition("Train with it: ")[2].splitlines()[0])
    assert words[:2] == ["anomalib", "train"]
    parsed = AnomalibCLI([*words[1:], "--model.backbone", "filter_bank"], run=False)
    assert isinstance(parsed.datamodule, SyntheticDefects)
    assert (parsed.datamodule.base.num_defects, parsed.datamodule.base.seed) == (5, 3)
    parsed.datamodule.setup()
    samples = parsed.datamodule.train_data.samples
    assert samples["is_synthetic"].sum() == 4
    assert not {image.image_path.name for image in read_synthetic(out)} & {"00001.png"}

    mixed = source_images(parsed.datamodule)  # synthetic images are no material for more of them
    assert set(mixed.normals) == {path for path in training if path in set(source_images(base).normals)}
    assert len(mixed.defects) == len(source_images(base).defects)


def test_pasted_defects_keep_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where training does not know the real defect that they were made from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PIPELINE_REGISTRY, "synthesize", Synthesize)
    root = make_surfaces(tmp_path / "tiny", test=(2, 2))
    lines = [f"train,{number},{('dent', 'scratch')[number % 2]}" for number in range(10012, 10018)]
    (root / "sources.csv").write_text("\n".join(["split,id,kind", *lines]))
    data = ["--data", "KSDD2", "--data.root", str(root)]
    AnomalibCLI(["synthesize", *data, "--synthesizer", "PasteSynthesizer", "--count", "6", "--output", "out"])
    records = read_records(tmp_path / "out")
    expected = [("dent", "scratch")[int(Path(str(record.defect)).stem) % 2] for record in records]
    assert set(expected) == {"dent", "scratch"}
    for num_defects in (None, 0):
        mixed = SyntheticDefects(KSDD2(root, num_defects=num_defects, num_workers=0), tmp_path / "out")
        mixed.setup()
        samples = mixed.train_data.samples
        made = samples[samples.is_synthetic].sort_values("image_path")
        assert made.kind.tolist() == [kind for kind, record in zip(expected, records, strict=True) if record.accepted]


def test_two_processes_write_what_one_writes(command: Command, root: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [*PERLIN, "--count", "5", "--batch_size", "2"]
    two_devices = ["--data", "KSDD2", "--data.root", root, *arguments, "--devices", "2", "--output", "two"]
    ran = subprocess.run(
        [sys.executable, script, "synthesize", *two_devices],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("5 images: 5 accepted") == 1
    assert "process 1 of 2" in ran.stderr
    start = json.loads((tmp_path / "two" / "synthesis.json").read_text())
    assert start["command"].startswith("anomalib synthesize --data KSDD2")
    command(*arguments, "--devices", "1", "--output", "one")
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    one["index.html"] = one["index.html"].replace(b": one<", b": two<")  # its title is the folder's name
    assert one == two


def test_mistakes_are_named_in_one_line(command: Command, root: Path, tmp_path: Path) -> None:
    out = ["--output", "out", "--count", "1"]
    with refused("PasteSynthesizer with masks 'auto' works with real defects, but"):
        command("--synthesizer", "PasteSynthesizer", "--data.num_defects", "0", *out)
    with refused("PerlinSynthesizer with masks 'real' works with real defects, but"):
        command(*PERLIN, "--masks", "real", "--data.num_defects", "0", *out)
    with refused("`count` has to be between 1 and"):
        command(*PERLIN, "--count", "0", "--output", "out")
    assert not (tmp_path / "out").exists()
    with refused("holds something else than synthetic images"):
        command(*PERLIN, "--output", str(root), "--overwrite")
    command(*PERLIN, *out)
    with refused("`seed` was 0 and is 1 now. Give another --output, or --overwrite"):
        command(*PERLIN, *out, "--seed", "1")
    command(*PERLIN, *out, "--seed", "1", "--overwrite")
    assert read_records(tmp_path / "out")[0].index == 0


def test_rejected_images_are_reported(command: Command, tmp_path: Path) -> None:
    printed = command(*PERLIN, "--count", "7", "--retries", "0", "--min_change", "255", "--output", "out")
    assert "7 images: 0 accepted, 7 rejected." in printed
    assert "rejected/00000.png: No visible change in 1 attempt: at most" in printed
    assert "... and 2 more, see manifest.csv" in printed
    assert "No image can be used" in printed
    assert "Train with it" not in printed
    assert len(list((tmp_path / "out" / "rejected").glob("*.png"))) == 14


@pytest.mark.parametrize(
    ("name", "synthesizer", "data"),
    [
        ("diag", "DiagSynthesizer", "KSDD2"),
        ("dreambooth", "DreamBoothSynthesizer", "KSDD2"),
        ("in_and_out", "InAndOutSynthesizer", "KSDD2"),
        ("paste", "PasteSynthesizer", "SurfaceSample"),
        ("perlin", "PerlinSynthesizer", "SurfaceSample"),
    ],
)
def test_shipped_configurations_are_valid(repository: Path, name: str, synthesizer: str, data: str) -> None:
    parser = Synthesize.get_parser()
    config = parser.parse_args(["--config", str(repository / "configs" / f"synthesize_{name}.yaml")])
    made: Any = parser.instantiate_classes(config)
    assert type(made.synthesizer).__name__ == synthesizer
    assert type(made.data).__name__ == data
    assert str(config.output) == f"synthetic/{name}"
    assert made.synthesizer.settings
    if name == "in_and_out":
        assert type(made.synthesizer.second).__name__ == "PerlinSynthesizer"


def test_images_are_read_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.array_equal(read_pixels(str(tmp_path / "image.png")), pixels)
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_pixels(str(tmp_path / "deep.png"))[..., 2], np.arange(256).reshape(16, 16))
