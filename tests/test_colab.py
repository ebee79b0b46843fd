"""The cell that makes a notebook run on Google Colab: the first code cell of each, and idle everywhere else."""

import os
import subprocess
import sys
import types

import nbformat
import pytest
from colab_cell import NBGRADER, SOURCE, TAG
from readme import NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_it(path):
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    first = code[0]
    assert first.source == SOURCE and first.metadata.tags == [TAG] and not first.outputs
    own = first.metadata.get("nbgrader", {})
    assert {key: own.get(key) for key in NBGRADER} == NBGRADER if path.parent.name == "homework" else not own
    assert not any("google.colab" in cell.source for cell in code[1:])


def test_it_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    before, names = (os.getcwd(), list(sys.path)), {}
    exec(SOURCE, names)
    assert (os.getcwd(), sys.path) == before
    assert names.keys() - {"__builtins__"} == {"sys"}


def test_on_colab_it_fetches_installs_and_goes_there(tmp_path, monkeypatch):
    """With git and pip as they would be called, twice: the second time the kit is there already."""
    called = []

    def run(words, cwd=None, check=False):
        assert check
        called.append((words, cwd))
        if words[0] == "git":
            os.makedirs(os.path.join(words[-1], "notebooks"))

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("builtins.input", lambda _: " https://example.org/kit ")
    kit = str(tmp_path / "dopamine-kit")
    for _ in range(2):
        exec(SOURCE, {})
        assert os.path.realpath(os.getcwd()) == os.path.realpath(os.path.join(kit, "notebooks"))
        assert sys.path[0] == kit
    git, pip = ([words for words, _ in called if program in words] for program in ("git", "pip"))
    assert git == [["git", "clone", "--depth", "1", "--", "https://example.org/kit", kit]]
    assert len(pip) == 2 and all(words[1:] == ["-m", "pip", "install", "-q", "-r", "requirements.txt"] for words in pip)
    assert all(cwd == kit for words, cwd in called if "pip" in words)
