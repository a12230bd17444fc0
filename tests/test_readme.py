"""What the README shows is what the benchmarks printed, and what it points to exists."""

import json
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_result_files(repository: Path, readme: str) -> None:
    quoted = re.findall(r"benchmarks/results/(\w+)\.md", readme)
    assert quoted
    for name in set(quoted):
        page = (repository / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
        rows = [line for line in page.splitlines() if line.startswith("|")]
        assert len(rows) > 2
        for row in rows:
            assert row in readme, f"{name}.md has the row {row!r}, README.md has not"
        assert json.loads((repository / "benchmarks" / "results" / f"{name}.json").read_text())["machine"]["processor"]


def test_links_within_the_repository_lead_somewhere(repository: Path, readme: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in target]
    assert targets
    for target in targets:
        assert (repository / target).exists(), target


def test_named_configurations_exist_and_are_named(repository: Path, readme: str) -> None:
    named = set(re.findall(r"configs/(\w+\.yaml)", readme))
    assert named == {path.name for path in (repository / "configs").glob("*.yaml")}
