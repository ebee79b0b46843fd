"""A folder of labelled pictures, as people have it: with a table of labels, or with a subfolder for each class.

The table is ``labels.csv``, or whatever CSV file there has a column of images and one of labels: Kaggle's, EyePACS's,
Messidor's, IDRiD's and HAM10000's are read as they come. A folder of each part (``train``, ``test``), or a table of
each, is a split, and is obeyed. What is public of the data is declared in a data sheet beside the table
(``labels.toml``); classes and hospitals that it does not declare are read off the table, and the statement says so.
"""

import re
from pathlib import Path

import numpy as np

from dopamine_lib.data.cells import attribute, number_in, one_of, present
from dopamine_lib.data.csv_file import CsvFile, shown
from dopamine_lib.data.dataset import (
    GRADES,
    Dataset,
    Datasheet,
    content_checksum,
    own_number,
    split_or_obey,
)
from dopamine_lib.data.folder import BOTH_EYES, eye_of
from dopamine_lib.data.layouts import COLUMNS, Picture, below, of_classes, of_tables, read_tables
from dopamine_lib.data.picture_files import decode_files, persons_by_pixels
from dopamine_lib.data.sheet import READ_OFF, TEST, read_sheet
from dopamine_lib.errors import InputError

#: Columns of labels that hold the international grades of diabetic retinopathy, where all are 0 to 4.
GRADED = ("diagnosis", "level", "adjudicated_dr_grade")
UNKNOWN = "unknown"


def load_folder(folder: str | Path, *, size: int = 224, seed: int = 0) -> Dataset:
    """The pictures in a folder with labels, prepared as ``images.prepare`` does, uint8 (N, size, size, 3), and mapped.

    One person's are the images with the same entry in the column of persons; else both eyes, where names end in
    ``_left`` or ``_right``; else files with the same pixels. Raises InputError, naming file and line, for a table, a
    label or a picture that cannot be used.
    """
    folder = Path(folder)
    pictures, tables, others = below(folder)
    read = read_tables(folder, tables)
    sheet = read_sheet(read[0].path.with_suffix(".toml")) if read else {}
    found = of_tables(folder, read, pictures, sheet) if read else of_classes(folder, pictures, others)
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


def _labels(found: list[Picture], sheet: dict, tables: list[CsvFile]) -> tuple[tuple[str, ...], np.ndarray]:
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
                raise InputError(f"{one.where}: {column} {shown(one.label)} is not a grade; use an integer from 0 to 4")
        return GRADES, np.array([int(grade) for grade in said], dtype=np.int64)
    classes = sorted(set(said), key=(lambda label: (int(label), label)) if whole else _naturally)
    if len(classes) < 2:
        raise InputError(f"{found[0].where}: every label is {shown(classes[0])}; a classifier needs two classes")
    if len(classes) > 1000:
        raise InputError(f"{found[0].where}: {len(classes)} different labels; at most 1000 classes are trained")
    number = {label: i for i, label in enumerate(classes)}
    return tuple(classes), np.array([number[label] for label in said], dtype=np.int64)


def _naturally(name: str) -> list:
    """A key by which "2 mild" stands before "10 severe"."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]


def _persons(found: list[Picture], hashes: np.ndarray) -> tuple[np.ndarray, str]:
    """Who each picture is of, int64 (N,), and how that is known, in words."""
    if found[0].person is not None:
        return np.array(
            [own_number(one.person) for one in found]
        ), "images with the same person in the table are one patient's"
    eyes = [eye_of(one.file.stem) for one in found]
    if None not in eyes:
        return np.array([own_number(person) for person, _ in eyes]), BOTH_EYES
    return persons_by_pixels(hashes), "pixel-identical images are one patient's; nothing else is known of who is who"


def _attributes(found: list[Picture], sheet: dict) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
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
