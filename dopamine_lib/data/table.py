"""Patients in a table: a CSV file, with a data sheet beside it that says what is public of its columns.

A range that is read off the patients tells of them, so every range, category and class is declared, in a TOML file of
the table's name; ``heart_disease/heart.toml`` is an example of all that it may hold. A row becomes numbers one input at
a time, each of norm 1 at most, and is then divided by the root of their number, so that its norm is at most 1:

range       scaled to [-1, 1] and clamped; with ``missing``, 0 where it is missing, and a flag beside it
categories  a number for each, 1 for the one that is met; all are 0 where it is missing
"""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dopamine_lib.data.csv_file import CsvFile, some
from dopamine_lib.data.dataset import Dataset, Datasheet, content_checksum, own_number, split_or_obey
from dopamine_lib.errors import InputError

#: The share of test patients, and who is one patient, where the sheet says nothing.
TEST, PERSONS = 0.2, "rows that are alike are one patient's: the table has no column of persons"
#: What the data sheet may hold, with the type of each entry.
SHEET = {"source": str, "licence": str, "notes": list, "patients": int, "test": float, "target": str, "person": str}
SHEET |= {"site": str, "split": str, "classes": dict, "sites": dict, "inputs": dict, "attributes": dict}
#: What is a missing value in every table.
MISSING = ("", "?", "na", "nan", "null")
#: Is told a cell and where it stands, and gives its numbers, or its value.
Reader = Callable[[str, str], Any]


def load_table(path: str | Path, *, name: str = "", seed: int = 0) -> Dataset:
    """The patients of a CSV file, by the data sheet beside it: ``patients.csv`` has its sheet in ``patients.toml``.

    ``images`` are the rows, float32 (N, p), and ``inputs`` names their p numbers. The sheet's column ``split`` is
    obeyed; without one a share ``test`` of the persons, drawn by a hash of each, are test patients.

    name  of the data set; by default the path
    Raises InputError, naming file and line, for an entry, a column or a value that is not as declared.
    """
    path = Path(path)
    sheet, table = _sheet(path.with_suffix(".toml")), CsvFile.read(path)
    at = path.with_suffix(".toml")
    if not table.rows:
        raise InputError(f"{path}: no rows; a line for each patient follows the names of the columns")

    def column(key: str, name: str) -> int:
        return table.column(name, remedy=f"{at.name} names it under '{key}'; name a column that is there")

    def read(key: str, name: str, reader: Reader) -> list:
        return [reader(cell, where) for where, cell in table.cells(column(key, name))]

    grades = tuple(sheet["classes"])
    labels = read("target", sheet["target"], _one_of(sheet["classes"], f"{at.name}, [classes]"))
    if "person" in sheet:
        who = read("person", sheet["person"], _present)
    else:
        who = ["\0".join(row) for _, row in table.rows]
    person = np.array([own_number(one) for one in who])
    parts = None if "split" not in sheet else list(table.cells(column("split", sheet["split"])))
    train, validation, test = split_or_obey(person, parts, test_fraction=sheet.get("test", TEST), seed=seed)
    blocks, inputs = zip(
        *(
            _encoded(name, told, read("inputs", name, _input(told, f"{at.name}, [inputs], {name}")))
            for name, told in sheet["inputs"].items()
        ),
        strict=True,
    )
    rows = np.concatenate(blocks, axis=1) / math.sqrt(len(blocks))
    attributes, proportions, sites = {}, {}, ()
    for own, told in sheet.get("attributes", {}).items():
        reader = _attribute(told, f"{at.name}, [attributes], {own}")
        attributes[own] = np.array(read("attributes", told.get("column", own), reader))
    if "site" in sheet:
        sites = sheet.get("sites")
        reader = _present if sites is None else _one_of({site: [site] for site in sites}, f"{at.name}, [sites]", str)
        attributes["site"] = np.array(read("site", sheet["site"], reader))
        proportions = {} if sites is None else {"site": sites}
        sites = tuple(sites or sorted(set(attributes["site"].tolist())))
    images, labels = rows.astype(np.float32), np.array(labels, dtype=np.int64)
    return Dataset(
        name=name or str(path),
        images=images,
        labels=labels,
        grades=grades,
        person=person,
        train=train,
        validation=validation,
        test=test,
        sheet=Datasheet(
            source=sheet.get("source", path.name),
            licence=sheet.get("licence", "none stated"),
            checksum=content_checksum(images, labels, test),
            notes=(
                *map(str, sheet.get("notes", [])),
                f"{len(blocks)} inputs in {images.shape[1]} columns: all declared in {at.name}",
            ),
            patients=sheet.get("patients"),
            proportions=proportions,
            persons=f"rows with the same {sheet['person']} are one patient's" if "person" in sheet else PERSONS,
            sites=sites,
        ),
        attributes=attributes,
        inputs=tuple(name for names in inputs for name in names),
    )


