"""The notebook of the documentation: it runs, gives what it shows, and shows nothing of the machine that it ran on."""

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

PATH = Path(__file__).resolve().parents[1] / "docs" / "research.ipynb"


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The notebook as it comes out now, executed in an empty folder."""
    folder = tmp_path_factory.mktemp("notebook")
    return NotebookClient(
        nbformat.read(PATH, as_version=4), resources={"metadata": {"path": str(folder)}}, timeout=600
    ).execute()


def shown(notebook: NotebookNode) -> list[dict[str, str]]:
    """Return what the cells printed and drew: kind of output -> content."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [dict(output.get("data") or {"text/plain": output["text"]}) for output in outputs]


def test_it_is_executed_in_order_and_small(committed: NotebookNode) -> None:
    counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert sum("image/png" in output for output in shown(committed)) == 2
    assert PATH.stat().st_size < 1_000_000


def test_outputs_name_no_folder_of_a_machine(committed: NotebookNode) -> None:
    texts = [text for output in shown(committed) for kind, text in output.items() if kind.startswith("text/")]
    assert not re.search(r"(^|[^\w.<])/\w+/|[A-Z]:\\", json.dumps(texts))


@pytest.mark.documentation
def test_it_gives_what_it_shows(committed: NotebookNode, executed: NotebookNode) -> None:
    before, after = shown(committed), shown(executed)
    assert [set(output) for output in after] == [set(output) for output in before]
    for old, new in zip(before, after, strict=True):
        if "image/png" not in new:
            assert np.allclose(numbers(new["text/plain"]), numbers(old["text/plain"]), atol=0.05)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]
