"""The design's "A notebook", as rules: every notebook is read and held to them, and each rule rejects a broken one.

Whether a notebook runs is nbval's business. Here is what a reader meets: its shape, its words, and what is stored.
"""

import copy
import json
import re
from pathlib import Path

import lecture
import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
HOMEWORK = sorted((NOTEBOOKS / "homework" / "source").glob("*.ipynb"))
OPENING = ("What you will learn.", "What you need.", "Time and memory on 2 cores.")
#: A path that exists on one machine only: Unix homes and work folders, a Windows drive.
ABSOLUTE = re.compile(r"(?<![\w.])(?:/(?:home|tmp|work|root|Users)/|[A-Z]:\\+\w)")
MOST_BYTES = 1_000_000
#: What a lecture has room for; how it is counted is in ``lecture``.
MOST_CELLS, MOST_WORDS, MOST_LINES, MOST_IMPORTS = 40, 3000, 30, 12
#: What begins a paragraph that a colon may announce.
_SET_APART = re.compile(r"[-*|>`<]|\d+\. |\$\$|!\[| {4}")


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
        assert set(cell.metadata) <= {"nbgrader", "tags", "jupyter", "cellView"}, (
            f"cell metadata {sorted(cell.metadata)}"
        )


def set_up_folded(notebook, path):
    if path in HOMEWORK:  # a student's cells are graded by their metadata
        return
    for cell in code(notebook)[:2]:
        if re.match(r"# Google Colab|%matplotlib|import |from ", cell.source):
            folded = cell.metadata.get("jupyter", {}).get("source_hidden") is True  # in JupyterLab
            assert folded and {"hide-input", "remove-cell"} & set(cell.metadata.tags), "imports before the first idea"


def folded_everywhere(notebook, path):
    if path in HOMEWORK:
        return
    for cell in code(notebook):
        on_the_site, in_lab = lecture.folded(cell), cell.metadata.get("jupyter", {}).get("source_hidden", False)
        in_colab = cell.metadata.get("cellView") == "form"
        assert on_the_site == in_lab == in_colab, f"folded in one place and not in another: {cell.source[:60]!r}"


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


def exercise_is_blank_and_solution_folded(notebook, path):
    if path in HOMEWORK:
        return
    for question, blank, solution in zip(notebook.cells, notebook.cells[1:], notebook.cells[2:], strict=False):
        if solution.cell_type == "code" and "### BEGIN SOLUTION" in solution.source:
            hidden = solution.metadata.get("jupyter", {}).get("outputs_hidden", False)
            assert "hide-cell" in solution.metadata.get("tags", []) and hidden, (
                "the solution is folded, and what it prints"
            )
            assert re.search(r"^# Exercise \d: define \w", blank.source, re.MULTILINE), "before it a cell for an answer"
            assert re.search(r"<summary>Hint</summary>\n\n.{10,}\n\n</details>", question.source, re.S), "and a hint"


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


def fits_a_lecture(notebook, path):
    if path in HOMEWORK:
        return
    assert len(lecture.shown(notebook)) <= MOST_CELLS, f"{len(lecture.shown(notebook))} cells that are not folded"
    assert lecture.words(notebook) <= MOST_WORDS, f"{lecture.words(notebook)} words"


def no_long_cell(notebook, path):
    if path in HOMEWORK:
        return
    for cell in lecture.shown(notebook):
        if cell.cell_type == "code":
            assert lecture.lines(cell) <= MOST_LINES, f"{lecture.lines(cell)} lines: {cell.source[:80]!r}"


def few_imports_first(notebook, path):
    if path in HOMEWORK:
        return
    count = lecture.first_imports(notebook)
    assert count <= MOST_IMPORTS, f"{count} imports before the first idea; import where it is used"


def first_screen_shows(notebook, path):
    if path in HOMEWORK:
        return
    for cell in code(notebook):
        if cell.outputs:  # a picture, or numbers
            shown = images(cell) or re.search(r"\d", str(cell.outputs))
            assert shown, "the first output shows a picture or a number"
            at = notebook.cells.index(cell)
            assert sum(not lecture.folded(one) for one in notebook.cells[:at]) <= 3, "and soon"
            return


