"""The design's "A notebook", as rules: every notebook is read and held to them, and each rule rejects a broken one.

Whether a notebook runs is nbval's business. Here is what a reader meets: its shape, its words, and what is stored.
"""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
HOMEWORK = sorted((NOTEBOOKS / "homework" / "source").glob("*.ipynb"))
OPENING = ("What you will learn.", "What you need.", "Time and memory on 2 cores.")
#: A path that exists on one machine only: Unix homes and work folders, a Windows drive.
ABSOLUTE = re.compile(r"(?<![\w.])(?:/(?:home|tmp|work|root|Users)/|[A-Z]:\\+\w)")
MOST_BYTES = 1_000_000


def headings(notebook) -> list[tuple[int, str]]:
    """Level and text of every heading, without what stands in fenced code."""
    found = []
    for cell in markdown(notebook):
        text = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
        found += [(len(marks), words) for marks, words in re.findall(r"^(#{1,6}) (.+)$", text, re.MULTILINE)]
    return found


def markdown(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cell) -> list[str]:
    """The kinds of image among a cell's outputs."""
    return [kind for output in cell.get("outputs", []) for kind in output.get("data", {}) if kind.startswith("image/")]


def one_title(notebook, path):
    levels = [level for level, _ in headings(notebook)]
    assert levels.count(1) == 1 and levels[0] == 1, "one H1, and first"


def no_skipped_level(notebook, path):
    levels = [level for level, _ in headings(notebook)]
    for before, after in zip(levels, levels[1:], strict=False):
        assert after <= before + 1, f"a heading of level {after} follows one of level {before}"


def opening_block(notebook, path):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# "), "the first cell is the title"
    at = [first.source.find(f"**{name}**") for name in OPENING]
    assert min(at) > 0 and at == sorted(at), f"the first cell says, in this order: {', '.join(OPENING)}"
    for name in OPENING:
        assert re.search(rf"^\*\*{re.escape(name)}\*\* \S", first.source, re.MULTILINE), f"{name} says something"


def text_for_every_figure(notebook, path):
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if images(cell):
            said = (
                after is not None
                and after.cell_type == "markdown"
                and re.match(r"\*[^*\s].{20,}?\*", after.source, re.S)
            )
            assert said, f"a figure is not followed by an italic text that says what it shows: {cell.source[-80:]!r}"


def outputs_stored(notebook, path):
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "executed once, from top to bottom, and stored"
    assert any(cell.outputs for cell in code(notebook)), "there are outputs"


def no_errors(notebook, path):
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", f"an error is stored: {output.get('evalue')}"
            assert output.get("name") != "stderr", f"a warning is stored: {output.get('text', '')[:200]}"


def small(notebook, path):
    size = len(json.dumps(notebook))
    assert size < MOST_BYTES, f"{size} bytes"


def no_absolute_path(notebook, path):
    for cell in notebook.cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), *output.get("traceback", [])]
            data = output.get("data", {})
            texts += [value for kind, value in data.items() if isinstance(value, str) and kind.startswith("text/")]
        for text in texts:
            found = ABSOLUTE.search(text)
            assert not found, f"a path of one machine: {text[found.start() : found.start() + 60]!r}"


def clean_metadata(notebook, path):
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}, f"metadata {sorted(notebook.metadata)}"
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.language_info) == {"name"}, "language_info is the name alone"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"nbgrader", "tags", "jupyter"}, f"cell metadata {sorted(cell.metadata)}"


def set_up_folded(notebook, path):
    if path in HOMEWORK:  # a student's cells are graded by their metadata
        return
    for cell in code(notebook)[:2]:
        if re.match(r"# Google Colab|%matplotlib|import |from ", cell.source):
            folded = cell.metadata.get("jupyter", {}).get("source_hidden") is True  # in JupyterLab
            assert folded and {"hide-input", "remove-cell"} & set(cell.metadata.tags), "imports before the first idea"


def compared_cells_are_text(notebook, path):
    for cell in code(notebook):
        assert "NBVAL_CHECK_OUTPUT" not in cell.source or not images(cell), "a picture is compared bit for bit"


def references(notebook, path):
    assert headings(notebook)[-1] == (2, "References"), "the last section is References"
    assert re.search(r"^## References\s+[-*] \S", markdown(notebook)[-1].source, re.MULTILINE), "and names some"


def one_epsilon(notebook, path):
    assert not any(r"\epsilon" in cell.source for cell in notebook.cells), r"one glyph in all chapters, \varepsilon"


