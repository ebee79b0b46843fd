"""``homework grade``: a folder of submissions, honest, partial and damaged, becomes a table and pages of feedback."""

import ast
import copy
import csv
import html
import json
import os
import re

import nbformat
import numpy as np
import pytest

from dopamine_lib.__main__ import main
from dopamine_lib.course.exercises import BLANK, SOURCES, YEAR, Homework, of_year
from dopamine_lib.course.feedback import show
from dopamine_lib.course.grading import grade_folder
from dopamine_lib.course.homework import find_homework
from dopamine_lib.course.judge import Judge

SOURCE = SOURCES / "01_differential_privacy_homework.ipynb"
NAME, POINTS, MOST = SOURCE.stem, 33, 37  # those of the exercises, and with those by hand


def own(cell) -> dict:
    return cell.metadata.get("nbgrader", {})


def handed_in(*answered: str, words: str = BLANK, year: int = YEAR) -> nbformat.NotebookNode:
    """A student's copy with the solutions of some exercises, and an answer in words."""
    notebook = nbformat.read(SOURCE, 4)
    notebook.cells = of_year(notebook.cells, year)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and own(cell).get("solution"):
            cell.source = words
        elif own(cell).get("solution") and own(cell)["grade_id"] not in answered:
            cell.source = re.sub("### BEGIN.*?### END SOLUTION", "raise NotImplementedError()", cell.source, flags=re.S)
    return notebook


ALL = tuple(own(cell)["grade_id"] for cell in nbformat.read(SOURCE, 4).cells if own(cell).get("solution"))
TWO = ("count", "group")  # 8 points
(QUESTION,) = Homework.read(SOURCE).questions


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if own(cell).get("grade_id") == name)


def without_metadata(notebook):
    """As another program saved it."""
    for cell in notebook.cells:
        cell.metadata = {}
    return notebook


def lost(notebook):
    notebook.cells.remove(cell_of(notebook, "group"))
    notebook.cells.remove(cell_of(notebook, "count-test"))
    return notebook


def below(notebook):
    """An answer in words that was written into the cell of the question, and a cell of notes that is none."""
    asked = next(cell for cell in notebook.cells if cell.source.startswith("## 8."))
    asked.source += "\n\nTen times 0.5."
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("My notes."))
    return notebook


def doubled(notebook):
    again = copy.deepcopy(cell_of(notebook, "group"))
    notebook.cells.insert(1, again)
    again.source = "def group_bound(epsilon, delta, images):\n    return 0, 0  # an attempt"
    return notebook


def of_colab(notebook):
    """Another order of keys, no ids, other names, a magic and a command."""
    notebook.nbformat_minor = 0
    for cell in notebook.cells:
        cell.pop("id", None)
        cell.metadata = {"id": "xYz", "nbgrader": own(cell), "outputId": "1"}
    notebook.cells.insert(0, nbformat.from_dict({**notebook.cells[2], "source": "%matplotlib inline\n!pip list"}))
    return notebook


def text(notebook) -> bytes:
    return nbformat.writes(notebook).encode()


#: What lies in the folder, and the points and the note that come of it; None where it cannot be graded.
FILES = {
    f"solver/{NAME}.ipynb": (lambda: text(handed_in(*ALL, words="Five.")), POINTS, "graded by hand: 1"),
    f"other year/{NAME}.ipynb": (
        lambda: text(handed_in("size", year=YEAR + 1)),
        0,
        "least_patients is asked for in other",
    ),
    f"words/{NAME}.ipynb": (
        lambda: text(handed_in("count", words="Ten times <b>0.5</b>.")),
        4,
        "answers to be graded by hand: 1",
    ),
    f"words below/{NAME}.ipynb": (
        lambda: text(below(without_metadata(handed_in("count")))),
        4,
        "answers to be graded by hand: 1",
    ),
    f"sleeper/{NAME}.ipynb": (lambda: text(handed_in()), 0, ""),
    f"half/{NAME}.ipynb": (lambda: text(handed_in(*TWO)), 8, ""),
    f"tree/{NAME}/{NAME}.ipynb": (lambda: text(handed_in("count")), 4, ""),
    "renamed/homework final (2).ipynb": (lambda: text(handed_in(*TWO)), 8, f"was taken for {NAME}"),
    "flat.ipynb": (lambda: text(handed_in("count")), 4, f"flat.ipynb was taken for {NAME}"),
    f"mark/{NAME}.ipynb": (lambda: b"\xef\xbb\xbf" + text(handed_in(*TWO)), 8, "byte-order mark"),
    f"wide/{NAME}.ipynb": (lambda: text(handed_in(*TWO)).decode().encode("utf-16"), 8, "byte-order mark"),
    f"code/{NAME}.ipynb": (lambda: text(without_metadata(handed_in(*TWO))), 8, ""),
    f"colab/{NAME}.ipynb": (lambda: text(of_colab(handed_in(*TWO))), 8, ""),
    f"lost/{NAME}.ipynb": (lambda: text(lost(handed_in(*TWO))), 4, "group_bound is not in it"),
    f"doubled/{NAME}.ipynb": (lambda: text(doubled(handed_in(*TWO))), 8, "group_bound is written more than once"),
    f"merge/{NAME}.ipynb": (lambda: text(handed_in()).replace(b"\n", b"\n<<<<<<< HEAD\n", 1), None, "merge markers"),
    f"cut/{NAME}.ipynb": (lambda: text(handed_in())[:9000], None, "is no notebook"),
    "wrong/essay.ipynb": (lambda: text(nbformat.v4.new_notebook()), None, "asked for in any homework"),
    "empty/notes.txt": (lambda: b"", 0, "not handed in"),
}