def colons_announce(notebook, path):
    """What a colon at a paragraph's end announces comes next: a list, a table, a formula, a text set apart, a cell."""
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type == "markdown":
            paragraphs = [text for text in re.split(r"\n\s*\n", cell.source.strip("\n")) if text.strip()]
            for text, follows in zip(paragraphs, [*paragraphs[1:], None], strict=True):
                if text.rstrip("* \n").endswith(":"):
                    found = after and after.cell_type == "code" if follows is None else _SET_APART.match(follows)
                    assert found, f"nothing comes of {text[-80:]!r}"


def honest_times(notebook, path):
    if path in HOMEWORK:
        return
    asked = lecture.minutes(notebook)
    said = lecture.stated(notebook.cells[0].source)
    assert said and all(abs(one - other) <= 10 for one, other in zip(said, asked, strict=True)), (
        f"minutes to read and study are {asked}, stated {said}: python tests/lecture.py writes them"
    )


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
    folded_everywhere,
    compared_cells_are_text,
    references,
    one_epsilon,
    checks_itself,
    has_an_exercise,
    exercise_is_blank_and_solution_folded,
    take_away_and_three_questions,
    fits_a_lecture,
    no_long_cell,
    few_imports_first,
    first_screen_shows,
    colons_announce,
    honest_times,
)


def name(value) -> str:
    return value.stem if isinstance(value, Path) else value.__name__


@pytest.mark.parametrize("rule", RULES, ids=name)
@pytest.mark.parametrize("path", CHAPTERS + HOMEWORK, ids=name)
def test_notebook(path, rule):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    rule(notebook, path)


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_the_readme_says_the_same_minutes(path):
    readme = (lecture.REPOSITORY / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| \[`{path.stem}`\][^|]*\|[^|]*\| (\d+) \| (\d+) \|", readme, re.MULTILINE)
    assert tuple(map(int, row.groups())) == lecture.stated(nbformat.read(path, 4).cells[0].source)


def test_there_are_notebooks_to_read():
    assert CHAPTERS and HOMEWORK
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) for path in CHAPTERS)
    chapters = {path.stem for path in CHAPTERS}
    assert all(path.stem.removesuffix("_homework") in chapters for path in HOMEWORK), "homework belongs to a chapter"


#: A cell's metadata where its input is folded: on the site, in JupyterLab, in Colab.
FOLDED = {"tags": ["hide-input"], "jupyter": {"source_hidden": True}, "cellView": "form"}
SOLVED = FOLDED | {"tags": ["hide-cell"], "jupyter": {"source_hidden": True, "outputs_hidden": True}}
SAID = "This and that. To read: 0 minutes; to study, with exercises and questions: 20 minutes."


def good():
    """A small notebook that keeps every rule."""
    v4 = nbformat.v4
    opening = "\n\n".join(["# A chapter", *(f"**{block}** {SAID}" for block in OPENING)])
    figure = v4.new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    printed = v4.new_output("stream", name="stdout", text="0.125\n")
    cells = [
        v4.new_markdown_cell(opening),
        v4.new_code_cell("draw()", execution_count=1, outputs=[figure]),
        v4.new_markdown_cell("*A curve that falls from left to right.*\n\n## Claim\n\n### Look"),
        v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(1 / 8)\nassert 1 < 2", execution_count=2, outputs=[printed]),
        v4.new_markdown_cell("**1.** How many?\n\n<details>\n<summary>Hint</summary>\n\nFewer than two.\n\n</details>"),
        v4.new_code_cell("# Exercise 1: define x", execution_count=3),
        v4.new_code_cell(
            "### BEGIN SOLUTION\nx = 1\n### END SOLUTION\nassert x == 1", execution_count=4, metadata=SOLVED
        ),
        v4.new_markdown_cell("## References\n\n- The paper, Eq. 1."),
    ]
    answer = "<details>\n<summary>{}. One</summary>\n\nNo, since it is two.\n\n</details>\n"
    questions = [f"**Question {n}.** How many?\n\n" + "".join(map(answer.format, "ABC")) for n in (1, 2, 3)]
    away = "## What to take away\n\n- One.\n- Two.\n- Three.\n\n### Three questions\n\n" + "\n".join(questions)
    cells.insert(7, v4.new_markdown_cell(away))
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


