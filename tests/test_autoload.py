"""The start-up hook and the registration, tried in fresh interpreters on a stand-in for Anomalib.

The stand-in has Anomalib's import structure (`anomalib.models` imports `anomalib.data`) without its 20 seconds, and
our package is staged with the real hook, registration and package files around made-up classes.
"""

import os
import pkgutil
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import anomalib_exdd
from anomalib_exdd import _autoload

SOURCE = Path(anomalib_exdd.__file__).parent

MODEL_HOME = "models/exdd/lightning_model.py"
FILES = {
    "anomalib/__init__.py": "",
    "anomalib/data/__init__.py": "class AnomalibDataModule: ...\nclass ImageBatch: ...\n",
    "anomalib/models/__init__.py": """
        from anomalib.data import ImageBatch
        class AnomalibModule: ...
        class Patchcore(AnomalibModule): ...
        ALLOWED_MODULES = {"anomalib.models"}
    """,
    "anomalib/cli/__init__.py": "",
    "anomalib/cli/pipelines.py": "PIPELINE_REGISTRY = {'benchmark': object}\n",
    "anomalib_exdd/commands/banks.py": """
        from anomalib_exdd.models.exdd import ExDD
        class Info: ...
        class Teach: ...
        class Forget: ...
    """,
    "anomalib_exdd/comparison/command.py": """
        from anomalib_exdd.models.exdd import ExDD
        class Compare: ...
    """,
    "anomalib_exdd/station/command.py": """
        from anomalib_exdd.models.exdd import ExDD
        class DriftCommand: ...
        class ReviewCommand: ...
    """,
    "anomalib_exdd/synthesis/command.py": """
        from anomalib_exdd.data.folder import DefectFolder
        class Synthesize: ...
    """,
    f"anomalib_exdd/{MODEL_HOME}": """
        from anomalib.models import AnomalibModule
        class ExDD(AnomalibModule): ...
    """,
    "anomalib_exdd/models/exdd/__init__.py": "from .lightning_model import ExDD\n",
    "anomalib_exdd/models/defect_classifier/lightning_model.py": """
        from anomalib.models import AnomalibModule
        class DefectClassifier(AnomalibModule): ...
    """,
    "anomalib_exdd/models/defect_classifier/__init__.py": "from .lightning_model import DefectClassifier\n",
    "anomalib_exdd/data/ksdd2.py": """
        from anomalib.data import AnomalibDataModule
        class KSDD2(AnomalibDataModule): ...
    """,
    "anomalib_exdd/data/folder.py": """
        from anomalib.data import AnomalibDataModule
        class DefectFolder(AnomalibDataModule): ...
    """,
    "anomalib_exdd/data/surfaces.py": """
        from anomalib_exdd.data.ksdd2 import KSDD2
        class SurfaceSample(KSDD2): ...
    """,
    "anomalib_exdd/data/synthetic_defects.py": """
        from anomalib.data import AnomalibDataModule
        class SyntheticDefects(AnomalibDataModule): ...
    """,
    "anomalib_exdd/data/__init__.py": """
        import anomalib.data
        from .folder import DefectFolder
        from .ksdd2 import KSDD2
        from .surfaces import SurfaceSample
        from .synthetic_defects import SyntheticDefects
    """,
}
REAL_FILES = ["__init__.py", "_autoload.py", "plugin.py", "models/__init__.py"]

INSTALL = "from anomalib_exdd._autoload import install; install()\n"
EVERYTHING_IS_REGISTERED = """
import sys
import anomalib.data, anomalib.models, anomalib.cli.pipelines
import anomalib_exdd, anomalib_exdd.models.exdd.lightning_model
verbs = ["benchmark", "compare", "drift", "info", "teach", "forget", "review", "synthesize"]
assert list(anomalib.cli.pipelines.PIPELINE_REGISTRY) == verbs
assert anomalib.models.ExDD is anomalib_exdd.models.exdd.lightning_model.ExDD is anomalib_exdd.ExDD
assert "anomalib_exdd" in anomalib.models.ALLOWED_MODULES
for name in ("KSDD2", "DefectFolder", "SurfaceSample", "SyntheticDefects"):
    assert getattr(anomalib.data, name) is getattr(anomalib_exdd, name)
"""


