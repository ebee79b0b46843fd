"""A folder of labelled pictures, as people have it: with a table of labels, or with a subfolder for each class.

The table is ``labels.csv``, or whatever CSV file there has a column of images and one of labels: Kaggle's, EyePACS's,
Messidor's, IDRiD's and HAM10000's are read as they come. A folder of each part (``train``, ``test``), or a table of
each, is a split, and is obeyed. What is public of the data is declared in a data sheet beside the table
(``labels.toml``); classes and hospitals that it does not declare are read off the table, and the statement says so.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from dopamine_lib.data.cells import attribute, number_in, one_of, present
from dopamine_lib.data.csv_file import CsvFile, bare, some
from dopamine_lib.data.dataset import (
    GRADES,
    PARTS,
    Dataset,
    Datasheet,
    content_checksum,
    own_number,
    split_or_obey,
)
from dopamine_lib.data.folder import BOTH_EYES, SUFFIXES, eye_of
from dopamine_lib.data.picture_files import decode_files, persons_by_pixels
from dopamine_lib.data.sheet import READ_OFF, TEST, read_sheet
from dopamine_lib.errors import InputError

#: What people are called in tables: a column that is called so may say who is who.
PERSONS = ("person", "patient", "subject", "participant")
#: Names of columns in the field's tables, as ``CsvFile.find`` takes them; the first of each is this kit's.
COLUMNS = {
    "image": ("image", "image_id", "id_code", "image name", "filename", "file"),
    "label": ("label", "diagnosis", "level", "dx", "adjudicated_dr_grade", "retinopathy grade", "class", "grade"),
    # a lesion only where nothing else is said of who is one patient
    "person": (*PERSONS, *(f"{one} {what}" for what in ("id", "number", "no", "name") for one in PERSONS), "lesion id"),
    "site": ("site", "hospital", "centre", "center", "ophthalmologic department", "dataset"),
    "split": ("split",),
}
#: Columns of labels that hold the international grades of diabetic retinopathy, where all are 0 to 4.
GRADED = ("diagnosis", "level", "adjudicated_dr_grade")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class _Picture:
    """A row of a table, or a file in a class's folder.

    where  its place, for a message;  part  where it says so, what it says of its part, and its place
    """

    where: str
    file: Path
    label: str
    person: str | None = None
    site: str | None = None
    part: tuple[str, str] | None = None
    rest: dict[str, str] = field(default_factory=dict)


def load_folder(folder: str | Path, *, size: int = 224, seed: int = 0) -> Dataset:
    """The pictures in a folder with labels, prepared as ``images.prepare`` does, uint8 (N, size, size, 3), and mapped.

    One person's are the images with the same entry in the column of persons; else both eyes, where names end in
    ``_left`` or ``_right``; else files with the same pixels. Raises InputError, naming file and line, for a table, a
    label or a picture that cannot be used.
    """
    folder = Path(folder)
    pictures, tables = _below(folder)
    read = _read_tables(folder, tables)
    sheet = read_sheet(read[0].path.with_suffix(".toml")) if read else {}
    found = _of_tables(folder, read, pictures, sheet) if read else _of_classes(folder, pictures)
    classes, labels = _labels(found, sheet, read)
    images, hashes = decode_files([one.file for one in found], size, repr([one.where for one in found]).encode())
    person, persons = _persons(found, hashes)
    parts = [one.part for one in found] if all(one.part for one in found) else None
    by_pixels = found[0].person is None
    train, validation, test = split_or_obey(
        person, parts, test_fraction=sheet.get("test", TEST), seed=seed, last=by_pixels
    )
    attributes, sites = _attributes(found, sheet)
    declared = sheet.get("sites")
    undeclared = "classes" not in sheet and classes != GRADES or bool(sites) and not declared
    return Dataset(
        name=str(folder),
        images=images,
        labels=labels,
        grades=classes,
        person=person,
        train=train,
        validation=validation,
        test=test,
        sheet=Datasheet(
            source=sheet.get("source", folder.name),
            licence=sheet.get("licence", "none stated"),
            checksum=content_checksum(images, labels, test),
            notes=(
                *sheet.get("notes", ()),
                f"resized and cropped to {size}x{size} pixels; files of exactly that size are left as they are",
                "split by a hash of each person" if parts is None else "split as the data say",
            ),
            patients=sheet.get("patients"),
            proportions={"site": declared} if declared else {},
            persons=persons + (READ_OFF if undeclared else ""),
            sites=sites,
        ),
        attributes=attributes,
    )


def _below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All pictures and CSV files below a folder, without hidden ones and those that macOS adds to archives."""
    pictures, tables = [], []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or not path.is_file():  # "._eye.png" is no picture, and a link may lead nowhere
                continue
            if path.suffix.lower() in SUFFIXES:
                pictures.append(path)
            elif path.suffix.lower() == ".csv":
                tables.append(path)
    if not pictures:
        raise InputError(f"{folder}: no pictures with suffix {', '.join(SUFFIXES)} in it or below; put them there")
    return pictures, tables


