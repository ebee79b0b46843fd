"""The numbers in homework's tests: drawn for a year's students, and drawn anew when their answers are graded.

A test of a solved notebook asks ``draw`` for its inputs and ``right``, the solution, for what is expected on them:

    s, e = draw.real(1, 9), draw.real(0.1, 3)
    assert math.isclose(laplace_scale(s, e), right.laplace_scale(s, e))

For several inputs, ``right.each("laplace_scale", pairs)`` gives the list. In the students' copy of a year the numbers
stand in their place. So constants that somebody learned by heart, from a copy or from a friend of last year, are worth
nothing.
"""

import ast
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from dopamine_lib.errors import InputError

_MOST = 64  # numbers of one literal in a student's notebook


class Draws:
    """Numbers for the tests of one homework, the same ones for the same seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def real(self, low: float, high: float, digits: int = 2) -> float:
        """A number between two others, with few digits."""
        return round(self._random.uniform(low, high), digits)

    def reals(self, count: int, low: float, high: float, digits: int = 2) -> list[float]:
        """Several such numbers."""
        return [self.real(low, high, digits) for _ in range(count)]

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return self._random.randint(low, high)

    def wholes(self, count: int, low: int, high: int) -> list[int]:
        """Several such numbers."""
        return [self.whole(low, high) for _ in range(count)]

    def pick(self, *choices: Any) -> Any:
        """One of these."""
        return self._random.choice(choices)


def each(functions: dict[str, Any]) -> Callable[[str, list[tuple]], list]:
    """What gives a function's answers, known by its name, to a list of arguments.

    >>> each({"add": sum})("add", [([1, 2],), ([3, 4],)])
    [3, 7]
    """
    return lambda name, cases: [functions[name](*case) for case in cases]


def literal(value: Any) -> str:
    """Python that stands for a value.

    >>> literal((np.array([1.0, 2.5]), np.uint32([7]), float("inf")))
    "(np.array([1.0, 2.5]), np.array([7], dtype='uint32'), float('inf'))"

    Raises InputError for more numbers than anybody would read, and for what is no plain data.
    """
    if isinstance(value, np.ndarray):
        if value.size > _MOST:
            raise InputError(f"an array of {value.size} numbers is too long for a student's copy; take at most {_MOST}")
        usual = value.dtype in (np.float64, np.int64, np.bool_) and value.size > 0
        return f"np.array({literal(value.tolist())}{'' if usual else f', dtype={str(value.dtype)!r}'})"
    if isinstance(value, np.generic):
        return literal(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(key)}: {literal(one)}' for key, one in value.items())}}}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise InputError(f"{type(value)} cannot stand in a student's copy; draw and expect numbers, lists and arrays")


def run_with_numbers(source: str, names: dict[str, Any]) -> str:
    """Run a cell, whose ``draw`` and ``right`` are among ``names``; the cell with what they gave in their places.

    >>> run_with_numbers("two = 2 * draw.whole(4, 4)", {"draw": Draws(0)})
    'two = 2 * 4'

    Raises InputError where one of them is asked more than once at one place, or not at all.
    """
    tree = ast.parse(source)
    places: list[ast.Call] = []
    given: list[list[str]] = []

    def note(number: int, value: Any) -> Any:
        given[number].append(literal(value))
        return value

    class Sites(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            asked = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            if not (asked and node.func.value.id in ("draw", "right")):
                return self.generic_visit(node)
            places.append(node)
            given.append([])
            noted = ast.Call(ast.Name("__note", ast.Load()), [ast.Constant(len(places) - 1), node], [])
            return ast.copy_location(noted, node)

    code = compile(ast.fix_missing_locations(Sites().visit(tree)), "cell", "exec")
    names["__note"] = note
    exec(code, names)
    del names["__note"]
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # positions are counted in bytes
    by_place = sorted(zip(places, given, strict=True), key=lambda pair: (pair[0].lineno, pair[0].col_offset))
    for node, values in reversed(by_place):
        if len(values) != 1:
            raise InputError(f"{ast.unparse(node)} is asked {len(values)} times; ask it once, outside of loops")
        first, last = node.lineno - 1, node.end_lineno - 1
        rest = lines[last][node.end_col_offset :]
        lines[first : last + 1] = [lines[first][: node.col_offset] + values[0].encode() + rest]
    return b"".join(lines).decode()