def set_up(count):
    """A folded cell with this many imports."""
    return nbformat.v4.new_code_cell("import math\n" * count, metadata=FOLDED)


FAULTS = [
    (one_title, replace(2, "## Claim", "# Claim")),
    (one_title, replace(0, "# A chapter", "## A chapter")),
    (no_skipped_level, replace(2, "### Look", "#### Look")),
    (no_skipped_level, replace(2, "## Claim", "### Claim")),
    (opening_block, replace(0, "**What you need.**", "What you need.")),
    (
        opening_block,
        lambda notebook: notebook.cells[0].update(source=notebook.cells[0].source.rpartition("** ")[0] + "**"),
    ),
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
    (references, replace(8, "## References", "## Further reading")),
    (references, replace(8, "- The paper, Eq. 1.", "")),
    (one_epsilon, replace(2, "## Claim", r"## Claim for $\epsilon$")),
    (checks_itself, replace(3, "assert 1 < 2", "print(1 < 2)")),
    (has_an_exercise, replace(6, "### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "x = 1")),
    (has_an_exercise, replace(6, "### END SOLUTION\n", "")),
    (take_away_and_three_questions, replace(7, "## What to take away", "## Summary")),
    (take_away_and_three_questions, replace(7, "- Three.\n", "")),
    (take_away_and_three_questions, replace(7, "**Question 3.**", "And:")),
    (take_away_and_three_questions, replace(7, "<summary>B. One</summary>\n\nNo, since it is two.", "B. One")),
    (take_away_and_three_questions, replace(7, "B. One", "B. $1$")),
    (take_away_and_three_questions, replace(7, "No, since it is two.\n\n</details>", "\n\n</details>")),
    (folded_everywhere, lambda notebook: notebook.cells[6].metadata.pop("cellView")),
    (folded_everywhere, lambda notebook: notebook.cells[6].metadata.jupyter.update(source_hidden=False)),
    (exercise_is_blank_and_solution_folded, put(6, "metadata", nbformat.from_dict({}))),
    (exercise_is_blank_and_solution_folded, lambda notebook: notebook.cells[6].metadata.update(tags=["hide-input"])),
    (exercise_is_blank_and_solution_folded, lambda notebook: notebook.cells[6].metadata.jupyter.pop("outputs_hidden")),
    (exercise_is_blank_and_solution_folded, replace(5, "# Exercise 1: define x", "x = 1")),
    (exercise_is_blank_and_solution_folded, replace(4, "<summary>Hint</summary>", "Hint")),
    (fits_a_lecture, lambda notebook: notebook.cells.extend([nbformat.v4.new_code_cell("x")] * MOST_CELLS)),
    (fits_a_lecture, replace(2, "## Claim", "word " * MOST_WORDS + "\n\n## Claim")),
    (no_long_cell, replace(3, "print(1 / 8)", "x = 1\n" * MOST_LINES)),
    (few_imports_first, lambda notebook: notebook.cells.insert(1, set_up(MOST_IMPORTS + 1))),
    (first_screen_shows, put(1, "outputs", [nbformat.v4.new_output("stream", name="stdout", text="ready")])),
    (first_screen_shows, lambda notebook: notebook.cells.__setitem__(slice(1, 1), notebook.cells[2:3] * 3)),
    (colons_announce, replace(2, "## Claim", "This shows it:\n\n## Claim")),
    (colons_announce, replace(8, "- The paper, Eq. 1.", "And:")),
    (honest_times, replace(0, "study, with exercises and questions: 20", "study, with exercises and questions: 31")),
    (honest_times, replace(2, "## Claim", "word " * 11 * lecture.WORDS + "\n\n## Claim")),
    (honest_times, lambda notebook: notebook.cells[0].update(source=notebook.cells[0].source.replace("To read", ""))),
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