def _read_tables(folder: Path, tables: list[Path]) -> list[CsvFile]:
    """``labels.csv``, or each table that has images and labels: one, or one for each part."""
    own = [path for path in tables if path.name.lower() == "labels.csv"]
    if own:
        return [CsvFile.read(own[0])]
    read = [CsvFile.read(path) for path in tables if "submission" not in path.name.lower()]
    fitting = [one for one in read if all(one.find(*COLUMNS[key]) is not None for key in ("image", "label"))]
    if len(fitting) > 1 and (None in (parts := list(map(_part_in, fitting))) or len(set(parts)) < len(parts)):
        raise InputError(f"{folder}: several tables of labels, {some(str(one.path) for one in fitting)}; keep one, or "
                         "call it labels.csv")  # fmt: skip
    if not fitting and read and not _class_folders(folder):
        header = some(read[0].header)
        raise InputError(f"{read[0].path}: no columns of images and labels; found {header}; name them image and label")
    return fitting


def _part_in(table: CsvFile) -> str | None:
    """The part that a table's name says it is of."""
    return next((part for part, words in PARTS.items() if _names(table.path.stem, words)), None)


def _names(text: str, words: Iterable[str]) -> bool:
    """Whether one of the words is a word of a name, such as "b. IDRiD_Disease Grading_Testing Labels".

    >>> _names("a. Training Set", ("train", "training")), _names("constrain", ("train",))
    (True, False)
    """
    return bool(set(re.split(r"[^a-z]+", text.lower())) & set(words))


def _of_tables(folder: Path, tables: list[CsvFile], pictures: list[Path], sheet: dict) -> list[_Picture]:
    """The rows of one table, or of one for each part, with their pictures."""
    by_name: dict[str, list[Path]] = {}
    for path in pictures:
        for name in (path.name.lower(), path.stem.lower()):
            by_name.setdefault(name, []).append(path.relative_to(folder))
    found, lines, known = [], {}, None
    for table in tables:
        if not table.rows:
            raise InputError(f"{table.path}: no rows; a line for each picture has its image and its label")
        named = {"label": sheet.get("target")} | {key: sheet.get(key) for key in ("person", "site", "split")}
        column = {}
        for key, names in COLUMNS.items():
            if named.get(key):
                told = f"its data sheet names it as {'target' if key == 'label' else key}"
                column[key] = table.column(named[key], remedy=f"{told}; name a column that is there")
            elif key in ("image", "label"):
                column[key] = table.column(*names, remedy="name them image and label")
            else:
                column[key] = table.find(*names)
        part = _part_in(table) if len(tables) > 1 else None
        here = {key for key in ("person", "site") if column[key] is not None}
        if known not in (None, here):
            raise InputError(f"{table.path}: persons or sites are in some tables only; have a column in all or none")
        known = here
        rest = {i: name for i, name in enumerate(table.header) if name and i not in column.values()}
        if column["person"] is None:
            _refuse_unused_persons(table, rest.values(), sheet)
        for line, row in table.rows:
            where = f"{table.path}, line {line}"

            def cell(key: str, row=row, where=where, table=table, column=column) -> str | None:
                number = column[key]
                return None if number is None else present(row[number], f"{where}: {table.header[number]}")

            image = table.header[column["image"]]
            file = _picture(cell("image"), f"{where}: {image}", by_name, part)
            if file in lines:
                raise InputError(f"{where}: {file.name} is in {lines[file]} as well; keep one of the rows")
            lines[file] = f"line {line}"
            said = cell("split")
            if said is not None:
                said = (f"{where}: {table.header[column['split']]}", said)
            elif part is not None:
                said = (where, part)
            others = {name: row[i] for i, name in rest.items()}
            found.append(_Picture(where, folder / file, cell("label"), cell("person"), cell("site"), said, others))
    return found


def _refuse_unused_persons(table: CsvFile, rest: Iterable[str], sheet: dict) -> None:
    """Several images of one person would count as several patients', and each be bounded alone, without a word."""
    attributes = sheet.get("attributes", {}).items()
    declared = {told.get("column", name) for name, told in attributes if isinstance(told, dict)}
    for name in rest:
        if name not in declared and any(person in bare(name) for person in PERSONS):
            at, quoted = table.path.with_suffix(".toml").name, json.dumps(name, ensure_ascii=False)
            raise InputError(
                f"{table.path}: column {name!r} may say who is who; if it does, write person = {quoted} in {at}; if "
                "not, rename it, or declare it there under [attributes]"
            )


