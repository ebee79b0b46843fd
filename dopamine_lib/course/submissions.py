"""Homework as it comes back: found in a folder of students, read, and mended where it can be.

What counts in a notebook is its code, in the order of its cells: an answer is known by the name of its function. So
neither the file's name nor cells that are lost, doubled or moved, nor the metadata that Colab, VS Code or a student
changed, need to be right.
"""

import ast
import codecs
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from dopamine_lib.course.exercises import BLANK, Homework, Question, functions_of
from dopamine_lib.errors import InputError
from dopamine_lib.files import parse_json

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_LARGEST = 2**25  # bytes of a file


@dataclass
class Submission:
    """A student's notebook: its code cells, its cells of text, and what was mended."""

    path: Path
    cells: list[str]
    texts: list[str]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Submission":
        """The submission in a file. Raises InputError for a link, and what is no notebook and cannot be made one."""
        if path.is_symlink():
            raise InputError("it is a link to another place: ask for the file itself")
        data, notes, encoding = path.read_bytes() if path.stat().st_size <= _LARGEST else b"", [], "utf-8"
        if not data:
            raise InputError("the file is empty or larger than 32 MB: ask for it once more, without its outputs")
        for mark, name in _MARKS.items():
            if data.startswith(mark):
                encoding = name
                notes.append("a byte-order mark was taken off")
        if re.search(rb"^(<{7}|>{7}) ", data, re.MULTILINE):
            raise InputError("there are merge markers in the file: keep one side of each")
        try:
            text = data.decode(encoding)
            parse_json(text)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of cells without an id, which need none here
                cells = nbformat.reads(text, 4).cells
            code = [cell for cell in cells if cell.cell_type == "code"]
            texts = [cell.source for cell in cells if cell.cell_type != "code"]
            return cls(path, [_python(cell.source) for cell in code if not _is_test(cell)], texts, notes)
        except Exception as error:  # nbformat and JSON have many kinds
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"the file is no notebook ({said}): ask for it once more") from None

    @property
    def functions(self) -> list[str]:
        """The functions that its cells define, in order; a name may come twice."""
        return [name for source in self.cells for name in functions_of(source)]

    def answer(self, question: Question, headings: tuple[str, ...]) -> str:
        """What stands below a question's text, up to the next of the homework's ``headings``; empty if nothing does."""
        found, here = [], False
        for text in self.texts:
            if begun := {line.removeprefix("## ").strip() for line in text.splitlines()}.intersection(headings):
                here = question.title in begun
                text = text.replace(question.text, "")
            found += [text] * here
        return "\n\n".join(found).replace(BLANK, "").strip()

    def homework(self, among: list[Homework]) -> Homework:
        """The homework that it answers, known by the functions. Raises InputError if it is none of them."""

        def known(one: Homework) -> frozenset[str]:
            return one.functions | one.others

        defined = set(self.functions)
        best = max(among, key=lambda one: (len(known(one) & defined), one.name == self.path.stem))
        if not known(best) & defined:
            raise InputError("no function in it is asked for in any homework: ask for the right file")
        if self.path.stem != best.name:
            self.notes.append(f"{self.path.name} was taken for {best.name}")
        for name in sorted(best.functions - defined):
            self.notes.append(f"{name} is not in it")
        for name in sorted(best.others & defined):
            self.notes.append(f"{name} is asked for in other years: see --year")
        for name in sorted(name for name in best.functions if self.functions.count(name) > 1):
            self.notes.append(f"{name} is written more than once, and the last counts")
        return best


def find_submissions(folder: Path) -> dict[str, list[Path]]:
    """The notebooks of every student below ``folder``: ``STUDENT/…/ANY.ipynb``, or ``STUDENT.ipynb`` beside others.

    Raises InputError if there are none.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).parts
        if (path.is_file() or path.is_symlink()) and ".ipynb_checkpoints" not in parts:
            found.setdefault(parts[0] if len(parts) > 1 else path.stem, []).append(path)
    for student in folder.iterdir() if folder.is_dir() else ():
        if student.is_dir() and not student.name.startswith("."):
            found.setdefault(student.name, [])
    if not any(found.values()):
        raise InputError(f"no notebooks in {folder}; put each student's into a folder with the student's name")
    return dict(sorted(found.items()))


def _is_test(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell is one of ours that answers nothing: the solved notebook's is used in its place."""
    own = cell.metadata.get("nbgrader")
    locked = isinstance(own, dict) and not own.get("solution") and (own.get("grade") or own.get("locked"))
    return bool(locked) and "YOUR CODE HERE" not in cell.source and not functions_of(cell.source)


def _python(source: str) -> str:
    """A cell's source without Jupyter's own commands."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    return source
