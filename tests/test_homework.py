"""Homework: sources that pass, students' copies without answers, and nbgrader's marks for both.

Every notebook of notebooks/homework/source is executed with its solutions and as handed out; nbgrader grades both.
"""

import csv
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import numpy as np
import pytest
from homework_marks import marks
from nbclient import NotebookClient

from dopamine_lib.__main__ import main
from dopamine_lib.course import homework
from dopamine_lib.course.exercises import BLANK, Homework

SOURCES = homework.find_homework(homework.SOURCES)
ANSWERS = re.compile(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n.*?### END (?:SOLUTION|HIDDEN TESTS)", re.DOTALL)
LEFTOVERS = ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS")

pytest.importorskip("nbgrader")
pytestmark = pytest.mark.filterwarnings("ignore:Object of type")  # nbgrader's use of its database
# the first notebook is graded in every run, the others where there is time
graded = pytest.mark.parametrize(
    "source",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path != SOURCES[0] else []) for path in SOURCES],
)
every = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


class Course:
    """An instructor's course as its page describes it, with a gradebook."""

    def __init__(self, folder: Path, solved: Path):
        from nbgrader.apps import NbGraderAPI
        from traitlets.config import Config

        self.folder, self.solved = folder, solved
        self.api = NbGraderAPI(config=Config(CourseDirectory={"root": str(folder)}))

    def grade(self, source: Path, student: str, submission: Path) -> dict[str, tuple[float, float]]:
        """Points given and points possible of each graded cell."""
        name = source.stem
        if not (self.folder / "source" / name).exists():
            shutil.copytree(self.solved / name, self.folder / "source" / name)
            self.check(self.api.generate_assignment(name))
        handed_in = self.folder / "submitted" / student / name / source.name
        handed_in.parent.mkdir(parents=True)
        shutil.copyfile(submission, handed_in)
        self.check(self.api.autograde(name, student))
        with self.api.gradebook as gradebook:
            grades = gradebook.find_submission(name, student).notebooks[0].grades
            assert not any(grade.needs_manual_grade for grade in grades if grade.cell.cell_type == "code")
            return {
                grade.cell.name: (grade.score, grade.max_score) for grade in grades if grade.cell.cell_type == "code"
            }

    @staticmethod
    def check(result: dict) -> None:
        assert result["success"], result.get("log")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder in which the command put the students' copies, and nbgrader's folder with the solved notebooks."""
    folder = tmp_path_factory.mktemp("made")
    homework.students_copies(folder / "out", course=folder / "course")
    return folder


@pytest.fixture(scope="module")
def course(tmp_path_factory, made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", sysconfig.get_path("scripts"), prepend=":")  # nbgrader calls alembic by its name
        yield Course(tmp_path_factory.mktemp("course"), made / "course" / "source")


@pytest.fixture(scope="module")
def copies(made):
    """The students' copies as the command makes them, by name."""
    return {path.stem: path for path in (made / "out").iterdir()}


def code(cell) -> bool:
    return cell.cell_type == "code" and "google.colab" not in cell.source


def metadata(cell) -> dict:
    return cell.metadata.get("nbgrader", {})


