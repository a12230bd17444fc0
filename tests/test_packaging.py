"""The wheel in an environment of its own, with the real `anomalib` command.

The environment borrows the installed dependencies and holds nothing else but the wheel, so the tests need no network
and no minute of installation. One process, `packaging_probe.py`, does all that needs Anomalib imported.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(sys.platform == "win32", reason="the probe forks"),
    pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed"),
]

PROBE = Path(__file__).parent / "helpers" / "packaging_probe.py"


def run(*command: object, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ANOMALIB_EXDD"))}
    done = subprocess.run(
        [str(word) for word in command], env={**kept, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def archives(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the built wheel and source archive."""
    folder = tmp_path_factory.mktemp("dist")
    run(
        "uv", "build", "--offline", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, repository
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def wheel(archives: Path) -> Path:
    (path,) = archives.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh virtual environment with the wheel, after which it sees the current environment's libraries.

    A path in a `.pth` file only extends `sys.path`: start-up files of the borrowed folder, among them those of an
    editable installation of this package, are not run.
    """
    root = tmp_path_factory.mktemp("environment")
    run("uv", "venv", "--offline", "--python", sys.executable, root / "venv")
    binaries = root / "venv" / "bin"
    run("uv", "pip", "install", "--offline", "--no-deps", "--python", binaries / "python", wheel)
    own = Path(run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (own / "zz_borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    # The script that installing Anomalib here would have made.
    script = Path(sysconfig.get_path("scripts"), "anomalib").read_text().split("\n", 1)[1]
    (binaries / "anomalib").write_text(f"#!{binaries / 'python'}\n{script}")
    (binaries / "anomalib").chmod(0o755)
    return binaries


@pytest.fixture(scope="session")
def probed(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What every probe wrote, and its exit code."""
    scratch = tmp_path_factory.mktemp("scratch")
    out = run(environment / "python", PROBE, environment / "anomalib", environment / "anomalib-exdd", scratch)
    return json.loads(out.splitlines()[-1])


class TestArchives:
    def test_wheel_contains_package_start_up_files_and_licence(self, wheel: Path, repository: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            for name in ("anomalib_exdd.pth", "anomalib_exdd.start"):
                assert archive.read(name) == (repository / name).read_bytes()
        source = repository / "src"
        kinds = ("*.py", "*.css", "*.html", "*.js")
        assert {str(path.relative_to(source)) for kind in kinds for path in source.rglob(kind)} <= set(names)
        assert "anomalib_exdd/py.typed" in names
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
        top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
        assert top == {"anomalib_exdd", "anomalib_exdd.pth", "anomalib_exdd.start"}

    def test_source_archive_can_build_the_wheel_again(self, archives: Path) -> None:
        (path,) = archives.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        assert {"anomalib_exdd.pth", "anomalib_exdd.start", "pyproject.toml", "src/anomalib_exdd/plugin.py"} <= names

    def test_anomalibs_script_is_not_touched(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
            assert archive.read(name).decode().split() == [
                "[console_scripts]", "anomalib-exdd", "=", "anomalib_exdd.cli:main",
            ]  # fmt: skip


class TestStartUp:
    HOOKS = "import sys; print(sum(type(finder).__name__ == 'RegisterAfterImport' for finder in sys.meta_path))"

    def test_hook_is_installed_when_python_starts(self, environment: Path) -> None:
        assert run(environment / "python", "-c", self.HOOKS).strip() == "1"

    def test_opt_out(self, environment: Path) -> None:
        assert run(environment / "python", "-c", self.HOOKS, ANOMALIB_EXDD_AUTOLOAD="0").strip() == "0"

    def test_other_programs_load_nothing_of_anomalib(self, environment: Path) -> None:
        loaded = run(environment / "python", "-c", "import sys; print(*sys.modules)").split()
        assert {name for name in loaded if "anomalib" in name} == {"anomalib_exdd", "anomalib_exdd._autoload"}
        assert "torch" not in loaded


class TestAnomalib:
    def test_it_is_the_wheels_own_copy_that_runs(self, probed: dict, environment: Path) -> None:
        result = probed["library"]
        assert result["code"] == 0, result["out"]
        lines = dict(line.split(" ", 1) for line in result["out"].splitlines() if line.count(" ") == 1)
        assert Path(lines["file"]).is_relative_to(environment.parent)
        assert lines["listed"] == "True"

    @pytest.mark.parametrize(
        "first_import",
        [
            "import anomalib.data",
            "from anomalib.models import Patchcore, ExDD",
            "import anomalib_exdd.models.exdd.lightning_model",
            "from anomalib_exdd.data import KSDD2",
            "from anomalib_exdd import SurfaceSample",
        ],
    )
    def test_registration_completes_whatever_is_imported_first(self, probed: dict, first_import: str) -> None:
        result = probed[first_import]
        assert result["code"] == 0, result["out"]
        assert "anomalib-exdd:" not in result["out"]

    @pytest.mark.parametrize("command", ["train", "fit", "validate", "test", "export"])
    def test_commands_know_plain_names(self, probed: dict, command: str) -> None:
        result = probed[f"{command} plain names"]
        assert result["code"] == 0, result["out"]
        assert "class_path: anomalib_exdd.ExDD\n" in result["out"]
        assert "class_path: anomalib_exdd.KSDD2\n" in result["out"]

    @pytest.mark.parametrize(
        ("probe", "expected"),
        [
            ("train other data", "class_path: anomalib_exdd.SurfaceSample\n"),
            ("train dotted", "class_path: anomalib_exdd.KSDD2\n"),
            ("train settings", "negative_ratio: 0.5\n"),
            ("predict plain names", "class_path: anomalib_exdd.ExDD\n"),
            ("help of the model", "--model.negative_ratio"),
            ("own script", "class_path: anomalib_exdd.ExDD\n"),
        ],
    )
    def test_commands(self, probed: dict, probe: str, expected: str) -> None:
        result = probed[probe]
        assert result["code"] == 0, result["out"]
        assert expected in result["out"]

    def test_benchmark_runs_over_a_grid(self, probed: dict) -> None:
        result = probed["benchmark"]
        assert result["code"] == 0, result["out"]
        (table,) = [line for line in result["out"].splitlines() if line.startswith("[{")]
        rows = json.loads(table)
        assert {row["model.init_args.scoring"] for row in rows} == {"ratio", "normal"}
        assert all(0 <= float(row["image_AUROC"]) <= 1 for row in rows)

    def test_command_in_a_process_of_its_own(self, environment: Path) -> None:
        config = run(environment / "anomalib", "train", "--model", "ExDD", "--data", "KSDD2", "--print_config")
        assert "class_path: anomalib_exdd.ExDD\n" in config
        assert "class_path: anomalib_exdd.KSDD2\n" in config
