"""Binder: a small image without CUDA, the tested versions, and JupyterLab opened at the first chapter.

What repo2docker makes of it is shown by ``jupyter-repo2docker --no-build --debug .``, which needs no Docker.
"""

import os
import re
import shutil
import subprocess
import urllib.parse

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pins import BINDER, CONSTRAINTS, REPOSITORY, REQUIREMENTS, lines, read_constraints, read_requirements
from readme import README

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FIRST = "lab/tree/notebooks/00_start_here.ipynb"
#: What the image does without: tests, homework's making and grading, the site, slides; and Binder brings a JupyterLab.
LEFT_OUT = {"furo", "hypothesis", "jupyter-server-mathjax", "jupyterlab", "mpmath", "myst-nb", "nbclient", "nbgrader"}
LEFT_OUT |= {
    "dp-accounting",
    "nbval",
    "packaging",
    "playwright",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "pyyaml",
    "ruff",
    "scikit-image",
    "nbconvert",
    "sphinx",
    "sphinx-revealjs",
}


def badge(repository: str) -> str:
    """The address on mybinder.org that opens a GitHub repository's first chapter in JupyterLab."""
    owner, name = urllib.parse.urlsplit(repository).path.strip("/").removesuffix(".git").split("/")
    return f"https://mybinder.org/v2/gh/{owner}/{name}/HEAD?urlpath={FIRST}"


def test_its_pins_are_those_of_the_tests():
    pinned, required, binder = read_constraints(CONSTRAINTS), read_requirements(REQUIREMENTS), read_requirements(BINDER)
    assert binder.keys() == required.keys() - LEFT_OUT and LEFT_OUT < required.keys()
    for name, requirement in binder.items():
        local = "+cpu" if name in ("torch", "torchvision") else ""
        assert requirement.specifier == SpecifierSet(f"=={pinned[name]}{local}"), requirement


def test_it_takes_pytorch_without_cuda_and_the_kit_itself():
    options = [line for line in lines(BINDER) if line.startswith("-")]
    assert options == [f"--extra-index-url {CPU_INDEX}", "-c ../constraints.txt", "-e ."]
    assert (BINDER.parent / "../constraints.txt").resolve() == CONSTRAINTS


def test_it_has_no_solved_homework(tmp_path):
    """What a student could open there: the copies alone. repo2docker runs ``postBuild`` in the repository's folder."""
    script = REPOSITORY / "binder" / "postBuild"
    assert os.access(script, os.X_OK)
    shutil.copytree(REPOSITORY / "notebooks", tmp_path / "notebooks")
    subprocess.run([script], cwd=tmp_path, check=True)
    left = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*_homework.ipynb")]
    assert left and not any("BEGIN SOLUTION" in text for text in left)


def test_its_start_script_is_one_and_hands_over():
    start = REPOSITORY / "binder" / "start"
    assert os.access(start, os.X_OK)
    ran = subprocess.run([start, "sh", "-c", 'echo "$0 $OMP_NUM_THREADS"', "two words"], capture_output=True, text=True)
    assert ran.returncode == 0 and re.fullmatch(r"two words [1-4]\n", ran.stdout), ran.stderr


def test_there_is_nothing_else_that_repo2docker_would_read():
    """Other files of its kinds would be read as well, or instead."""
    assert {path.name for path in (REPOSITORY / "binder").iterdir()} == {
        "postBuild",
        "requirements.txt",
        "runtime.txt",
        "start",
    }


def test_the_readme_leads_there():
    """To this repository, if CITATION.cff says where it is; else it says what to enter on Binder's page."""
    text, first = README.read_text(encoding="utf-8"), REPOSITORY / FIRST.removeprefix("lab/tree/")
    repository = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")).get("repository-code")
    assert first.is_file() and "mybinder.org" in text and FIRST in text
    addresses = re.findall(r"https://mybinder\.org/v2/[^\s)]+", text)
    assert set(addresses) == ({badge(repository)} if repository else set())


@pytest.mark.parametrize("repository", ["https://github.com/a-b/c.d", "https://github.com/a-b/c.d.git"])
def test_a_badge(repository):
    assert badge(repository) == "https://mybinder.org/v2/gh/a-b/c.d/HEAD?urlpath=lab/tree/notebooks/00_start_here.ipynb"
