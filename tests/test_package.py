"""The package: extras, one version, what its wheel holds, and commands that need nothing but what is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pins import REPOSITORY, REQUIREMENTS, read_requirements
from readme import CHANGELOG, links, words_of

import dopamine_lib
from dopamine_lib.__main__ import main
from dopamine_lib.course import material
from dopamine_lib.errors import EXTRAS
from dopamine_lib.federation.wires.agreement import code_version
from dopamine_lib.machine import PACKAGES

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KIT = "dopamine-kit"
#: Hides modules in a process and in those that it starts; as sitecustomize.py, which Python runs first.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def brought(extra: str) -> dict[str, Requirement]:
    """What an extra brings, and the extras that it names, by canonical name."""
    found = {}
    for need in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if need.name == KIT:
            for other in need.extras:
                found |= brought(other)
        else:
            found[canonicalize_name(need.name)] = need
    return found


BASE = {canonicalize_name(need.name): need for need in map(Requirement, PROJECT["dependencies"])}


def run(home: Path, *words: str, cwd: Path, first: Path | None = None) -> subprocess.CompletedProcess:
    """``dopamine`` as it was installed into ``home``, with another folder for Python to look into first."""
    path = os.pathsep.join(map(str, filter(None, (first, home))))
    return subprocess.run(
        [sys.executable, home / "bin" / "dopamine", *words],
        cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def without_extras(folder: Path) -> Path:
    """A folder for PYTHONPATH that hides whatever only an extra brings."""
    (folder / "sitecustomize.py").write_text(HIDE.format(names=[*EXTRAS]), encoding="utf-8")
    return folder


def test_requirements_are_those_of_the_library_and_of_all_extras():
    """``pip install -r requirements.txt`` and ``pip install ".[test]"`` bring the same, in the same ranges."""
    every = BASE | brought("test")
    required = read_requirements(REQUIREMENTS)
    assert {name: one.specifier for name, one in every.items()} == {n: one.specifier for n, one in required.items()}
    for_users = PROJECT["optional-dependencies"].keys() - {"test", "flower"}  # Flower excludes some of the pins
    assert brought("all").keys() == set().union(*map(brought, for_users))
    assert not BASE.keys() & brought("test").keys()


@pytest.mark.parametrize("module, extra", EXTRAS.items())
def test_a_missing_module_is_in_the_extra_that_is_named(module, extra):
    distributions = packages_distributions()
    if module not in distributions:
        pytest.skip(f"{module} is not installed")
    own = {canonicalize_name(need) for need in distributions[module]}
    assert own & brought(extra).keys() and not own & BASE.keys()


def test_what_this_machine_lacks_is_told_with_the_extra_that_brings_it():
    """Chapter 0's table, of every package that an extra for users brings; jupyterlab and others bring ipywidgets."""
    told = {name: re.findall(rf'"{KIT}\[(\w+)\]"', means) for name, means in PACKAGES.items()}
    for extra in PROJECT["optional-dependencies"].keys() - {"test", "all"}:
        own = {canonicalize_name(Requirement(need).name) for need in PROJECT["optional-dependencies"][extra]}
        assert all(told[name] == [extra] for name in told.keys() & own), extra


