"""The rooms of the package import downwards only, and heavy libraries stay where they belong.

Everything is read from the source files, nothing is imported.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "anomalib_exdd"
TESTS = Path(__file__).resolve().parent
PACKAGE = "anomalib_exdd"

# Room -> rooms it may import from. A room may always import from itself.
FOUNDATIONS = {"coreset", "images", "search", "synthesis"}
BUILT_ON_THEM = {"data", "models"}
MAY_IMPORT = {
    "utils": set(),  # for all others
    "images": {"utils"},
    "search": {"utils"},
    "coreset": {"utils"},
    "synthesis": {"utils"},
    "data": {"utils", *FOUNDATIONS},
    "models": {"utils", *FOUNDATIONS},
    "commands": {"utils", *FOUNDATIONS, *BUILT_ON_THEM},
    "comparison": {"utils", *FOUNDATIONS, *BUILT_ON_THEM, "commands"},
    "station": {"utils", *FOUNDATIONS, *BUILT_ON_THEM, "commands"},
    "synthesis/command": {"utils", *FOUNDATIONS, "data", "commands"},
    "plugin": {"data", "models", "commands", "comparison", "station", "synthesis/command"},
    "_autoload": {"plugin"},
    "cli": {"plugin"},
    "__init__": {"data", "models", "comparison", "plugin"},
}

# Library -> the only place (file or folder) that imports it.
ONLY_IN = {
    "faiss": "search/faiss_index.py",
    "accelerate": "synthesis",
    "diffusers": "synthesis",
    "fastapi": "station/server.py",
    "gradio": "station",
    "peft": "synthesis",
    "starlette": "station/server.py",
    "transformers": "synthesis",
    "uvicorn": "station/server.py",
}
# Room -> libraries it must not know of.
UNKNOWN_TO = {
    "images": {"lightning", "timm"},  # anomalib has the items that batches are made of
    "search": {"anomalib", "lightning", "timm", "torchvision"},
    "coreset": {"anomalib", "lightning", "timm", "torchvision"},
    "synthesis": {"lightning", "timm"},  # anomalib has the Perlin noise
    "data": {"timm"},
}
STARTS_WITH_PYTHON = ["__init__.py", "_autoload.py"]


class Import(NamedTuple):
    """One imported module."""

    module: str
    line: int
    at_module_level: bool  # runs when the file is imported


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "/".join(parts) if "/".join(parts) in MAY_IMPORT else parts[0]


def imports_of(path: Path, source: Path = SOURCE) -> Iterator[Import]:
    """Yield what the file imports, relative imports resolved, type-checkers' imports left out."""
    package = [PACKAGE, *path.relative_to(source).parts[:-1]]

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children: list[ast.AST] = [*node.orelse]
        else:
            children = [*ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_module_level)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            if module == PACKAGE or not node.module:  # the names may be modules themselves
                for alias in node.names:
                    yield Import(f"{module}.{alias.name}", node.lineno, at_module_level)
            else:
                yield Import(module, node.lineno, at_module_level)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, at_module_level and not inside)

    yield from visit(ast.parse(path.read_text()), at_module_level=True)


def library_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downwards(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: give it a line in MAY_IMPORT"
    for imported in imports_of(path):
        if library_of(imported.module) == PACKAGE and imported.module != PACKAGE:
            target = room_of(SOURCE.joinpath(*imported.module.split(".")[1:]))
            allowed = target == room or target in MAY_IMPORT[room]
            assert allowed, f"{path}:{imported.line}: `{room}` must not import from `{target}`"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_libraries_stay_where_they_belong(path: Path) -> None:
    place = path.relative_to(SOURCE)
    for imported in imports_of(path):
        library = library_of(imported.module)
        home = ONLY_IN.get(library)
        assert home is None or place.is_relative_to(home), f"{path}:{imported.line}: {library} belongs into {home}"
        unknown = UNKNOWN_TO.get(room_of(path), set())
        assert library not in unknown, f"{path}:{imported.line}: `{room_of(path)}` must not know of {library}"


def test_report_knows_result_files_only() -> None:
    home = SOURCE / "comparison"
    allowed = ("comparison.report", "comparison.results", "images", "utils")
    for path in [*(home / "report").rglob("*.py"), home / "results.py"]:
        for imported in imports_of(path):
            library, _, module = imported.module.partition(".")
            assert library not in {"anomalib", "lightning", "timm", "torch"}, (
                f"{path}:{imported.line}: {imported.module}"
            )
            assert library != PACKAGE or module.startswith(allowed), f"{path}:{imported.line}: {imported.module}"


@pytest.mark.parametrize("name", STARTS_WITH_PYTHON)
def test_start_up_imports_only_sys(name: str) -> None:
    at_start = {imported.module for imported in imports_of(SOURCE / name) if imported.at_module_level}
    assert at_start <= {"sys"}


def test_optional_libraries_wait_until_they_are_used() -> None:
    """Follow the imports that importing any room runs: none of them reaches FAISS or the diffusion libraries."""
    module_files = {}
    for path in files():
        parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
        module_files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    reached: set[str] = set()
    todo = [name for name in module_files if name.count(".") <= 1]
    while todo:
        name = todo.pop()
        if name in reached or name not in module_files:
            continue
        reached.add(name)
        path = module_files[name]
        todo.append(name.rpartition(".")[0])
        for imported in imports_of(path):
            if imported.at_module_level:
                library = library_of(imported.module)
                assert library not in ONLY_IN, f"{path}:{imported.line}: {library} is imported before it is needed"
                todo.append(imported.module)
    assert reached


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_import_public_names(path: Path) -> None:
    """Private members are ruff's (SLF001)."""
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    private = {alias.name for node in imports for alias in node.names if alias.name.startswith("_")}
    assert private <= {"_autoload"}  # a file that is private by its name only


def test_import_reader(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "example.py"
    path.write_text(
        "import numpy.random as r\nfrom . import a\nfrom .b import c\nfrom ..models.d import e\n"
        "if TYPE_CHECKING:\n    import faiss\n"
        "try:\n    import cv2\nexcept ImportError:\n    cv2 = None\n"
        "def f():\n    from anomalib_exdd import plugin\n"
        "class G:\n    import torch\n"
    )
    assert [(found.module, found.at_module_level) for found in imports_of(path, tmp_path)] == [
        ("numpy.random", True),
        ("anomalib_exdd.data.a", True),
        ("anomalib_exdd.data.b", True),
        ("anomalib_exdd.models.d", True),
        ("cv2", True),
        ("anomalib_exdd.plugin", False),
        ("torch", True),
    ]