def _picture(name: str, where: str, by_name: dict[str, list[Path]], part: str | None) -> Path:
    """The file that a cell names, from the folder: by its path, else by its name with or without suffix, anywhere."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where} {name!r} leads out of the folder; give a name in it")
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    # the file of that name; else one with another suffix, as where pictures were converted
    found = by_name.get(path.name.lower()) or by_name.get(stem.lower()) or []
    if len(found) > 1 and len(path.parts) > 1:
        ends = tuple(part.lower() for part in path.parts[:-1])
        found = [file for file in found if tuple(p.lower() for p in file.parent.parts[-len(ends) :]) == ends] or found
    if len(found) > 1 and part is not None:  # IDRiD numbers the pictures of each part from 1
        found = [file for file in found if _names(str(file.parent), PARTS[part])]
    if not found:
        raise InputError(
            f"{where} {name!r}: no such picture with suffix {', '.join(SUFFIXES)} in the folder; add the file or leave "
            "out the row"
        )
    if len({file.parent for file in found}) > 1:
        raise InputError(f"{where} {name!r} may be {found[0]} or {found[1]}; give its path there, or move one away")
    return min(found, key=lambda file: SUFFIXES.index(file.suffix.lower()))


def _class_folders(folder: Path) -> bool:
    """Whether a folder has two subfolders or more."""
    return sum(path.is_dir() and not path.name.startswith((".", "__MACOSX")) for path in folder.iterdir()) > 1


def _of_classes(folder: Path, pictures: list[Path]) -> list[_Picture]:
    """The pictures in subfolders that are called as their class, perhaps within one for each part."""
    top = Path(os.path.commonpath([path.parent for path in pictures]))
    inside = [path.relative_to(top).parts for path in pictures]
    words = {word: part for part, words in PARTS.items() for word in words}
    split = all(len(parts) > 2 and parts[0].lower() in words for parts in inside)
    found = []
    for path, parts in zip(pictures, inside, strict=True):
        if len(parts) < 2:
            raise InputError(
                f"{path}: in no class's folder, and {folder} has no table of labels; add labels.csv with columns image "
                "and label, or a subfolder for each class"
            )
        part = (str(path), parts[0].lower()) if split else None
        found.append(_Picture(str(path), path, parts[1] if split else parts[0], part=part))
    return found


def _labels(found: list[_Picture], sheet: dict, tables: list[CsvFile]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes, and each picture's number among them, int64 (N,)."""
    if "classes" in sheet:
        reader = one_of(sheet["classes"], "its data sheet, [classes]")
        labels = [reader(one.label, f"{one.where}: label") for one in found]
        return tuple(sheet["classes"]), np.array(labels, dtype=np.int64)
    numbers = [number_in(one.label.replace(",", ".")) for one in found]
    whole = all(number is not None and number == int(number) for number in numbers)
    said = [str(int(number)) for number in numbers] if whole else [one.label for one in found]
    column = tables[0].header[tables[0].find(*COLUMNS["label"])].lower() if tables and "target" not in sheet else ""
    if column in GRADED and whole:
        for one, grade in zip(found, said, strict=True):
            if grade not in "01234":
                raise InputError(f"{one.where}: {column} {one.label!r} is not a grade; use an integer from 0 to 4")
        return GRADES, np.array([int(grade) for grade in said], dtype=np.int64)
    classes = sorted(set(said), key=(lambda label: (int(label), label)) if whole else _naturally)
    if len(classes) < 2:
        raise InputError(f"{found[0].where}: every label is {classes[0]!r}; a classifier needs two classes or more")
    if len(classes) > 1000:
        raise InputError(f"{found[0].where}: {len(classes)} different labels; at most 1000 classes are trained")
    number = {label: i for i, label in enumerate(classes)}
    return tuple(classes), np.array([number[label] for label in said], dtype=np.int64)


def _naturally(name: str) -> list:
    """A key by which "2 mild" stands before "10 severe"."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]


def _persons(found: list[_Picture], hashes: np.ndarray) -> tuple[np.ndarray, str]:
    """Who each picture is of, int64 (N,), and how that is known, in words."""
    if found[0].person is not None:
        return np.array(
            [own_number(one.person) for one in found]
        ), "images with the same person in the table are one patient's"
    eyes = [eye_of(one.file.stem) for one in found]
    if None not in eyes:
        return np.array([own_number(person) for person, _ in eyes]), BOTH_EYES
    return persons_by_pixels(hashes), "pixel-identical images are one patient's; nothing else is known of who is who"


def _attributes(found: list[_Picture], sheet: dict) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """What else the table says of each picture, str (N,) by name, and the hospitals that it names."""
    attributes, sites = {}, ()
    declared = sheet.get("attributes")
    for name, told in declared.items() if declared else ((name, None) for name in found[0].rest):
        reader = None if told is None else attribute(told, f"its data sheet, [attributes], {name}")
        column = name if told is None else told.get("column", name)
        if column not in found[0].rest:
            raise InputError(f"{found[0].where}: no column {column}, which its data sheet names under 'attributes'")
        cells = [(one.rest.get(column, ""), f"{one.where}: {column}") for one in found]
        attributes[name] = np.array([reader(cell, where) if reader else cell or UNKNOWN for cell, where in cells])
    if found[0].site is not None:
        of = sheet.get("sites")
        reader = present if of is None else one_of({site: [site] for site in of}, "its data sheet, [sites]", str)
        attributes["site"] = np.array([reader(one.site, f"{one.where}: site") for one in found])
        sites = tuple(of or sorted(set(attributes["site"].tolist())))
    return attributes, sites
