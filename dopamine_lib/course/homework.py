"""The students' copies of the homework, made by nbgrader: without solutions, outputs and hidden tests.

The exercises and the numbers in their tests are a year's own (``dopamine_lib.course.draws``). nbgrader wants a course
tree: it is made in a temporary folder, and no gradebook is written.
"""

import re
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import nbformat

from dopamine_lib.course.draws import Draws, each, run_with_numbers
from dopamine_lib.course.exercises import SOURCES, YEAR, of_year, without_draws
from dopamine_lib.errors import InputError, not_installed
from dopamine_lib.machine import need_home
from dopamine_lib.progress import progress_bar


def students_copies(
    out: str | PathLike,
    sources: str | PathLike | None = None,
    *,
    year: int = YEAR,
    course: str | PathLike | None = None,
) -> list[Path]:
    """Write a student's copy of every notebook of ``sources`` (default: ``SOURCES``) into the folder ``out``.

    year    whose exercises and numbers they have
    course  a folder of nbgrader's, where ``source/NAME/NAME.ipynb`` is to be that year's solved notebook

    Returns the files written, ``out/NAME.ipynb``. Raises InputError if ``out`` is in use or cannot be made, ``course``
    has such sources already, nbgrader is not installed, there are no notebooks, or one cannot be used; then nothing is
    written.
    """
    out, sources = Path(out), SOURCES if sources is None else Path(sources)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name another, or empty it")
    notebooks = find_homework(sources)
    kept = None if course is None else Path(course) / "source"
    if kept is not None and any((kept / notebook.stem).exists() for notebook in notebooks):
        raise InputError(f"{kept} has homework already; name another folder, or move it away")
    need_home()
    with tempfile.TemporaryDirectory(prefix="dopamine-homework-") as folder:
        shown = progress_bar(notebooks, title="homework", unit="notebook")
        released = [_release(Path(folder).resolve(), notebook, year) for notebook in shown]
        try:
            out.mkdir(parents=True, exist_ok=True)
            if kept is not None:
                shutil.copytree(Path(folder) / "source", kept, dirs_exist_ok=True)
            return [Path(shutil.copyfile(copy, out / copy.name)) for copy in released]
        except OSError as error:
            where = out if kept is None else f"{out} or {kept}"
            raise InputError(f"{where} cannot be written ({error.strerror}); name another, or make room") from None


def numbered(notebook: Path, year: int) -> nbformat.NotebookNode:
    """A solved notebook with a year's exercises, and its numbers where tests draw some or ask the solution for some.

    Raises InputError where a cell stops, or a test does not pass.
    """
    found = nbformat.read(notebook, 4)
    names: dict[str, Any] = {"draw": Draws(year)}
    names["right"] = _Solution(names)
    found.cells = of_year(found.cells, year)
    for cell in found.cells:
        cell.metadata.tags = [tag for tag in cell.metadata.get("tags", []) if not tag.startswith("choice-")]
        if not cell.metadata.tags:
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.source, cell.outputs, cell.execution_count = without_draws(cell.source), [], None
            try:
                cell.source = run_with_numbers(cell.source, names)
            except Exception as error:
                raise InputError(
                    f"{notebook.name} stops ({type(error).__name__}: {error}); correct the notebook"
                ) from None
    return found


class _Solution:
    """The functions of the cells that have run so far."""

    def __init__(self, names: dict[str, Any]):
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return each(self._names) if name == "each" else self._names[name]


def find_homework(sources: Path) -> list[Path]:
    """The notebooks of ``sources`` in order. Raises InputError if there are none."""
    notebooks = sorted(sources.glob("*.ipynb"))
    if not notebooks:
        raise InputError(f"no homework in {sources}; install the kit from its repository or its wheel")
    return notebooks


def _release(course: Path, notebook: Path, year: int) -> Path:
    """Put ``notebook`` into the course as an assignment of its own name and generate the students' version of it."""
    try:
        from nbgrader.apps import NbGraderAPI
    except ImportError:
        raise not_installed("nbgrader") from None
    from traitlets.config import Config

    name = notebook.stem
    source = course / "source" / name / notebook.name
    source.parent.mkdir(parents=True)
    nbformat.write(numbered(notebook, year), source)
    # naming the notebook lets it do without a database: copies need no gradebook, which takes seconds to make
    config = Config(
        CourseDirectory={"root": str(course), "notebook_id": name},
        GenerateAssignment={"no_database": True},
        SaveCells={"enabled": False},
    )
    result = NbGraderAPI(config=config).generate_assignment(name)
    if not result["success"]:
        raise InputError(f"nbgrader refuses {notebook.name} ({_reason(result)}); correct the notebook")
    return course / "release" / name / notebook.name


def _reason(result: dict) -> str:
    """The first error in nbgrader's log: the later ones only repeat that there was one."""
    errors = re.findall(r"^\s*(?:\w+\.)*(\w*(?:Error|Exception): .+)$", result.get("log") or "", re.MULTILINE)
    return errors[0].strip() if errors else "it does not say why"
