"""What README and documentation point to exists, and they point to what a user has to find."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")])
TEXTS = [ROOT / "README.md", *PAGES]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    targets = [each for each in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in each]
    for target in targets:
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_in_the_navigation_and_reached_from_the_readme() -> None:
    content = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": (\w+\.(?:md|ipynb))$", content, re.MULTILINE))
    assert listed == {page.name for page in PAGES}
    linked = set(re.findall(r"docs/(\w+\.(?:md|ipynb))", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked >= listed - {"reference.md"}  # a list of names that only the site fills


def test_every_configuration_is_named_and_exists() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in TEXTS)
    named = set(re.findall(r"configs/(?:in_and_out/)?(\w+\.yaml)", text)) | set(re.findall(r"`(\w+_\w+\.yaml)`", text))
    assert named == {path.name for path in (ROOT / "configs").rglob("*.yaml")}


def test_the_readme_fits_on_some_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_results_say_on_which_machine_they_were_measured() -> None:
    for page in TEXTS:
        for name in set(re.findall(r"benchmarks/results/(\w+)\.md", page.read_text(encoding="utf-8"))):
            result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
            assert result["machine"]["processor"], name


def test_the_reference_names_what_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def project(pattern: str) -> str:
    """Return what a pattern captures in the project's settings."""
    (found,) = re.findall(pattern, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return str(found)


def test_the_citation_names_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project(r'^version = "(.+)"$')
    assert citation["license"] == project(r'^license = "(.+)"$')


def test_the_badges_are_true() -> None:
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    tested = ci["jobs"]["ci"]["strategy"]["matrix"]["python-version"]
    lowest, anomalib = project(r'^requires-python = ">=(.+)"$'), project(r'"anomalib>=(.+?)"')
    licence = project(r'^license = "(.+)"$').replace("-", "--")
    badges = re.findall(r"/badge/(\S+)-blue\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert tested[0] == lowest
    assert badges == [f"Python-{lowest}_to_{tested[-1]}", f"Anomalib-{anomalib}_or_newer", f"licence-{licence}"]
