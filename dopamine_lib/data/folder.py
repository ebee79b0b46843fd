"""A folder of graded photographs as people have it: a table of grades in some dialect, and pictures by their ids."""

import os
import re
from pathlib import Path

import numpy as np

from dopamine_lib.data.csv_file import CsvFile, shown, some
from dopamine_lib.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")
#: Names of the table, of the folder of pictures, and of the two columns: as Kaggle has APTOS 2019, then EyePACS.
TABLES, FOLDERS = ("train.csv", "trainLabels.csv"), ("train_images", "train")
IDS, GRADES = ("id_code", "image"), ("diagnosis", "level")
#: Who is one patient where ids name the eye, as EyePACS's do, and where they say nothing.
BOTH_EYES = "ids name the eye, so that both eyes are one patient's"
PIXELS = "pixel-identical images are one patient's; no patient numbers are published, so two eyes of one patient "
PIXELS += "count as two patients"
_GRADE = re.compile(r"([0-4])([.,]0*)?")  # pandas writes 2.0 beside an empty cell, and some countries 2,0


def find_table(folder: Path, get_it: str) -> Path:
    """The table in ``folder``, or in the only folder within it, as archives unpack.

    get_it  what to do where there is none, which raises InputError
    """
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the folder that it lies in")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {get_it}")
    inside = folder
    while True:
        entries = sorted(path for path in inside.iterdir() if not path.name.startswith((".", "__MACOSX")))
        found = {path.name.lower(): path for path in entries if path.is_file()}
        for name in TABLES:
            if name.lower() in found:
                return found[name.lower()]
        if not (len(entries) == 1 and entries[0].is_dir()):
            break
        inside = entries[0]
    if not entries:
        raise InputError(f"{folder}: the folder is empty; {get_it}")
    found = some(path.name for path in entries)
    raise InputError(f"{inside / TABLES[0]}: no such file, nor {TABLES[1]}; found {found}; {get_it}")


def read_table(table: Path, content: bytes) -> tuple[list[str], np.ndarray]:
    """The ids, without suffixes, and the grades, int64 (N,), of a table with commas, semicolons or tabs.

    Raises InputError, naming file and line, for columns that are missing, for a grade that is none, and for an id
    that is no file name or occurs twice.
    """
    file, grades = CsvFile.read(table, content), {}
    columns = [file.column(*names, remedy="name the columns as Kaggle does") for names in (IDS, GRADES)]
    id_column, grade_column = (file.header[column] for column in columns)
    for line, row in file.rows:
        where, (name, grade) = f"{table}, line {line}", (row[column] for column in columns)
        # a name of these characters cannot leave the image folder
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(
                f"{where}: {id_column} {shown(name)} is not a file name; use only letters, digits, '_', '-' and '.'"
            )
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name
        if stem in grades:
            raise InputError(f"{where}: {id_column} {shown(name)} occurs twice; keep one of the rows")
        if not _GRADE.fullmatch(grade):
            raise InputError(f"{where}: {grade_column} {shown(grade)} is not a grade; use an integer from 0 to 4")
        grades[stem] = int(grade[0])
    if not grades:
        raise InputError(f"{table}: no rows; a line for each picture has its {IDS[0]} and its {GRADES[0]}")
    return list(grades), np.array(list(grades.values()), dtype=np.int64)


def find_images(folder: Path, ids: list[str]) -> list[Path]:
    """The picture of each id, in ``folder``'s folder of pictures or below it. Raises InputError if one is missing."""
    here = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    if not here:
        found = some(sorted(path.name for path in folder.iterdir()))
        raise InputError(f"{folder / FOLDERS[0]}: no such folder, nor {FOLDERS[1]}; found {found}")
    present = {}
    for place, _, names in os.walk(here[0]):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if os.path.isfile(os.path.join(place, name)):  # no dangling link
                present.setdefault((stem, suffix.lower()), Path(place, name))
    files = []
    for name in ids:
        found = [present[name, suffix] for suffix in SUFFIXES if (name, suffix) in present]
        if not found:
            raise InputError(
                f"{here[0] / name}: no image with suffix {', '.join(SUFFIXES)} for this id of the table; the folder "
                f"has {some(sorted(path.name for path in present.values()))}; add the file or leave out the row"
            )
        files.append(found[0])
    return files


def eye_of(name: str) -> tuple[str, str] | None:
    """The person and the eye that an id of EyePACS names; None for another id.

    >>> eye_of("10_left"), eye_of("000c1434d8d7")
    (('10', 'left'), None)
    """
    person, _, eye = name.rpartition("_")
    return (person, eye.lower()) if person and eye.lower() in ("left", "right") else None
