"""The data sheet beside data of one's own: a TOML file that declares what is public of them."""

import tomllib
from pathlib import Path

from dopamine_lib.errors import InputError

#: What a data sheet may hold, with the type of each entry.
SHEET = {"source": str, "licence": str, "notes": list, "patients": int, "test": float, "target": str, "person": str}
SHEET |= {"site": str, "split": str, "classes": dict, "sites": dict, "inputs": dict, "attributes": dict}
#: The share of test patients where the sheet says nothing.
TEST = 0.2
#: Said of data with classes or hospitals that no sheet declares.
READ_OFF = "; classes or hospitals that no data sheet declares are read off the data, which makes them public"
_EXAMPLE = "dopamine_lib/data/heart_disease/heart.toml"
#: How an entry is written, by its type.
_WRITTEN = {str: "text in quotation marks", int: "a whole number", float: "a number with a point, as 0.2"}
_WRITTEN |= {list: "a list", dict: f"a table: [{{key}}] and lines below it, as in {_EXAMPLE}"}


def read_sheet(path: Path, needed: tuple[str, ...] = ()) -> dict:
    """The data sheet in a TOML file; an empty one where there is no file and nothing is ``needed``.

    Raises InputError for a file that is missing or damaged, and for an entry that is missing, unknown or wrong.
    """
    try:
        with open(path, "rb") as file:
            sheet = tomllib.load(file)
    except FileNotFoundError:
        if not needed:
            return {}
        raise InputError(f"{path}: no such file; a table needs a data sheet beside it, as {_EXAMPLE}") from None
    except (OSError, ValueError) as error:  # tomllib's errors are ValueErrors
        raise InputError(f"{path}: cannot be read as TOML ({error}); put it right") from None
    for key, value in sheet.items():
        if key not in SHEET:
            raise InputError(f"{path}: '{key}' is unknown; a data sheet has {', '.join(SHEET)}")
        if type(value) is not SHEET[key]:
            raise InputError(f"{path}: '{key}' is {value!r}, but must be {_WRITTEN[SHEET[key]].format(key=key)}")
    for key in needed:
        if not sheet.get(key):
            raise InputError(f"{path}: no '{key}'; a table's data sheet declares {', '.join(needed)}")
    if len(sheet.get("classes", "  ")) < 2:
        raise InputError(f"{path}: [classes] has one class; declare two or more, with the target's values of each")
    if not 0 < sheet.get("test", TEST) < 1:
        raise InputError(f"{path}: 'test' is {sheet['test']}, but must lie in (0, 1): the share of test patients")
    if sheet.get("patients", 1) < 1:
        raise InputError(f"{path}: 'patients' is {sheet['patients']}, but must be 1 or more: training patients")
    if not all(isinstance(note, str) for note in sheet.get("notes", [])):
        raise InputError(f"{path}: 'notes' is {sheet['notes']!r}, but must be a list of texts")
    for site, patients in sheet.get("sites", {}).items():
        if type(patients) is not int or patients < 1:
            raise InputError(f"{path}: [sites] has {site} = {patients!r}, but must have its number of patients")
    return sheet
