"""How people lay out labelled pictures: where the rows of their tables, or their folders, say what each picture is."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dopamine_lib.data.cells import present
from dopamine_lib.data.csv_file import CsvFile, bare, shown, some
from dopamine_lib.data.dataset import PARTS
from dopamine_lib.data.folder import SUFFIXES
from dopamine_lib.errors import InputError

#: Pictures of a kind that is not read.
OTHERS = tuple(
    ".tif .tiff .bmp .gif .webp .jp2 .j2k .heic .heif .avif .jfif .jpe .ppm .pgm .tga .dcm .dicom .nii .nii.gz".split()
)
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


@dataclass(frozen=True)
class Picture:
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


def below(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures, CSV files and pictures of other kinds below a folder, but none that is hidden or added by macOS."""
    pictures, tables, others = [], [], []
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
            elif name.lower().endswith(OTHERS):
                others.append(path)
    if not pictures:
        remedy = f"convert {some(path.name for path in others)}" if others else "put them there"
        raise InputError(f"{folder}: no pictures with suffix {', '.join(SUFFIXES)} in it or below; {remedy}")
    return pictures, tables, others


def read_tables(folder: Path, tables: list[Path]) -> list[CsvFile]:
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


def of_tables(folder: Path, tables: list[CsvFile], pictures: list[Path], sheet: dict) -> list[Picture]:
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
            found.append(Picture(where, folder / file, cell("label"), cell("person"), cell("site"), said, others))
    return found


def _refuse_unused_persons(table: CsvFile, rest: Iterable[str], sheet: dict) -> None:
    """Several images of one person would count as several patients', and each be bounded alone, without a word."""
    attributes = sheet.get("attributes", {}).items()
    declared = {told.get("column", name) for name, told in attributes if isinstance(told, dict)}
    for name in rest:
        if name not in declared and any(person in bare(name) for person in PERSONS):
            at, quoted = table.path.with_suffix(".toml").name, json.dumps(name, ensure_ascii=False)
            raise InputError(
                f"{table.path}: column {shown(name)} may say who is who; if it does, write person = {quoted} in {at}; "
                "if not, rename it, or declare it there under [attributes]"
            )


def _picture(name: str, where: str, by_name: dict[str, list[Path]], part: str | None) -> Path:
    """The file that a cell names, from the folder: by its path, else by its name with or without suffix, anywhere."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where} {shown(name)} leads out of the folder; give a name in it")
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
            f"{where} {shown(name)}: no such picture with suffix {', '.join(SUFFIXES)} in the folder; add the file or "
            "leave out the row"
        )
    if len({file.parent for file in found}) > 1:
        which = f"{shown(name)} may be {found[0]} or {found[1]}"
        raise InputError(f"{where} {which}; give its path there, or move one away")
    return min(found, key=lambda file: SUFFIXES.index(file.suffix.lower()))


def _class_folders(folder: Path) -> bool:
    """Whether a folder has two subfolders or more."""
    return sum(path.is_dir() and not path.name.startswith((".", "__MACOSX")) for path in folder.iterdir()) > 1


def of_classes(folder: Path, pictures: list[Path], others: list[Path]) -> list[Picture]:
    """The pictures in subfolders that are called as their class, perhaps within one for each part."""
    read = {(path.parent, path.stem) for path in pictures}
    others = [path for path in others if (path.parent, path.stem) not in read]  # converted
    if others:  # where no table says which pictures count, each left out would be a patient less, without a word
        names = some(str(path.relative_to(folder)) for path in others)
        raise InputError(f"{folder}: {names}: not {', '.join(SUFFIXES)}; convert them, or move them away")
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
        found.append(Picture(str(path), path, parts[1] if split else parts[0], part=part))
    return found
