"""Chapters ask before they show, and their pictures are described in the notebooks themselves."""

import re

import nbformat
import pytest
from readme import NOTEBOOKS

CHAPTERS = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]


def code(path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def unanswered(cells) -> list[str]:
    """Predictions that no later cell, or a cell that comes too early, compares with a result."""
    asked = {m[1]: i for i, cell in enumerate(cells) for m in re.finditer(r"^(\w+) = Prediction\(", cell.source, re.M)}
    told = {m[1]: i for i, cell in enumerate(cells) for m in re.finditer(r"\b(\w+)\.compare\(", cell.source)}
    return [name for name, i in asked.items() if told.get(name, -1) <= i]


@pytest.mark.parametrize("path", CHAPTERS[1:], ids=lambda path: path.stem)
def test_a_chapter_asks_before_it_shows(path):
    cells = code(path)
    questions = [cell for cell in cells if "= Prediction(" in cell.source]
    assert 2 <= len(questions) <= 3 and not unanswered(cells)
    for cell in questions:  # the question is read, its code is folded; and it is a text where there are no widgets
        assert "hide-input" in cell.metadata.tags and "text/markdown" in cell.outputs[0].data
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert said.count("No prediction was made. It is ") == len(questions), "stored as run without anybody who chooses"


def test_a_question_that_is_not_answered_is_found():
    cell = nbformat.v4.new_code_cell
    ask, answer = cell("guess = Prediction('How?', {'so': 1, 'not': 2})\nguess"), cell("print(guess.compare(1))")
    assert unanswered([answer, ask]) == unanswered([ask]) == ["guess"] and not unanswered([ask, answer])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_picture_has_an_alternative_text_in_the_notebook(path):
    for cell in code(path):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("image/png", {}).get("alt", "")
                assert len(alt) > 15, f"{cell.source[-80:]!r}: %load_ext dopamine_lib.pictures, or as_image"
