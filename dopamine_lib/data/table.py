"""Patients in a table: a CSV file, with a data sheet beside it that says what is public of its columns.

A range that is read off the patients tells of them, so every range, category and class is declared, in a TOML file of
the table's name; ``heart_disease/heart.toml`` is an example of all that it may hold. A row becomes numbers one input at
a time, each of norm 1 at most, and is then divided by the root of their number, so that its norm is at most 1:

range       scaled to [-1, 1] and clamped; with ``missing``, 0 where it is missing, and a flag beside it
categories  a number for each, 1 for the one that is met; all are 0 where it is missing
"""

import math
from pathlib import Path

import numpy as np

from dopamine_lib.data.cells import MISSING, Reader, attribute, holds, in_range, one_of, present
from dopamine_lib.data.csv_file import CsvFile
from dopamine_lib.data.dataset import Dataset, Datasheet, content_checksum, own_number, split_or_obey
from dopamine_lib.data.sheet import READ_OFF, TEST, read_sheet
from dopamine_lib.errors import InputError

#: Who is one patient where the sheet names no column of persons.
PERSONS = "rows that are alike are one patient's: the table has no column of persons"


def load_table(path: str | Path, *, name: str = "", seed: int = 0) -> Dataset:
    """The patients of a CSV file, by the data sheet beside it: ``patients.csv`` has its sheet in ``patients.toml``.

    ``images`` are the rows, float32 (N, p), and ``inputs`` names their p numbers. The sheet's column ``split`` is
    obeyed; without one a share ``test`` of the persons, drawn by a hash of each, are test patients.

    name  of the data set; by default the path
    Raises InputError, naming file and line, for an entry, a column or a value that is not as declared.
    """
    path = Path(path)
    at = path.with_suffix(".toml")
    sheet, table = read_sheet(at, needed=("target", "classes", "inputs")), CsvFile.read(path)
    if not table.rows:
        raise InputError(f"{path}: no rows; a line for each patient follows the names of the columns")

    def column(key: str, name: str) -> int:
        return table.column(name, remedy=f"{at.name} names it under '{key}'; name a column that is there")

    def read(key: str, name: str, reader: Reader) -> list:
        return [reader(cell, where) for where, cell in table.cells(column(key, name))]

    grades = tuple(sheet["classes"])
    labels = read("target", sheet["target"], one_of(sheet["classes"], f"{at.name}, [classes]"))
    if "person" in sheet:
        who = read("person", sheet["person"], present)
    else:
        who = ["\0".join(row) for _, row in table.rows]
    person = np.array([own_number(one) for one in who])
    parts = None if "split" not in sheet else list(table.cells(column("split", sheet["split"])))
    train, validation, test = split_or_obey(person, parts, test_fraction=sheet.get("test", TEST), seed=seed)
    images, inputs = encoded_rows(table, sheet["inputs"], at.name)
    attributes, proportions, sites = {}, {}, ()
    for own, told in sheet.get("attributes", {}).items():
        reader = attribute(told, f"{at.name}, [attributes], {own}")
        attributes[own] = np.array(read("attributes", told.get("column", own), reader))
    if "site" in sheet:
        sites = sheet.get("sites")
        reader = present if sites is None else one_of({site: [site] for site in sites}, f"{at.name}, [sites]", str)
        attributes["site"] = np.array(read("site", sheet["site"], reader))
        proportions = {} if sites is None else {"site": sites}
        sites = tuple(sites or sorted(set(attributes["site"].tolist())))
    labels = np.array(labels, dtype=np.int64)
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
                *sheet.get("notes", ()),
                f"{len(sheet['inputs'])} inputs in {images.shape[1]} columns: all declared in {at.name}",
            ),
            patients=sheet.get("patients"),
            proportions=proportions,
            persons=(f"rows with the same {sheet['person']} are one patient's" if "person" in sheet else PERSONS)
            + (READ_OFF if sites and not proportions else ""),
            sites=sites,
        ),
        attributes=attributes,
        inputs=inputs,
        declared=sheet["inputs"],
    )


def encoded_rows(table: CsvFile, inputs: dict, declared: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A table's rows as numbers, float32 (N, p) of norm 1 at most, and the names of the p columns.

    inputs    what is declared of each, by name: the [inputs] of a data sheet
    declared  what declares them, in messages
    Raises InputError, naming file and line, for a column or a value that is not as declared.
    """
    remedy = f"{declared} names it under 'inputs'; name a column that is there"
    blocks, names = [], []
    for name, told in inputs.items():
        reader, number = _input(told, f"{declared}, [inputs], {name}"), table.column(name, remedy=remedy)
        block, columns = _encoded(name, told, [reader(cell, where) for where, cell in table.cells(number)])
        blocks.append(block)
        names += columns
    return (np.concatenate(blocks, axis=1) / math.sqrt(len(blocks))).astype(np.float32), tuple(names)


def _input(told: object, declared: str) -> Reader:
    """A reader of an input's cells: a number for a range, a category's number, or None where it is missing."""
    if (
        not isinstance(told, dict)
        or not (("range" in told) ^ ("categories" in told))
        or told.keys() - {"range", "categories", "missing"}
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
        reader = in_range
    else:
        categories = told["categories"]
        if not isinstance(categories, list) or len(categories) < 2:
            raise InputError(f"{declared}: categories is {categories!r}, but must be a list of two or more")
        reader = one_of({str(value): [value] for value in categories}, declared)

    def read(cell: str, where: str) -> float | None:
        if cell.lower() in MISSING or any(holds(cell, value) for value in absent or ()):
            if absent is None:
                raise InputError(f"{where} is missing; fill it in, or add missing = [] to {declared}")
            return None
        return reader(cell, where)

    return read


def _encoded(name: str, told: dict, values: list[float | None]) -> tuple[np.ndarray, list[str]]:
    """An input's numbers float64 (N, m), each row of norm 1 at most, and their names."""
    if "categories" in told:
        categories = told["categories"]
        met = [[value == number for number in range(len(categories))] for value in values]
        return np.array(met, float).reshape(-1, len(categories)), [f"{name}={category}" for category in categories]
    low, high = told["range"]
    missing = np.array([value is None for value in values])
    numbers = np.array([low if value is None else value for value in values], dtype=float)
    scaled = np.where(missing, 0, np.clip(2 * (numbers - low) / (high - low) - 1, -1, 1))
    if "missing" not in told:
        return scaled[:, None], [name]
    return np.stack([scaled, missing], axis=1), [name, f"{name} missing"]