def checks_itself(notebook, path):
    plain = [cell.source for cell in code(notebook) if "BEGIN SOLUTION" not in cell.source]
    assert any(re.search(r"^\s*assert ", source, re.MULTILINE) for source in plain), "a self-check asserts"


def has_an_exercise(notebook, path):
    pattern = r"^\s*### BEGIN SOLUTION\n.+?^\s*### END SOLUTION"
    assert any(re.search(pattern, cell.source, re.MULTILINE | re.DOTALL) for cell in code(notebook)), "an exercise"
    for cell in code(notebook):
        assert cell.source.count("### BEGIN SOLUTION") == cell.source.count("### END SOLUTION"), "markers in pairs"


def take_away_and_three_questions(notebook, path):
    if path in HOMEWORK or path in CHAPTERS[:1]:  # what asks for answers itself, and the map
        return
    last = [cell.source for cell in markdown(notebook) if cell.source.startswith("## What to take away\n")]
    assert len(last) == 1 and len(re.findall(r"^- \S", last[0], re.MULTILINE)) >= 3, "three things to take away"
    _, *questions = re.split(r"^\*\*Question \d\.\*\* ", last[0], flags=re.MULTILINE)
    assert len(questions) >= 3, "three questions"
    for question in questions:  # each answer folded, with what is right or wrong about it; no site typesets its summary
        assert question.count("<details>") == question.count("</details>") >= 3, "three answers to choose from"
        told = re.findall(r"<summary>[A-D]\. [^\n$]+</summary>\n\n([^\n]{10,})\n\n</details>", question)
        assert len(told) == question.count("<details>"), "every answer is commented on"


RULES = (
    one_title,
    no_skipped_level,
    opening_block,
    text_for_every_figure,
    outputs_stored,
    no_errors,
    small,
    no_absolute_path,
    clean_metadata,
    set_up_folded,
    compared_cells_are_text,
    references,
    one_epsilon,
    checks_itself,
    has_an_exercise,
    take_away_and_three_questions,
)


def name(value) -> str:
    return value.stem if isinstance(value, Path) else value.__name__


@pytest.mark.parametrize("rule", RULES, ids=name)
@pytest.mark.parametrize("path", CHAPTERS + HOMEWORK, ids=name)
def test_notebook(path, rule):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    rule(notebook, path)


def test_there_are_notebooks_to_read():
    assert CHAPTERS and HOMEWORK
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) for path in CHAPTERS)
    chapters = {path.stem for path in CHAPTERS}
    assert all(path.stem.removesuffix("_homework") in chapters for path in HOMEWORK), "homework belongs to a chapter"


def good():
    """A small notebook that keeps every rule."""
    v4 = nbformat.v4
    opening = "\n\n".join(["# A chapter", *(f"**{block}** This and that." for block in OPENING)])
    figure = v4.new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    printed = v4.new_output("stream", name="stdout", text="0.125\n")
    cells = [
        v4.new_markdown_cell(opening),
        v4.new_code_cell("draw()", execution_count=1, outputs=[figure]),
        v4.new_markdown_cell("*A curve that falls from left to right.*\n\n## Claim\n\n### Look"),
        v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1 / 8)\nassert 1 < 2", execution_count=2, outputs=[printed]),
        v4.new_code_cell("### BEGIN SOLUTION\nx = 1\n### END SOLUTION\nassert x == 1", execution_count=3),
        v4.new_markdown_cell("## References\n\n- The paper, Eq. 1."),
    ]
    answer = "<details>\n<summary>{}. One</summary>\n\nNo, since it is two.\n\n</details>\n"
    questions = [f"**Question {n}.** How many?\n\n" + "".join(map(answer.format, "ABC")) for n in (1, 2, 3)]
    away = "## What to take away\n\n- One.\n- Two.\n- Three.\n\n### Three questions\n\n" + "\n".join(questions)
    cells.insert(5, v4.new_markdown_cell(away))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    return v4.new_notebook(cells=cells, metadata=metadata)


def replace(at, old, new):
    def fault(notebook):
        assert old in notebook.cells[at].source
        notebook.cells[at].source = notebook.cells[at].source.replace(old, new)

    return fault


def add_output(at, kind, **content):
    return lambda notebook: notebook.cells[at].outputs.append(nbformat.v4.new_output(kind, **content))


