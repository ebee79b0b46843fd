"""The students' copies of the homework, made by nbgrader: without solutions, outputs and hidden tests.

nbgrader wants a course tree: it is made in a temporary folder, and no gradebook is written. Grading is nbgrader's own
business and needs a course folder of the instructor's: see the README.
"""

import re
import shutil
import tempfile
from os import PathLike
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.machine import need_home

#: The repository's homework. The kit is installed in place (``-e .``), so this folder lies beside the library.
SOURCES = Path(__file__).parents[2] / "notebooks" / "homework"


def students_copies(out: str | PathLike, sources: str | PathLike | None = None) -> list[Path]:
    """Write a student's copy of every notebook of ``sources`` (default: ``SOURCES``) into the folder ``out``.

    Returns the files written, ``out/NAME.ipynb``. Raises InputError if ``out`` is in use, nbgrader is not installed,
    there are no notebooks, or nbgrader refuses one; then nothing is written.
    """
    out, sources = Path(out), SOURCES if sources is None else Path(sources)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name another, or empty it")
    notebooks = find_homework(sources)
    need_home()
    with tempfile.TemporaryDirectory(prefix="dopamine-homework-") as course:
        released = [_release(Path(course).resolve(), notebook) for notebook in notebooks]
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copyfile(copy, out / copy.name)) for copy in released]


def find_homework(sources: Path) -> list[Path]:
    """The notebooks of ``sources`` in order. Raises InputError if there are none."""
    notebooks = sorted(sources.glob("*.ipynb"))
    if not notebooks:
        raise InputError(
            f"no homework in {sources}; install the kit from its repository with: pip install -r requirements.txt"
        )
    return notebooks


def _release(course: Path, notebook: Path) -> Path:
    """Put ``notebook`` into the course as an assignment of its own name and generate the students' version of it."""
    try:
        from nbgrader.apps import NbGraderAPI
    except ImportError:
        raise InputError("nbgrader is not installed; run: pip install nbgrader==0.9.6") from None
    from traitlets.config import Config

    name = notebook.stem
    source = course / "source" / name / notebook.name
    source.parent.mkdir(parents=True)
    shutil.copyfile(notebook, source)
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