class Stage:
    """A folder with the stand-in and our package, to run Python in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in FILES.items():
            self.write(name, text)
        for name in REAL_FILES:
            shutil.copy(SOURCE / name, root / "anomalib_exdd" / name)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def python(self, code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the code without site files, so that no installed copy of the package takes part."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ANOMALIB_EXDD"))}
        return subprocess.run(
            [sys.executable, "-S", *options, "-c", textwrap.dedent(code)],
            cwd=self.root,
            env={**kept, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def succeeds(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = self.python(code, **environment)
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


FIRST_IMPORTS = [
    "import anomalib.models",
    "import anomalib.data",
    "from anomalib.models import Patchcore",
    "import anomalib_exdd.models.exdd.lightning_model",
    "import anomalib_exdd.models",
    "from anomalib_exdd.models.exdd import ExDD",
    "from anomalib_exdd.data import KSDD2",
    "from anomalib_exdd.data.surfaces import SurfaceSample",
    "from anomalib_exdd import ExDD",
    "from anomalib_exdd import SurfaceSample",
    "import anomalib_exdd; anomalib_exdd.register()",
]


@pytest.mark.parametrize(
    "first_import", [*FIRST_IMPORTS, "from anomalib.models import ExDD", "from anomalib.data import KSDD2"]
)
def test_registration_completes_whatever_is_imported_first(stage: Stage, first_import: str) -> None:
    done = stage.succeeds(f"{INSTALL}{first_import}{EVERYTHING_IS_REGISTERED}")
    assert done.stderr == ""


@pytest.mark.parametrize("first_import", FIRST_IMPORTS)
def test_register_completes_without_the_hook(stage: Stage, first_import: str) -> None:
    register = "import anomalib_exdd; anomalib_exdd.register()"
    done = stage.succeeds(f"{first_import}\n{register}{EVERYTHING_IS_REGISTERED}")
    assert done.stderr == ""


def test_data_alone_registers_without_importing_models(stage: Stage) -> None:
    stage.succeeds(
        f"{INSTALL}import sys, anomalib.data; anomalib.data.KSDD2; assert 'anomalib.models' not in sys.modules"
    )


def test_hook_and_registration_are_idempotent(stage: Stage) -> None:
    stage.succeeds(f"""
        import sys
        from anomalib_exdd._autoload import RegisterAfterImport, install
        before = len(sys.meta_path)
        install(); install()
        assert len(sys.meta_path) == before + 1
        from anomalib_exdd import register
        register()
        ExDD = sys.modules["anomalib.models"].ExDD
        register(); register()
        assert sys.modules["anomalib.models"].ExDD is ExDD
        {textwrap.indent(EVERYTHING_IS_REGISTERED, " " * 8).strip()}
    """)


def test_finder_leaves_once_everything_is_registered(stage: Stage) -> None:
    stage.succeeds(f"""
        import sys
        before = list(sys.meta_path)
        {INSTALL.strip()}
        import anomalib.models, anomalib.cli.pipelines
        assert sys.meta_path == before
    """)


@pytest.mark.parametrize("value", ["0", "false", "No", " off "])
def test_opt_out_variable(stage: Stage, value: str) -> None:
    code = """
        import sys
        before = list(sys.meta_path)
        from anomalib_exdd._autoload import install; install()
        assert sys.meta_path == before
        import anomalib.models, anomalib.data
        assert not hasattr(anomalib.models, "ExDD") and not hasattr(anomalib.data, "KSDD2")
    """
    stage.succeeds(code, ANOMALIB_EXDD_AUTOLOAD=value)
    assert stage.python(code, ANOMALIB_EXDD_AUTOLOAD="1").returncode != 0


def test_failure_costs_one_line_and_not_anomalib(stage: Stage) -> None:
    stage.write(f"anomalib_exdd/{MODEL_HOME}", 'raise OSError("no such\\nlibrary")\n')
    done = stage.succeeds(f"""
        {INSTALL.strip()}
        from anomalib.models import Patchcore
        import anomalib.models, anomalib.data
        assert not hasattr(anomalib.models, "ExDD")
        assert anomalib.data.KSDD2
    """)
    (line,) = done.stderr.splitlines()
    for part in ("anomalib-exdd", "anomalib.models", "OSError: no such library", "ANOMALIB_EXDD_AUTOLOAD=0"):
        assert part in line


def test_partly_removed_package_costs_one_line_per_module(stage: Stage) -> None:
    (stage.root / "anomalib_exdd/plugin.py").unlink()
    done = stage.succeeds(f"{INSTALL}import anomalib.models\nassert not hasattr(anomalib.models, 'ExDD')")
    assert [line.split("(")[0] for line in done.stderr.splitlines()] == [
        "anomalib-exdd: not registered with anomalib.data ",
        "anomalib-exdd: not registered with anomalib.models ",
    ]


def test_failed_import_of_anomalib_can_be_repeated(stage: Stage) -> None:
    stage.write(
        "anomalib/data/__init__.py",
        """
        import sys
        if not hasattr(sys, "second_time"):
            sys.second_time = True
            raise ImportError("not yet")
        class AnomalibDataModule: ...
        class ImageBatch: ...
        """,
    )
    stage.succeeds(f"""
        {INSTALL.strip()}
        try:
            import anomalib.data
        except ImportError as error:
            assert str(error) == "not yet"
        {textwrap.indent(EVERYTHING_IS_REGISTERED, " " * 8).strip()}
    """)


def test_absent_anomalib_is_still_reported_as_absent(stage: Stage) -> None:
    shutil.rmtree(stage.root / "anomalib")
    done = stage.python(f"{INSTALL}import anomalib.models")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'anomalib'"


def test_class_of_anomalibs_own_is_kept_and_ours_not_imported(stage: Stage) -> None:
    with (stage.root / "anomalib/data/__init__.py").open("a") as file:
        file.write("class KSDD2: ...\n")
    stage.write("anomalib_exdd/data/__init__.py", "import anomalib.data\n")
    stage.write("anomalib_exdd/data/surfaces.py", "class SurfaceSample: ...\n")
    done = stage.succeeds(f"""
        import sys
        {INSTALL.strip()}
        import anomalib.data, anomalib_exdd
        anomalib_exdd.register()
        assert anomalib.data.KSDD2.__module__ == "anomalib.data"
        assert "anomalib_exdd.data.ksdd2" not in sys.modules
        assert anomalib.data.DefectFolder.__module__ == "anomalib_exdd.data.folder"
    """)
    assert done.stderr.count("UserWarning: anomalib.data has a class KSDD2 of its own") == 1


def test_loader_that_cannot_be_wrapped_only_warns(stage: Stage) -> None:
    done = stage.succeeds(f"""
        import importlib.abc, importlib.machinery, sys
        class Rigid(importlib.abc.Loader):
            __slots__ = ()
            def create_module(self, spec): return None
            def exec_module(self, module): module.own = True
        class Finder:
            def find_spec(self, name, path=None, target=None):
                return importlib.machinery.ModuleSpec(name, Frozen()) if name == "anomalib.data" else None
        class Frozen(Rigid):
            __slots__ = ()
            def __setattr__(self, name, value): raise AttributeError(name)
        sys.meta_path.insert(0, Finder())
        {INSTALL.strip()}
        import anomalib.data
        assert anomalib.data.own
    """)
    assert done.stderr.startswith("anomalib-exdd: not registered with anomalib.data (AttributeError: exec_module)")


def test_start_up_imports_only_this_package(stage: Stage) -> None:
    done = stage.succeeds(f"""
        import os, sys
        before = set(sys.modules)
        {INSTALL.strip()}
        print(*sorted(set(sys.modules) - before))
    """)
    assert done.stdout.split() == ["anomalib_exdd", "anomalib_exdd._autoload"]


def test_start_up_costs_less_than_a_millisecond(stage: Stage) -> None:
    def least_seconds(module: str) -> float:
        code = f"""
            import os, sys, time
            start = time.process_time()
            from {module} import install; install()
            print(time.process_time() - start)
        """
        return min(float(stage.succeeds(code).stdout) for _ in range(15))

    stage.write("empty_package/__init__.py", "")
    stage.write("empty_package/module.py", "def install(): ...\n")
    # On a machine where importing two empty files takes that long already, stay near them.
    assert least_seconds("anomalib_exdd._autoload") < max(1e-3, 3 * least_seconds("empty_package.module"))


@pytest.mark.parametrize(
    ("name", "error"), [("json", False), ("anomalib", False), ("anomalib.models.image", False), ("anomalib.data", True)]
)
def test_finder_answers_for_its_modules_only(name: str, error: bool) -> None:
    class Finder:
        def find_spec(self, fullname, path=None, target=None):
            raise LookupError(fullname)

    before, finder = list(sys.meta_path), _autoload.RegisterAfterImport()
    sys.meta_path[:] = [finder, Finder()]
    try:
        if error:
            with pytest.raises(LookupError, match=name):
                finder.find_spec(name)
        else:
            assert finder.find_spec(name) is None
    finally:
        sys.meta_path[:] = before


class TestSiteFiles:
    """`anomalib_exdd.pth` and `anomalib_exdd.start`, as `site` treats them."""

    LINE = "import site, sys; before = len(sys.meta_path); site.addsitedir('.'); print(len(sys.meta_path) - before)"

    @pytest.fixture(autouse=True)
    def _copy(self, stage: Stage, repository: Path) -> None:
        shutil.copy(repository / "anomalib_exdd.pth", stage.root)

    def test_pth_installs_the_hook(self, stage: Stage) -> None:
        done = stage.succeeds(self.LINE)
        assert (done.stdout.strip(), done.stderr) == ("1", "")

    @pytest.mark.parametrize("what_is_wrong", ["package gone", "hook gone", "syntax error"])
    def test_broken_package_costs_one_line(self, stage: Stage, what_is_wrong: str) -> None:
        if what_is_wrong == "package gone":
            shutil.rmtree(stage.root / "anomalib_exdd")
        elif what_is_wrong == "hook gone":
            (stage.root / "anomalib_exdd/_autoload.py").unlink()
        else:
            stage.write("anomalib_exdd/__init__.py", "<<<<<<< HEAD\n")
        done = stage.succeeds(self.LINE)
        assert done.stdout.strip() == "0"
        (line,) = done.stderr.splitlines()
        assert line.startswith("anomalib-exdd is broken or only partly removed (")

    def test_start_names_the_hook(self, repository: Path) -> None:
        (entry,) = (repository / "anomalib_exdd.start").read_text().splitlines()
        assert pkgutil.resolve_name(entry) is _autoload.install


class TestPackage:
    """`anomalib_exdd` itself: public names on first use."""

    def test_all_names_are_in_dir_before_they_are_loaded(self, stage: Stage) -> None:
        stage.succeeds("""
            import sys, anomalib_exdd
            assert set(anomalib_exdd.__all__) <= set(dir(anomalib_exdd))
            assert "anomalib" not in sys.modules
        """)

    def test_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'anomalib_exdd' has no attribute 'ExD'"):
            anomalib_exdd.ExD  # noqa: B018

    def test_command_line_without_hook_registers_first(self, stage: Stage) -> None:
        shutil.copy(SOURCE / "cli.py", stage.root / "anomalib_exdd/cli.py")
        stage.write("anomalib/cli/__init__.py", "")
        stage.write(
            "anomalib/cli/cli.py",
            "def main():\n    import sys, anomalib.models\n    print(anomalib.models.ExDD.__name__, *sys.argv[1:])\n",
        )
        code = "import sys; sys.argv[1:] = ['train']; from anomalib_exdd.cli import main; main()"
        assert stage.succeeds(code, ANOMALIB_EXDD_AUTOLOAD="0").stdout.split() == ["ExDD", "train"]
