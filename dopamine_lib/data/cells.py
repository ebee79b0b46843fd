"""Cells of a table, read as its data sheet declares: a number, one of several values, an attribute.

A reader is told a cell and the words that name its place, which begin its one line of refusal.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dopamine_lib.data.csv_file import shown, some
from dopamine_lib.errors import InputError

#: What is a missing value in every table.
MISSING = ("", "?", "na", "nan", "null")
#: Is told a cell and where it stands, and gives its numbers, or its value.
Reader = Callable[[str, str], Any]


def holds(cell: str, value: object) -> bool:
    """Whether a cell holds a declared value: "1" and "1.0" hold 1.

    >>> holds("1.0", 1), holds("yes", "yes"), holds("yes", 1)
    (True, True, False)
    """
    number = number_in(cell)
    return cell == str(value) if number is None or isinstance(value, str) else number == value


def number_in(cell: str) -> float | None:
    """The finite number in a cell; None where there is none."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def present(cell: str, where: str) -> str:
    """A reader of a cell that must not be missing."""
    if cell.lower() in MISSING:
        raise InputError(f"{where} is missing; fill it in, or leave out the row")
    return cell


def one_of(groups: dict[str, list], declared: str, make: type = int) -> Reader:
    """A reader of a cell's group, as its number in ``groups``, or its name where ``make`` is str."""
    for name, values in groups.items():
        if not isinstance(values, list):
            raise InputError(f"{declared}: {name} is {values!r}, but must be a list of values, as in [{values!r}]")

    def read(cell: str, where: str) -> int | str:
        for number, (name, values) in enumerate(groups.items()):
            if any(holds(cell, value) for value in values):
                return name if make is str else number
        raise InputError(f"{where} {shown(cell)} is not declared; add it to {declared}, which has {some(groups)}")

    return read


def in_range(cell: str, where: str) -> float:
    """A reader of a cell that must be a number."""
    number = number_in(cell)
    if number is None:
        remedy = "write it as 1.5, or add it to the sheet's list 'missing'"
        raise InputError(f"{where} {shown(cell)} is not a number; {remedy}")
    return number


def attribute(told: object, declared: str) -> Reader:
    """A reader of an attribute's cells: the name of a declared group of values, or of a band between declared ends."""
    if not isinstance(told, dict) or not (("values" in told) ^ ("bands" in told)):
        raise InputError(f"{declared}: {told!r} must have values, as in values = {{ female = [0] }}, or bands = [50]")
    if "values" in told:
        return one_of(told["values"], declared, str)
    ends = told["bands"]
    numbers = isinstance(ends, list) and all(type(end) in (int, float) for end in ends)
    if not numbers or not ends or sorted(ends) != ends:
        raise InputError(f"{declared}: bands is {ends!r}, but must be a list of ascending numbers")
    names = [f"below {ends[0]}", *(f"{a} to below {b}" for a, b in zip(ends, ends[1:], strict=False)), f"{ends[-1]} up"]

    def read(cell: str, where: str) -> str:
        return names[int(np.searchsorted(ends, in_range(cell, where), "right"))]

    return read