def solution_regions(notebook):
    """The lines between the markers, for every solution cell."""
    pattern = re.compile(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", re.DOTALL)
    return [region for cell in notebook.cells for region in pattern.findall(cell.source)]


@every
def test_source_is_valid_for_nbgrader(source):
    from nbgrader.nbgraderformat import MetadataValidator

    notebook = nbformat.read(source, 4)
    MetadataValidator().validate_nb(notebook)
    ours = [metadata(cell) for cell in notebook.cells if metadata(cell)]
    names = [one["grade_id"] for one in ours]
    assert len(set(names)) == len(names)
    assert all(one["schema_version"] == 3 for one in ours)
    tests = [cell for cell in notebook.cells if code(cell) and metadata(cell).get("grade")]
    assert 4 <= len(tests) and all(metadata(cell)["points"] > 0 and metadata(cell)["locked"] for cell in tests)
    assert all("BEGIN HIDDEN TESTS" in cell.source for cell in tests)


def points_of(notebook) -> dict[str, int]:
    """The points of each exercise."""
    tests = [metadata(cell) for cell in notebook.cells if code(cell) and metadata(cell).get("grade")]
    return {own["grade_id"].removesuffix("-test"): own["points"] for own in tests}


@every
@pytest.mark.filterwarnings("error")
def test_source_passes_all_its_tests(source):
    """With the exercises of all years, without a warning."""
    notebook = nbformat.read(source, 4)
    assert marks(notebook) == points_of(notebook)


@pytest.mark.parametrize("source", SOURCES[:1], ids=lambda path: path.stem)
def test_a_kernel_gives_the_same_marks(source):
    notebook = nbformat.read(source, 4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    for cell in filter(code, notebook.cells):
        if metadata(cell).get("grade"):
            results = [o.data["text/plain"] for o in cell.outputs if o.output_type == "execute_result"]
            assert [float(one) for one in results] == [metadata(cell)["points"]], metadata(cell)["grade_id"]
        assert not any(o.output_type == "stream" and o.name == "stderr" for o in cell.outputs)


@every
def test_students_copy_has_no_answers(source, copies):
    notebook, blank = homework.numbered(source, homework.YEAR), nbformat.read(copies[source.stem], 4)
    assert not any(marker in copies[source.stem].read_text(encoding="utf-8") for marker in LEFTOVERS)
    shown = "\n".join(cell.source for cell in blank.cells)
    allowed = "\n".join(ANSWERS.sub("", cell.source) for cell in notebook.cells)
    for answer in (answer for cell in notebook.cells for answer in ANSWERS.findall(cell.source)):
        secret = [
            line.strip() for line in answer.splitlines() if len(line.strip()) > 12 and line.strip() not in allowed
        ]
        assert not [line for line in secret if line in shown]
    rubrics = [cell.source for cell in notebook.cells if cell.cell_type == "markdown" and metadata(cell)["grade"]]
    assert rubrics and not [line for one in rubrics for line in one.splitlines() if line and line in shown]
    assert sum(cell.source == BLANK for cell in blank.cells) == len(rubrics)
    assert all(not cell.outputs for cell in blank.cells if cell.cell_type == "code")
    stubs = sum("YOUR CODE HERE" in cell.source for cell in blank.cells if cell.cell_type == "code")
    assert stubs == sum(bool(metadata(cell).get("solution")) for cell in notebook.cells if code(cell))
    for cell in filter(code, blank.cells):  # what is longer is folded
        assert cell.source.count("\n") < 30 or cell.metadata.jupyter.source_hidden, metadata(cell)["grade_id"]
    assert not any("choice-" in tag for cell in blank.cells for tag in cell.metadata.get("tags", []))


@every
def test_exactly_the_cells_meant_to_fail_do(source, copies):
    """Graded cells, and solution cells whose stub is not inside a function."""
    cells = list(filter(code, nbformat.read(copies[source.stem], 4).cells))
    failed, names = set(), {}
    for cell in cells:
        try:
            exec(cell.source, names)
        except Exception:
            failed.add(cell.id)
    bare = {cell.id for cell in cells if re.search(r"^raise NotImplementedError", cell.source, re.MULTILINE)}
    assert failed == bare | {cell.id for cell in cells if metadata(cell).get("grade")}


@graded
def test_full_marks_for_the_solution_and_none_for_the_blank_copy(source, course, copies, made):
    source = made / "course" / "source" / source.stem / source.name  # of the year that is handed out
    solved, blank = (course.grade(source, *who) for who in (("solver", source), ("sleeper", copies[source.stem])))
    assert solved and all(score == most for score, most in solved.values()), solved
    assert blank.keys() == solved.keys() and all(score == 0 for score, _ in blank.values()), blank


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES[-1:], ids=lambda path: path.stem)
def test_half_of_the_exercises_give_their_points_and_no_others(source, course, copies, tmp_path):
    """By nbgrader; the judge is asked the same about every homework (test_homework_grading.py)."""
    answers = {metadata(c)["grade_id"]: c.source for c in nbformat.read(source, 4).cells if metadata(c).get("solution")}
    half = list(answers)[: len(answers) // 2]
    submission = nbformat.read(copies[source.stem], 4)
    for cell in submission.cells:
        if metadata(cell).get("grade_id") in half:
            cell.source = answers[metadata(cell)["grade_id"]]
    nbformat.write(submission, tmp_path / "half.ipynb")
    marks = course.grade(source, "half", tmp_path / "half.ipynb").values()
    assert 0 < sum(score for score, _ in marks) < sum(most for _, most in marks)
    assert all(score in (0, most) for score, most in marks)


def test_damaged_copies_as_the_page_says(course, copies, tmp_path):
    """Edited tests are overwritten, deleted ones put back on request; a copied cell stops nbgrader."""
    source = SOURCES[0]

    def marks(student, notebook):
        nbformat.write(notebook, tmp_path / f"{student}.ipynb")
        return course.grade(source, student, tmp_path / f"{student}.ipynb").values()

    cheat = nbformat.read(copies[source.stem], 4)
    for cell in cheat.cells:
        if metadata(cell).get("grade"):
            cell.source = str(metadata(cell)["points"])  # "full points for me"
    assert all(score == 0 for score, _ in marks("cheat", cheat))

    copied = homework.numbered(source, homework.YEAR)
    first = next(cell for cell in copied.cells if metadata(cell).get("solution"))
    copied.cells.insert(1, nbformat.from_dict({**first, "id": "twin"}))
    with pytest.raises(AssertionError, match="old version"):
        marks("copied", copied)

    gap = homework.numbered(source, homework.YEAR)
    gap.cells = [cell for cell in gap.cells if not (code(cell) and metadata(cell).get("grade"))]
    course.api.config.OverwriteCells.add_missing_cells = True
    found = marks("gap", gap)
    del course.api.config["OverwriteCells"]  # other tests grade in the same course
    assert all(score == most for score, most in found)


BROKEN = {
    "mark": lambda text: b"\xef\xbb\xbf" + text,
    "merge": lambda text: text.replace(b"\n", b"\n<<<<<<< HEAD\n=======\n>>>>>>> mine\n", 1),
    "cut": lambda text: text[: len(text) // 2],
    "killed": lambda text: text.replace(b"raise NotImplementedError()", b"__import__('os').abort()", 1),
    "renamed": lambda text: text,
    "stripped": lambda text: text.replace(b'"nbgrader"', b'"lost"'),
    "blank": lambda text: text,
    "idle": None,
}


def test_homework_that_could_not_be_graded_is_no_zero_in_the_table(course, copies, tmp_path):
    """As its page exports it: nbgrader's own table has 0.0 for all of these."""
    source = SOURCES[0]
    text = copies[source.stem].read_bytes()
    course.grade(source, "honest", copies[source.stem])
    for student, damage in BROKEN.items():
        if damage is None:
            with course.api.gradebook as gradebook:
                gradebook.add_student(student)
            continue
        folder = course.folder / "submitted" / student / source.stem
        folder.mkdir(parents=True)
        name = f"{source.stem} (1).ipynb" if student == "renamed" else source.name
        (folder / name).write_bytes(damage(text))
        assert course.api.autograde(source.stem, student)["success"] == (student in ("blank", "stripped"))
    command = [sys.executable, "-m", "nbgrader", "export", "--exporter=dopamine_lib.course.grades.Grades"]
    subprocess.run([*command, "--to", tmp_path / "grades.csv"], cwd=course.folder, check=True, capture_output=True)
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert {student: row["score"] for student, row in rows.items() if student in (*BROKEN, "honest")} == {
        **dict.fromkeys(BROKEN, ""),
        **dict.fromkeys(("honest", "blank", "idle", "stripped"), "0.0"),
    }
    notes = {student: row["note"] for student, row in rows.items()}
    assert notes["honest"] == notes["blank"] == "" and notes["idle"] == "not handed in"
    for student, said in (
        *(("mark", "byte-order mark"), ("merge", "merge markers"), ("cut", "is no notebook (")),
        *(("killed", "the kernel died"), ("renamed", f"but {source.stem} (1).ipynb")),
    ):
        assert notes[student].startswith("not graded: ") and said in notes[student]
    assert re.fullmatch("not final: [0-9]+ cells wait to be graded by hand", notes["stripped"])


FRACTION = re.compile(r"\d+\.\d{9,}")


@every
def test_the_copies_in_the_repository_are_those_of_the_sources(source, copies):
    """Where not: python -m dopamine_lib homework OUT, and cp OUT/* notebooks/homework/. Last digits may differ."""
    stored, made = (path.read_text(encoding="utf-8") for path in (source.parents[1] / source.name, copies[source.stem]))
    assert not any(marker in stored for marker in LEFTOVERS)
    rounded = [FRACTION.sub(lambda found: f"{float(found[0]):.8f}", text) for text in (stored, made)]
    checksums = [re.sub('"checksum": ".*"', "", text) for text in rounded]
    assert checksums[0] == checksums[1]


def test_no_right_answer_fails_for_drawing_oftener_than_the_solution():
    """Numbers in a student's copy must not depend on how often an answer above draws from the tests' generator."""
    drawing = [path for path in SOURCES if re.search(r"def \w+\([^)]*\brng\b", path.read_text(encoding="utf-8"))]
    assert len(drawing) >= 2
    for path in drawing:
        names: dict = {}
        for cell in homework.numbered(path, homework.YEAR).cells:
            if cell.cell_type != "code":
                continue
            visible = re.sub(r"### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS", "", cell.source, flags=re.DOTALL)
            exec(compile(visible, path.stem, "exec"), names)
            assert "### BEGIN HIDDEN" not in cell.source or names["points"] == visible.count("passes(") + 1
            for name in re.findall(r"^def (\w+)\([^)]*\brng\b", cell.source, re.MULTILINE):
                names[name] = _drawing_once_more(names[name])


def _drawing_once_more(answer):
    """The answer, as somebody writes it who draws one number more."""

    def other(*given):
        found = answer(*given)
        [one.random() for one in given if isinstance(one, np.random.Generator)]
        return found

    return other


@every
def test_a_year_has_numbers_and_exercises_of_its_own(source):
    """In every exercise's visible tests; with them the solution passes, and nobody is asked for any."""
    years = [homework.numbered(source, year) for year in (2026, 2027, 2028, 2029, 2027)]
    assert nbformat.writes(years[1]) == nbformat.writes(years[-1])
    visible = [
        {metadata(cell)["grade_id"]: ANSWERS.sub("", cell.source) for cell in year.cells if metadata(cell)["grade"]}
        for year in years[:-1]
    ]
    asked = [frozenset(one) for one in visible]
    assert len(set(asked)) == 4, "each year has other exercises, until all combinations came up"
    for ours, next_one in zip(visible, visible[1:], strict=False):
        for name in ours.keys() & next_one.keys():
            assert ours[name] != next_one[name] or not name.endswith("-test"), name
    total = {sum(metadata(cell)["points"] for cell in year.cells if metadata(cell)["grade"]) for year in years}
    assert len(total) == 1, "whichever is chosen, there are as many points"
    for year in years[:-1]:
        titles = [line for cell in year.cells for line in re.findall(r"^## (\d+)\.", cell.source, re.MULTILINE)]
        assert titles == [str(number + 1) for number in range(len(titles))]
        assert not any(re.search(r"\b(draw|right)\.|dopamine_lib", cell.source) for cell in year.cells if code(cell))
    for year in years[:2]:
        assert marks(year) == points_of(year)


@every
def test_every_question_in_words_has_a_rubric(source):
    questions = Homework.read(source, None).questions
    assert len(questions) >= 2
    for question in questions:
        assert question.title.endswith(f"in words ({question.points} points)") and "*Rubric" in question.rubric
        assert question.rubric.count("\n- ") >= question.points and "$" not in question.title


def test_command_writes_every_copy_and_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here"))
    monkeypatch.setenv("PATH", "/nowhere")  # an environment that was never activated
    (tmp_path / "sources").mkdir()
    for source in SOURCES[:2]:
        shutil.copy(source, tmp_path / "sources")
    monkeypatch.setattr(homework, "SOURCES", tmp_path / "sources")
    assert main(["homework", "../out"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in SOURCES[:2]}
    assert not list((tmp_path / "here").iterdir())
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["homework", "../out", "--year", "2027", "--to", "../there"]) == 2
    assert "--to are for grading" in capsys.readouterr().err
    for words in (
        ["homework", "grade", "../out", "--leak", "1"],
        ["homework", "../leak", "--leak", "1", "--year", "2027"],
    ):
        assert main(words) == 2 and "--leak" in capsys.readouterr().err
    assert main(["homework", "../out"]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_refusals(tmp_path, refuses, monkeypatch):
    (tmp_path / "file").write_text("")
    with refuses("file is not an empty folder", "name another"):
        homework.students_copies(tmp_path / "file")
    with refuses("no homework in", "repository or its wheel"):
        homework.students_copies(tmp_path / "out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(homework, "_release", lambda folder, notebook, year: notebook)
        with refuses("file/out cannot be written", "name another"):
            homework.students_copies(tmp_path / "file" / "out")
    (tmp_path / "course" / "source" / SOURCES[0].stem).mkdir(parents=True)
    with refuses("course/source has homework already", "name another folder"):
        homework.students_copies(tmp_path / "out", course=tmp_path / "course")
    monkeypatch.setitem(sys.modules, "nbgrader.apps", None)
    with refuses("nbgrader is not installed", 'pip install "dopamine-kit[course]"'):
        homework.students_copies(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault, said",
    [
        *(("twice", "Duplicate grade id"), ("open", "no end solution"), ("bare", "non-")),
        *(("wrong", "AssertionError"), ("often", "is asked 2 times; ask it once")),
    ],
)
def test_a_broken_source_is_refused_whole(fault, said, tmp_path, refuses):
    notebook = nbformat.read(SOURCES[1], 4)
    solutions = [cell for cell in notebook.cells if metadata(cell).get("solution")]
    tests = [cell for cell in notebook.cells if metadata(cell).get("grade")]
    if fault == "twice":
        tests[1].metadata.nbgrader.grade_id = tests[0].metadata.nbgrader.grade_id
    elif fault == "open":
        solutions[0].source = solutions[0].source.replace("### END SOLUTION", "")
    elif fault == "wrong":
        tests[0].source = tests[0].source.replace("right.laplace_scale(s, e)", "2 + right.laplace_scale(s, e)", 1)
    elif fault == "often":
        tests[0].source = tests[0].source.replace(
            "s, e = draw", "_ = [draw.whole(1, 2) for _ in range(2)]\ns, e = draw"
        )
    else:
        del solutions[0].metadata["nbgrader"]
    (tmp_path / "sources").mkdir()
    nbformat.write(notebook, tmp_path / "sources" / "broken.ipynb")
    with refuses("broken.ipynb", said, "correct the notebook"):
        homework.students_copies(tmp_path / "out", tmp_path / "sources")
    assert not (tmp_path / "out").exists()