def test_a_folder_of_submissions(tmp_path, capsys):
    for name, (content, _, _) in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content())
    (tmp_path / "in" / "half" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "in" / "half" / ".ipynb_checkpoints" / f"{NAME}-checkpoint.ipynb").write_bytes(SOURCE.read_bytes())
    older = tmp_path / "in" / "half" / "first try.ipynb"
    older.write_bytes(SOURCE.read_bytes())
    os.utime(older, (0, 0))
    assert main(["homework", "grade", str(tmp_path / "in")]) == 0
    assert f"solver  {NAME}  {POINTS} of {MOST}; not final: answers to be graded by hand: 1" in capsys.readouterr().out
    with open(tmp_path / "in-graded" / "grades.csv", newline="", encoding="utf-8") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    expected = {name.removesuffix(".ipynb").partition("/")[0]: what for name, (_, *what) in FILES.items()}
    assert rows.keys() == expected.keys()
    for student, (points, note) in expected.items():
        row = rows[student]
        assert (row["score"], note in row["note"]) == ("" if points is None else str(points), True), row
        assert row["note"].startswith("not graded: ") == (points is None), row
        assert row["note"] or not note
        page = (tmp_path / "in-graded" / "feedback" / f"{student}.html").read_text(encoding="utf-8")
        assert "http" not in page and "<script" not in page
    assert "first try.ipynb was left aside" in rows["half"]["note"]
    assert "stick 0/5" in rows["half"]["exercises"] and "group 4/4" in rows["half"]["exercises"]
    asked = QUESTION.name
    assert f"{asked} 0/4" in rows["half"]["exercises"] and rows["half"]["by_hand"] == ""
    assert f"{asked} ?/4" in rows["words"]["exercises"] and rows["words"]["by_hand"] == "4"
    by_hand = (tmp_path / "in-graded" / "by_hand.html").read_text(encoding="utf-8")
    assert "Ten times &lt;b&gt;0.5&lt;/b&gt;." in by_hand and "My notes" not in by_hand and "http" not in by_hand
    assert by_hand.count("<h2>") == 1 and html.escape(QUESTION.rubric) in by_hand
    for student in ("words", "words below", "solver"):
        assert by_hand.count(f"<h3>{student}</h3>") == 1
    assert main(["homework", "grade", str(tmp_path / "in")]) == 2
    assert "in-graded is not an empty folder; name another with --to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path != SOURCE)) for path in find_homework(SOURCES)],
)
def test_every_solution_has_full_marks_half_of_it_half_and_a_stub_none(source):
    """With the exercises of all years; a judge refuses a homework of a year that its solution does not pass."""
    for year in range(YEAR, YEAR + 4) if source == SOURCE else ():
        Judge(Homework.read(source, year))
    judge = Judge(Homework.read(source, None))
    answers = [exercise.answer for exercise in judge.homework.exercises]
    verdicts, stopped = judge.judge(answers)
    assert not stopped
    for verdict in verdicts:
        assert verdict.points == verdict.exercise.points, (verdict.exercise.name, verdict.tests)
    half = answers[: len(answers) // 2]
    for number, verdict in enumerate(judge.judge(half)[0]):
        assert verdict.points == (number < len(half)) * verdict.exercise.points, verdict.exercise.name
    stubs = [f"def {name}(*given):\n    raise NotImplementedError()" for name in judge.homework.functions]
    assert not any(verdict.points for verdict in judge.judge(stubs)[0])


def test_nothing_one_student_does_costs_another_a_grade(tmp_path, monkeypatch):
    answers = {
        "anna": "def laplace_scale(*given):\n    return 10**400",
        "ben": "def laplace_scale(*given):\n    raise RuntimeError('\\ud800')",
        "carl": "def laplace_scale(*given):\n    raise NotImplementedError\n# stops the judge itself",
        "dora": f"def laplace_scale(*given):\n    return range(10**10)\nfound = '{chr(0xD800)}'",
    }
    for student, cell in answers.items():
        (tmp_path / "in" / student).mkdir(parents=True)
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        (tmp_path / "in" / student / f"{NAME}.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "in" / "eve").mkdir()
    (tmp_path / "in" / "eve" / f"{NAME}.ipynb").symlink_to(SOURCE)
    (tmp_path / "in" / "eve" / "lost.ipynb").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "zoe").mkdir()
    (tmp_path / "in" / "zoe" / os.fsdecode(b"\xff.ipynb")).write_bytes(text(handed_in("count")))
    judge = Judge.judge

    def stopping(self, cells, *limits):
        if "stops the judge" in str(cells):
            raise OverflowError("too large")
        return judge(self, cells, *limits)

    monkeypatch.setattr(Judge, "judge", stopping)
    lines = []
    grade_folder(tmp_path / "in", tmp_path / "in-graded", report=lines.append)
    assert len([line.encode() for line in lines]) == 7
    with open(tmp_path / "in-graded" / "grades.csv", newline="", encoding="utf-8") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert {student: row["score"] for student, row in rows.items()} == {
        "anna": "0", "ben": "0", "carl": "", "dora": "", "eve": "", "zoe": "4"
    }  # fmt: skip
    with open(tmp_path / "in-graded" / "grades.csv", encoding="utf-8") as file:
        assert file.read().count("it is a link") == 2
    assert "OverflowError: too large" in rows["carl"]["note"]
    assert len(list((tmp_path / "in-graded" / "feedback").iterdir())) == len(rows)


def test_feedback_shows_code_as_text(tmp_path):
    notebook = handed_in("count")
    cell_of(notebook, "group").source = "def group_bound(*a):\n    raise KeyError('<script>alert(1)</script>')"
    (tmp_path / "in").mkdir()
    nbformat.write(notebook, tmp_path / "in" / "eve.ipynb")
    grade_folder(tmp_path / "in", tmp_path / "out")
    page = (tmp_path / "out" / "feedback" / "eve.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page and "<script" not in page
    assert "expected" in page and "1. A count with Laplace noise (4 points): 4 of 4" in page


def test_feedback_shows_calls_with_a_tests_own_functions():
    """A function of the test's is named; what it gives by chance has no right value; what is unanswered says so."""
    judge = Judge(Homework.read(SOURCES / "04_federated_algorithm_homework.ipynb", None))
    right = {exercise.name: exercise.answer for exercise in judge.homework.exercises}
    wrong = [
        right["message"].replace("math.sqrt(least)", "least"),
        "def remembers(hospital, d):\n    return False",
        "def step(*given):\n    raise NotImplementedError()",
        "def clipped_sums(given, *rest):\n    given[:] = 0\n    return given",
    ]
    tests = {verdict.exercise.name: verdict.tests for verdict in judge.judge(wrong)[0]}
    plain, alone, spread, *_ = tests["message"]
    assert "ones): expected array(" in plain.shown[0] and alone.passed and not spread.passed and not spread.shown
    shown = " ".join(text for test in tests["memory"] for text in test.shown)
    assert "remembers(send, " in shown and "expected True, found False" in shown
    assert tests["step"][0].shown[0].endswith("found no answer yet")


def test_an_array_of_many_short_sides_is_shown_by_its_beginning():
    """NumPy leaves nothing out of it, and writes megabytes for as many numbers, of which a line is taken."""
    text = show([np.zeros((2,) * 12), 1])
    assert text.startswith("[array([0., 0., 0., ..., 0., 0., 0.]") and "in the shape (2, 2, 2" in text
    assert show(np.eye(3)) == "array([[1., 0., 0.], [0., 1., 0.], [0., 0., 1.]])"


@pytest.mark.parametrize("source", find_homework(SOURCES), ids=lambda path: path.stem)
def test_every_test_has_a_hint_for_who_fails_it(source):
    for exercise in Homework.read(source, None).exercises:
        for call in ast.walk(ast.parse(exercise.test)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "passes":
                assert len(call.args) == 2 and call.args[1].value, ast.unparse(call)


def test_refusals(tmp_path, refuses, capsys):
    with refuses("no notebooks in", "a folder with the student's name"):
        grade_folder(tmp_path / "nowhere", tmp_path / "out")
    assert main(["homework", str(tmp_path / "out"), "in"]) == 2
    assert "homework grade FOLDER --to DIR" in capsys.readouterr().err
    notebook = nbformat.read(SOURCE, 4)
    cell_of(notebook, "count").source = "def laplace_scale(*given):\n    return 2"
    (tmp_path / "sources").mkdir()
    nbformat.write(notebook, tmp_path / "sources" / SOURCE.name)
    with refuses(f"{NAME}: the solution of count passes", "of 4 tests, for 4 points", "correct it"):
        Judge(Homework.read(tmp_path / "sources" / SOURCE.name))
