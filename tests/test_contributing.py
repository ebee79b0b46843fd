"""CONTRIBUTING names files, lists and functions that are there, and draws the floors that the imports give."""

import re

from readme import CONTRIBUTING, REPOSITORY
from test_structure import IMPORTS, floors, rooms

TEXT = CONTRIBUTING.read_text(encoding="utf-8")
NAME = r"(?!\w+\.py`)[A-Za-z_]+(?:\.[a-z_]+)?"


def test_every_file_is_there():
    named = re.findall(r"`((?:dopamine_lib|tests|notebooks|\.ci)/[\w./]*|[\w.]+\.(?:py|txt))`", TEXT)
    lowest = {f"{room}.py" for room in rooms(IMPORTS)}  # a room of the table, without its folder
    assert len(named) > 20
    missing = [name for name in named if name not in lowest and "NN_" not in name and not (REPOSITORY / name).exists()]
    assert not missing


def test_every_list_is_in_its_file():
    """Names in a row about something new are defined in one of the files that the row names."""
    rows = re.findall(r"^\| [a-z ]+ \| .*\.py`.*$", TEXT, re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        files = [REPOSITORY / path for path in re.findall(r"`([\w/]+\.(?:py))`", row)]
        folders = [REPOSITORY / path for path in re.findall(r"`(dopamine_lib/[\w/]+/)`", row)]
        texts = [path.read_text(encoding="utf-8") for path in files]
        texts += [path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.py")]
        for name in re.findall(rf"`({NAME})`", row):
            last = name.rpartition(".")[2]
            defined = re.compile(rf"^\s*(?:class |def )?{last}\b(?:\(|:| =)", re.MULTILINE)
            assert any(defined.search(text) for text in texts), f"{name}, in: {row}"


def test_the_floors_are_those_of_the_imports():
    told = {}
    for floor, names in re.findall(r"^\| (\d) \| (`.+?`) \|", TEXT, re.MULTILINE):
        told |= {name.strip("/").removesuffix(".py"): int(floor) for name in re.findall(r"`([\w./]+)`", names)}
    assert told == floors(rooms(IMPORTS))