def _sheet(path: Path) -> dict:
    """The data sheet. Raises InputError for one that is missing or damaged, and for an unknown or wrong entry."""
    try:
        with open(path, "rb") as file:
            sheet = tomllib.load(file)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; a table needs a data sheet beside it, as dopamine_lib/data/heart_disease/heart.toml"
        ) from None
    except (OSError, ValueError) as error:  # tomllib's errors are ValueErrors
        raise InputError(f"{path}: cannot be read as TOML ({error}); put it right") from None
    for key, value in sheet.items():
        if key not in SHEET:
            raise InputError(f"{path}: '{key}' is unknown; a data sheet has {', '.join(SHEET)}")
        if type(value) is not SHEET[key]:
            raise InputError(f"{path}: '{key}' is {value!r}, but must be of type {SHEET[key].__name__}; put it right")
    for key in ("target", "classes", "inputs"):
        if not sheet.get(key):
            raise InputError(f"{path}: no '{key}'; a data sheet declares target, [classes] and [inputs]")
    if len(sheet["classes"]) < 2:
        raise InputError(f"{path}: [classes] has one class; declare two or more, with the target's values of each")
    if not 0 < sheet.get("test", TEST) < 1:
        raise InputError(f"{path}: 'test' is {sheet['test']}, but must lie in (0, 1): the share of test patients")
    if sheet.get("patients", 1) < 1:
        raise InputError(f"{path}: 'patients' is {sheet['patients']}, but must be 1 or more: training patients")
    for site, patients in sheet.get("sites", {}).items():
        if type(patients) is not int or patients < 1:
            raise InputError(f"{path}: [sites] has {site} = {patients!r}, but must have its number of patients")
    return sheet


def _is(cell: str, value: object) -> bool:
    """Whether a cell holds a declared value: "1" and "1.0" hold 1.

    >>> _is("1.0", 1), _is("yes", "yes"), _is("yes", 1)
    (True, True, False)
    """
    number = _number(cell)
    return cell == str(value) if number is None or isinstance(value, str) else number == value


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _present(cell: str, where: str) -> str:
    if cell.lower() in MISSING:
        raise InputError(f"{where} is missing; fill it in, or leave out the row")
    return cell


def _one_of(groups: dict[str, list], declared: str, make: Callable = None) -> Reader:
    """A reader of a cell's group, as its number in ``groups``, or its name where ``make`` is str."""
    for name, values in groups.items():
        if not isinstance(values, list):
            raise InputError(f"{declared}: {name} is {values!r}, but must be a list of values, as in [{values!r}]")

    def read(cell: str, where: str) -> int | str:
        for number, (name, values) in enumerate(groups.items()):
            if any(_is(cell, value) for value in values):
                return name if make is str else number
        raise InputError(f"{where} {cell!r} is not declared; add it to {declared}, which has {some(groups)}")

    return read


def _input(told: object, declared: str) -> Reader:
    """A reader of an input's cells: a number for a range, a category's number, or None where it is missing."""
    if (
        not isinstance(told, dict)
        or not (("range" in told) ^ ("categories" in told))
        or told.keys()
        - {
            "range",
            "categories",
            "missing",
        }
    ):
        raise InputError(f"{declared}: {told!r} must have a range or categories, and may have a list 'missing'")
    absent = told.get("missing")
    if absent is not None and not isinstance(absent, list):
        raise InputError(f"{declared}: missing is {absent!r}, but must be a list; [] if only empty fields are missing")
    if "range" in told:
        ends = told["range"]
        if not (isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)):
            raise InputError(f"{declared}: range is {ends!r}, but must be two numbers, the least and the greatest")
        if not ends[0] < ends[1]:
            raise InputError(f"{declared}: range is {ends!r}, but the first must be below the second")
        reader = _in_range
    else:
        categories = told["categories"]
        if not isinstance(categories, list) or len(categories) < 2:
            raise InputError(f"{declared}: categories is {categories!r}, but must be a list of two or more")
        reader = _one_of({str(value): [value] for value in categories}, declared)

    def read(cell: str, where: str) -> float | None:
        if cell.lower() in MISSING or any(_is(cell, value) for value in absent or ()):
            if absent is None:
                raise InputError(f"{where} is missing; fill it in, or add missing = [] to {declared}")
            return None
        return reader(cell, where)

    return read


def _in_range(cell: str, where: str) -> float:
    number = _number(cell)
    if number is None:
        raise InputError(f"{where} {cell!r} is not a number; write it as 1.5, or add it to the sheet's list 'missing'")
    return number


def _encoded(name: str, told: dict, values: list[float | None]) -> tuple[np.ndarray, list[str]]:
    """An input's numbers float64 (N, m), each row of norm 1 at most, and their names."""
    if "categories" in told:
        met = np.array([[value == number for number in range(len(told["categories"]))] for value in values], float)
        return met, [f"{name}={category}" for category in told["categories"]]
    low, high = told["range"]
    missing = np.array([value is None for value in values])
    numbers = np.array([low if value is None else value for value in values], dtype=float)
    scaled = np.where(missing, 0, np.clip(2 * (numbers - low) / (high - low) - 1, -1, 1))
    if "missing" not in told:
        return scaled[:, None], [name]
    return np.stack([scaled, missing], axis=1), [name, f"{name} missing"]


def _attribute(told: object, declared: str) -> Reader:
    """A reader of an attribute's cells: the name of a declared group of values, or of a band between declared ends."""
    if not isinstance(told, dict) or not (("values" in told) ^ ("bands" in told)):
        raise InputError(f"{declared}: {told!r} must have values, as in values = {{ female = [0] }}, or bands = [50]")
    if "values" in told:
        return _one_of(told["values"], declared, str)
    ends = told["bands"]
    if not ends or sorted(ends) != ends:
        raise InputError(f"{declared}: bands is {ends!r}, but must be a list of ascending numbers")
    names = [f"below {ends[0]}", *(f"{a} to below {b}" for a, b in zip(ends, ends[1:], strict=False)), f"{ends[-1]} up"]

    def read(cell: str, where: str) -> str:
        return names[int(np.searchsorted(ends, _in_range(cell, where), "right"))]

    return read