def test_the_wheel_has_what_git_tracks_and_nothing_that_lies_beside_it(tmp_path, monkeypatch):
    """A teacher's marks or a patient's scan in the checkout stay there; without git all there is belongs to the kit."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools, which PyTorch brings along")
    monkeypatch.syspath_prepend(REPOSITORY / ".ci")
    monkeypatch.chdir(tmp_path)
    build_kit, setuptools = map(importlib.import_module, ("build_kit", "setuptools"))
    kept, stray = (
        ("notebooks/01.ipynb", "dopamine_lib/assets/a.csv"),
        ("notebooks/marks.csv", "dopamine_lib/assets/b.csv"),
    )
    for name in (*kept, *stray, "dopamine_lib/__init__.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("", encoding="utf-8")
    whole = {
        "packages": ["dopamine_lib"],
        "package_data": {"dopamine_lib": ["assets/*"]},
        "include_package_data": False,
    }

    def packed() -> set[str]:
        build = build_kit.BuildPy(setuptools.Distribution(whole))
        build.ensure_finalized()
        beside = {path for path in build.kit().values() if path.startswith("notebooks")}
        return beside | {f"{folder}/{name}" for _, folder, _, names in build.data_files for name in names}

    assert packed() == {*kept, *stray}
    for words in (["init", "-q"], ["add", *kept]):
        subprocess.run(["git", *words], check=True)
    assert packed() == set(kept)


def test_there_is_one_version():
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == dopamine_lib.__version__
    archived = json.loads(
        (REPOSITORY / ".zenodo.json").read_text(encoding="utf-8")
    )  # Zenodo reads no CITATION.cff then
    assert {archived[key] == cited[key] for key in ("version", "title", "license")} == {True}
    assert [one["name"] for one in archived["creators"]] == [one["name"] for one in cited["authors"]]
    newest = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", CHANGELOG.read_text(encoding="utf-8"), re.M)[0]
    assert newest == dopamine_lib.__version__


def solved(folder: Path) -> list[str]:
    """Notebooks below a folder that have a hidden test in them, and what lies beside them."""
    sources = [path for path in folder.rglob("*") if path.is_file() and "source" in path.parts]
    notebooks = [path for path in folder.rglob("*.ipynb") if "### BEGIN HIDDEN TESTS" in words_and_code(path)]
    return sorted({path.name for path in sources + notebooks})


def words_and_code(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells)


def check_course(folder: Path) -> None:
    """Every chapter and homework is there, every link leads somewhere, and nothing hides the installed library."""
    for place in ("notebooks", "notebooks/homework"):
        wanted = sorted(path.name for path in (REPOSITORY / place).glob("*.ipynb"))
        assert sorted(path.name for path in (folder / place).glob("*.ipynb")) == wanted
    for page in [*folder.rglob("*.md"), *folder.rglob("*.ipynb")]:
        targets = {link.partition("#")[0] for link in links(words_of(page)) if "://" not in link}
        assert not [link for link in targets if link and ":" not in link and not (page.parent / link).exists()], page
    assert not list(folder.rglob("__init__.py")) and (folder / "data_download.py").exists()


def test_a_course_is_chapters_homework_and_all_that_they_link_to(tmp_path, capsys):
    assert main(["course", str(tmp_path / "students")]) == 0
    assert "jupyter lab" in capsys.readouterr().out
    check_course(tmp_path / "students")
    assert not solved(tmp_path / "students")
    assert main(["course", str(tmp_path / "lecturers"), "--solutions"]) == 0
    assert set(solved(tmp_path / "lecturers")) == {path.name for path in (REPOSITORY / material.SOLVED).iterdir()}


def test_solutions_stay_behind_even_where_a_page_links_to_them(tmp_path, monkeypatch):
    for name in ("LICENSE", "CITATION.cff", "data_download.py", "README.md"):
        (tmp_path / "kit" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "kit" / name).write_text("", encoding="utf-8")
    (tmp_path / "kit" / material.SOLVED).mkdir(parents=True)
    (tmp_path / "kit" / "notebooks" / "pages").mkdir()
    (tmp_path / "kit" / material.SOLVED / "answers.md").write_text("42", encoding="utf-8")
    page = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("[a](homework/source/answers.md) [b](../README.md)")]
    )
    nbformat.write(page, tmp_path / "kit" / "notebooks" / "01_one.ipynb")
    monkeypatch.setattr(material, "REPOSITORY", tmp_path / "kit")
    names = {path.name for path in material.write_course(tmp_path / "out")}
    assert "README.md" in names and "answers.md" not in names
    assert "answers.md" in {path.name for path in material.write_course(tmp_path / "all", solutions=True)}


def test_refusals(tmp_path, refuses, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with refuses("file is not an empty folder", "name another"):
        material.write_course(tmp_path / "file")
    with refuses("out cannot be written", "name another folder"):
        material.write_course(tmp_path / "file" / "out")
    monkeypatch.setattr(material, "REPOSITORY", tmp_path)
    with refuses("no notebooks", "repository or its wheel"):
        material.write_course(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_wheel_has_the_library_and_the_kit_and_nothing_else(installed):
    """What git has of both: no tests, no caches; modules and data alike."""
    left_out = {"__pycache__", ".ipynb_checkpoints"}

    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {path.as_posix() for path in found if not left_out & set(path.parts)}

    kit = installed / "dopamine_lib" / "kit"
    library = {name for name in files(installed / "dopamine_lib") if not name.startswith("kit/")}
    assert library == files(REPOSITORY / "dopamine_lib")
    for name in ("notebooks", "figures"):
        assert files(kit / name) == files(REPOSITORY / name)
    assert all((REPOSITORY / name).read_bytes() == (kit / name).read_bytes() for name in files(kit))
    (information,) = installed.glob("*.dist-info")
    assert information.name == f"dopamine_kit-{dopamine_lib.__version__}.dist-info"
    assert {path.name for path in (information / "licenses").iterdir()} >= {"LICENSE"}


@pytest.mark.slow
def test_the_installed_kit_writes_a_course_and_is_the_same_code(installed, tmp_path):
    ran = run(installed, "course", "mine", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    check_course(tmp_path / "mine")
    assert not solved(tmp_path / "mine")
    program = "from dopamine_lib.federation.wires import agreement as a; print(a.__file__, a.code_version())"
    asked = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "mine", env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert asked.stdout.split() == [str(installed / "dopamine_lib/federation/wires/agreement.py"), code_version()]


@pytest.mark.slow
def test_a_project_with_a_leak_from_the_installed_kit_has_no_solutions(installed, tmp_path):
    """It is a copy of the library, and an installed library has the solved homework inside."""
    program = "from dopamine_lib.course.leaks import plant_leak; plant_leak('project', 1, run=False)"
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, check=True
    )
    assert (tmp_path / "project" / "dopamine_lib" / "__main__.py").exists() and not solved(tmp_path / "project")


@pytest.mark.slow
def test_without_any_extra_it_accounts_and_trains(installed, tmp_path):
    """And says in one line which extra another command needs."""
    hidden = without_extras(tmp_path)
    words = "epsilon --noise-multiplier 1.15 --sample-rate 0.03 --steps 100 --delta 1e-4".split()
    ran = run(installed, *words, cwd=tmp_path, first=hidden)
    assert ran.returncode == 0 and "at delta 0.0001" in ran.stdout and not ran.stderr, ran.stderr
    words = "reproduce --data heart --settings FSCDP --runs 1 --rounds 30 --epsilon 1 --accountant rdp --out results"
    ran = run(installed, *words.split(), cwd=tmp_path, first=hidden)
    assert ran.returncode == 0, ran.stderr
    assert {"results.json", "figure1.png"} <= {path.name for path in (tmp_path / "results").iterdir()}
    for words, extra in (
        (["homework", "out"], "course"),
        (["site", "out"], "course"),
        (["app"], "inference"),
        ("reproduce --data heart --settings FSCDP --runs 1 --aggregation bfv --out bfv".split(), "encryption"),
    ):
        ran = run(installed, *words, cwd=tmp_path, first=hidden)
        last = ran.stderr.splitlines()[-1]
        assert ran.returncode == 2 and last.startswith("dopamine: ") and "Traceback" not in ran.stderr, ran.stderr
        assert f'pip install "{KIT}[{extra}]"' in last