def put(at, key, value):
    return lambda notebook: notebook.cells[at].update({key: value})


FAULTS = [
    (one_title, replace(2, "## Claim", "# Claim")),
    (one_title, replace(0, "# A chapter", "## A chapter")),
    (no_skipped_level, replace(2, "### Look", "#### Look")),
    (no_skipped_level, replace(2, "## Claim", "### Claim")),
    (opening_block, replace(0, "**What you need.**", "What you need.")),
    (opening_block, replace(0, "**Time and memory on 2 cores.** This and that.", "**Time and memory on 2 cores.**")),
    (opening_block, lambda notebook: notebook.cells.insert(0, nbformat.v4.new_code_cell("import time"))),
    (text_for_every_figure, replace(2, "*A curve that falls from left to right.*\n\n", "")),
    (text_for_every_figure, replace(2, "*A curve that falls from left to right.*", "**Figure 1.**")),
    (text_for_every_figure, replace(2, "*A curve that falls from left to right.*", "*A curve.*")),
    (text_for_every_figure, lambda notebook: notebook.cells.insert(2, nbformat.v4.new_code_cell("y = 2"))),
    (text_for_every_figure, lambda notebook: notebook.cells.append(notebook.cells[1])),
    (outputs_stored, put(3, "execution_count", None)),
    (outputs_stored, put(3, "execution_count", 7)),
    (outputs_stored, lambda notebook: [cell.update(outputs=[]) for cell in code(notebook)]),
    (no_errors, add_output(3, "error", ename="ValueError", evalue="no", traceback=["ValueError: no"])),
    (no_errors, add_output(3, "stream", name="stderr", text="UserWarning: look")),
    (small, add_output(3, "stream", name="stdout", text="x" * MOST_BYTES)),
    (no_absolute_path, replace(3, "print(1 / 8)", "open('/home/me/data.csv')")),
    (no_absolute_path, replace(3, "print(1 / 8)", r"open('C:\\data\\x.csv')")),
    (no_absolute_path, replace(2, "## Claim", "See /" + "root/kit.\n\n## Claim")),
    (no_absolute_path, add_output(3, "stream", name="stdout", text="saved to /tmp/run1/model.pt")),
    (no_absolute_path, add_output(1, "display_data", data={"text/html": "<a href='/" + "work/main'>x</a>"})),
    (clean_metadata, lambda notebook: notebook.metadata.update(widgets={"state": {}})),
    (clean_metadata, lambda notebook: notebook.metadata.kernelspec.update(name="my-venv")),
    (clean_metadata, lambda notebook: notebook.metadata.language_info.update(version="3.11.7")),
    (clean_metadata, put(3, "metadata", nbformat.from_dict({"execution": {"iopub.status.busy": "now"}}))),
    (set_up_folded, replace(1, "draw()", "import math")),
    (compared_cells_are_text, add_output(3, "display_data", data={"image/png": "iVBORw0KGgo="})),
    (references, replace(6, "## References", "## Further reading")),
    (references, replace(6, "- The paper, Eq. 1.", "")),
    (one_epsilon, replace(2, "## Claim", r"## Claim for $\epsilon$")),
    (checks_itself, replace(3, "assert 1 < 2", "print(1 < 2)")),
    (has_an_exercise, replace(4, "### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "x = 1")),
    (has_an_exercise, replace(4, "### END SOLUTION\n", "")),
    (take_away_and_three_questions, replace(5, "## What to take away", "## Summary")),
    (take_away_and_three_questions, replace(5, "- Three.\n", "")),
    (take_away_and_three_questions, replace(5, "**Question 3.**", "And:")),
    (take_away_and_three_questions, replace(5, "<summary>B. One</summary>\n\nNo, since it is two.", "B. One")),
    (take_away_and_three_questions, replace(5, "B. One", "B. $1$")),
    (take_away_and_three_questions, replace(5, "No, since it is two.\n\n</details>", "\n\n</details>")),
]


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_good_notebook_keeps(rule):
    rule(good(), None)


@pytest.mark.parametrize("rule, fault", FAULTS, ids=lambda value: value.__name__ if value in RULES else "")
def test_a_broken_notebook_is_rejected(rule, fault):
    notebook = copy.deepcopy(good())
    fault(notebook)
    with pytest.raises(AssertionError):
        rule(notebook, None)


def test_every_rule_has_a_notebook_that_breaks_it():
    assert {rule for rule, _ in FAULTS} == set(RULES)
