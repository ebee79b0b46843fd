"""A homework as its solved notebook has it: what every exercise asks for, its solution and its tests.

Some cells are tagged ``choice-POOL-NUMBER``: of each pool a year's students get one alternative and not the others.
"""

import ast
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat

from dopamine_lib.course.draws import Draws, each, run_with_numbers
from dopamine_lib.course.material import REPOSITORY, SOLVED
from dopamine_lib.errors import InputError

#: The kit's solved homework.
SOURCES = REPOSITORY / SOLVED
#: The year of the students' copies in ``notebooks/homework``, and of others where none is asked for.
YEAR = 2026
#: The tag of a cell that not every year has.
_CHOICE = re.compile(r"choice-(\d+)-(\d+)")
#: What nbgrader writes where an answer in words is to stand.
BLANK = "YOUR ANSWER HERE"
#: What a solved notebook's set-up has to draw numbers itself, and no other.
_DRAWS = re.compile(r"\n*### BEGIN DRAWS\n.*?### END DRAWS\n", re.DOTALL)


@dataclass(frozen=True)
class Exercise:
    """One exercise: its grade_id, its heading, and the cells of its solution and its tests."""

    name: str
    title: str
    answer: str
    test: str
    points: int

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that it asks for."""
        return functions_of(self.answer)


@dataclass(frozen=True)
class Question:
    """A question that is answered in words and marked by hand, after a rubric."""

    name: str
    title: str
    text: str
    rubric: str
    points: int


@dataclass(frozen=True)
class Homework:
    """A whole homework: its file's name without ending, its title, the cells before the exercises, and what it asks.

    others    functions that are asked for in other years
    headings  of all its sections, in order
    """

    name: str
    title: str
    setup: tuple[str, ...]
    exercises: tuple[Exercise, ...]
    questions: tuple[Question, ...]
    others: frozenset[str]
    headings: tuple[str, ...]

    @classmethod
    def read(cls, path: str | PathLike, year: int | None = YEAR) -> "Homework":
        """The homework of a solved notebook, as a year's students have it, or with all that any year has.

        Raises InputError where a test has no exercise before it.
        """
        path = Path(path)
        cells = nbformat.read(path, 4).cells
        asked = cells if year is None else of_year(cells, year)
        setup, answers, exercises, questions, title, text, headings = [], [], [], [], "", "", []
        for cell in asked:
            own = cell.metadata.get("nbgrader", {})
            if cell.cell_type == "markdown" and own.get("grade"):
                questions.append(Question(own["grade_id"], title, text, cell.source, int(own["points"])))
            elif cell.cell_type == "markdown":
                text = cell.source
                headings += re.findall(r"^## (.*)$", text, re.MULTILINE)
                title = (re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE) or [title])[0]
            elif own.get("solution"):
                answers.append(cell.source)
            elif own.get("grade"):
                if not answers:
                    raise InputError(f"{path.name}: {own['grade_id']} tests nothing; put it behind its exercise")
                name = own["grade_id"].removesuffix("-test")
                exercises.append(Exercise(name, title, "\n\n".join(answers), cell.source, int(own["points"])))
                answers = []
            elif "google.colab" not in cell.source:
                setup.append(without_draws(cell.source))
        heading = next(cell.source for cell in cells if cell.cell_type == "markdown").splitlines()[0]
        mine = {name for exercise in exercises for name in exercise.functions}
        solved = [cell.source for cell in cells if cell.metadata.get("nbgrader", {}).get("solution")]
        others = {name for source in solved for name in functions_of(source)} - mine
        parts = (tuple(part) for part in (setup, exercises, questions))
        return cls(path.stem, heading.lstrip("# "), *parts, frozenset(others), tuple(headings))

    @property
    def functions(self) -> frozenset[str]:
        """All functions that it asks for."""
        return frozenset(name for exercise in self.exercises for name in exercise.functions)

    def begin(self, seed: int) -> tuple[dict[str, Any], list[str]]:
        """A namespace in which the set-up has run, with ``draw`` and ``right``, and the set-up with its numbers."""
        names: dict[str, Any] = {"draw": Draws(seed), "right": self.right()}
        return names, [run_with_numbers(source, names) for source in self.setup]

    def right(self) -> SimpleNamespace:
        """The functions of the solution, and ``each``."""
        names: dict[str, Any] = {"draw": Draws(0)}
        for source in (*self.setup, *(exercise.answer for exercise in self.exercises)):
            exec(source, names)
        return SimpleNamespace(**{name: names[name] for name in self.functions}, each=each(names))


def draws_and_solution(name: str, year: int = YEAR) -> tuple[Draws, SimpleNamespace]:
    """What a solved notebook of the kit calls ``draw`` and ``right``; ``right`` knows the exercises of all years."""
    return Draws(year), Homework.read(SOURCES / f"{name}.ipynb", None).right()


def of_year(cells: list[nbformat.NotebookNode], year: int) -> list[nbformat.NotebookNode]:
    """The cells that a year's students get: of each pool one alternative.

    The year is read as a number whose last digit chooses from the first pool, the next from the second and so on. So
    each year has other exercises than the one before, and all combinations come up.
    """
    places = [next(filter(None, map(_CHOICE.fullmatch, cell.metadata.get("tags", []))), None) for cell in cells]
    pools: dict[int, int] = {}
    for place in filter(None, places):
        pools[int(place[1])] = max(int(place[2]), pools.get(int(place[1]), 0))
    chosen = {}
    for pool, alternatives in sorted(pools.items()):
        year, chosen[pool] = divmod(year, alternatives)
    return [
        cell
        for cell, place in zip(cells, places, strict=True)
        if place is None or chosen[int(place[1])] == int(place[2]) - 1
    ]


def without_draws(source: str) -> str:
    """A set-up cell as students have it, who have no solution to ask."""
    return _DRAWS.sub("\n", source)


def functions_of(source: str) -> tuple[str, ...]:
    """The functions that a cell defines; none if it is no Python.

    >>> functions_of("def share(x, mask):\\n    return mask, x - mask")
    ('share',)
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    return tuple(node.name for node in body if isinstance(node, ast.FunctionDef))
