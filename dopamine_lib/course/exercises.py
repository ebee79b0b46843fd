"""A homework as its solved notebook has it: what every exercise asks for, its solution and its tests."""

import ast
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import nbformat

from dopamine_lib.errors import InputError


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
class Homework:
    """A whole homework: its file's name without ending, its title, the cells before the exercises, the exercises."""

    name: str
    title: str
    setup: tuple[str, ...]
    exercises: tuple[Exercise, ...]

    @classmethod
    def read(cls, path: str | PathLike) -> "Homework":
        """The homework of a solved notebook. Raises InputError where a test has no exercise before it."""
        path = Path(path)
        cells = nbformat.read(path, 4).cells
        setup, answers, exercises, title = [], [], [], ""
        for cell in cells:
            own = cell.metadata.get("nbgrader", {})
            if cell.cell_type == "markdown":
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
                setup.append(cell.source)
        heading = next(cell.source for cell in cells if cell.cell_type == "markdown").splitlines()[0]
        return cls(path.stem, heading.lstrip("# "), tuple(setup), tuple(exercises))

    @property
    def functions(self) -> frozenset[str]:
        """All functions that it asks for."""
        return frozenset(name for exercise in self.exercises for name in exercise.functions)

    def begin(self, seed: int) -> dict[str, Any]:
        """A namespace in which the cells before the first exercise have run."""
        names: dict[str, Any] = {}
        for source in self.setup:
            exec(source, names)
        return names

    def solved(self, seed: int) -> dict[str, Any]:
        """The functions of the solution, in the namespace in which they work."""
        names = self.begin(seed)
        for exercise in self.exercises:
            exec(exercise.answer, names)
        return names


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
