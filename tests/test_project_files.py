"""What stands beside the code: citation, changes, contributing, linters before a commit, the container."""

import re
import shlex
import sys

import pytest
from omegaconf import OmegaConf

import glus
from tests.programs import ROOT, run


def test_the_citation_is_of_this_version_and_paper():
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation.version == glus.__version__
    assert citation.license == "Apache-2.0"
    bibtex = (ROOT / "README.md").read_text()
    paper = citation["preferred-citation"]
    assert paper.url in bibtex
    for author in paper.authors:
        assert f"{author['family-names']}, {author['given-names']}" in bibtex


def test_changes_begin_with_what_is_not_released():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert glus.__version__ in headings


@pytest.mark.parametrize("hook", OmegaConf.load(ROOT / ".pre-commit-config.yaml").repos[0].hooks, ids=lambda h: h.id)
def test_hooks_run_what_ci_runs(hook):
    ci = (ROOT / ".ci" / "run").read_text()
    assert hook.entry.removesuffix(" --check") in ci
    assert run(sys.executable, *shlex.split(hook.entry)[1:3], "--version").returncode == 0


def test_the_container_is_made_by_the_projects_own_files():
    """No docker runs here: each step is held against what it uses."""
    steps = re.findall(r"^([A-Z]+) (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    kinds = [kind for kind, _ in steps]
    assert kinds.index("COPY") < kinds.index("ENV") < kinds.index("CMD")
    text = " ".join(words for _, words in steps)
    for script in re.findall(r"/opt/glus/(\S+\.sh)", text):
        assert (ROOT / script).is_file()
        assert "VENV" not in (ROOT / script).read_text()  # it makes .venv beside itself, which PATH names
    python = re.search(r"PYTHON=(\S+)", text)[1]
    assert (ROOT / f"requirements-py{python.replace('.', '')}.lock").is_file()
    arguments = {words.partition("=")[0] for kind, words in steps if kind == "ARG"}
    assert set(re.findall(r"\$\{(\w+)\}", text)) == arguments
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "data", "outputs", "weights"} <= set(ignored)


def test_contributing_names_links_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert f"## {anchor.replace('-', ' ')}" in (ROOT / file).read_text().lower()
