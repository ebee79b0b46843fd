"""Grading a folder of submissions: a table of points, a page of feedback for each student, one for marking by hand.

    python -m dopamine_lib homework grade FOLDER

Students' code runs in processes of its own (``dopamine_lib.course.answers``), one submission after another, and all
submissions are judged on the same inputs, which are drawn when grading begins.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from dopamine_lib.course.calls import MEMORY, SECONDS
from dopamine_lib.course.exercises import SOURCES, YEAR, Homework, Question, functions_of
from dopamine_lib.course.feedback import page, page_by_hand
from dopamine_lib.course.homework import find_homework
from dopamine_lib.course.judge import Judge, Verdict
from dopamine_lib.course.submissions import Submission, find_submissions
from dopamine_lib.errors import InputError
from dopamine_lib.files import atomic_path
from dopamine_lib.progress import progress_bar

COLUMNS = ("assignment", "student_id", "score", "max_score", "exercises", "note", "by_hand")


@dataclass
class Graded:
    """One student's homework: what each exercise earned; ``verdicts`` is None where it could not be graded.

    answers  to the questions in words; empty where there is none
    """

    student: str
    assignment: str
    verdicts: list[Verdict] | None = None
    answers: dict[Question, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)

    @property
    def score(self) -> int:
        """The points of all exercises, without what is marked by hand."""
        return sum(verdict.points for verdict in self.verdicts or ())

    @property
    def by_hand(self) -> int:
        """The points that are left to give by hand."""
        return sum(question.points for question, answer in self.answers.items() if answer)

    @property
    def most(self) -> int:
        """The points that there were, those by hand among them."""
        return sum(one.points for one in (*(verdict.exercise for verdict in self.verdicts or ()), *self.answers))

    def row(self) -> dict:
        """Its row of ``grades.csv``: without verdicts the score is empty, not 0."""
        row = {"assignment": self.assignment, "student_id": self.student, "note": "; ".join(self.notes)}
        if self.verdicts is None:
            return row
        parts = [f"{verdict.exercise.name} {verdict.points}/{verdict.exercise.points}" for verdict in self.verdicts]
        parts += [f"{one.name} {'?' if said else 0}/{one.points}" for one, said in self.answers.items()]
        whole = {"score": self.score, "max_score": self.most, "exercises": ", ".join(parts)}
        return row | whole | {"by_hand": self.by_hand or ""}


def grade_folder(
    folder: str | PathLike,
    out: str | PathLike,
    *,
    sources: str | PathLike | None = None,
    year: int = YEAR,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    report: Callable[[str], object] = lambda line: None,
) -> list[Graded]:
    """Grade the submissions of ``folder`` into ``out``: ``grades.csv``, ``by_hand.html``, ``feedback/STUDENT.html``.

    folder   ``STUDENT/…/ANY.ipynb``, such as nbgrader's ``submitted``, or ``STUDENT.ipynb``
    sources  the solved notebooks (default: the kit's)
    year     whose exercises were handed out
    seconds  for one cell and for one test; memory  bytes of a student's process
    report   hears a line for each submission

    Raises InputError if ``out`` is in use, if there are no submissions, or if a solution does not pass its own tests.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name another with --to, or empty it")
    students = find_submissions(folder)
    homeworks = [Homework.read(path, year) for path in find_homework(SOURCES if sources is None else Path(sources))]
    judges: dict[str, Judge] = {}
    graded: dict[str, list[Graded]] = {}
    for student, paths in progress_bar(students.items(), title="grading", unit="student"):
        graded[student] = []
        for homework, submission, notes in _choose(paths, homeworks):
            one = Graded(student, "" if homework is None else homework.name, notes=notes)
            if submission is not None:
                if homework.name not in judges:
                    judges[homework.name] = Judge(homework)
                try:
                    one.verdicts, stopped = judges[homework.name].judge(submission.cells, seconds, memory)
                    one.stopped = _by_answer(submission, homework, stopped)
                    one.notes += [f"the cell of {names} stopped" for names in one.stopped]
                    one.answers = {asked: submission.answer(asked, homework.headings) for asked in homework.questions}
                    if waiting := sum(map(bool, one.answers.values())):
                        one.notes.append(f"not final: answers to be graded by hand: {waiting}")
                except Exception as error:  # nothing in one student's work may cost another a grade
                    one.verdicts = None
                    one.notes.append(f"not graded: the judge stopped with {type(error).__name__}: {error}")
            graded[student].append(one)
            result = f"{one.score} of {one.most}" if one.verdicts else "not graded"
            line = f"{student}  {one.assignment or '?'}  {result}" + "".join(f"; {note}" for note in one.notes)
            report(line.encode(errors="replace").decode())
    _add_missing(graded)
    # a file's name may be no text, hence "replace"
    with (
        atomic_path(out / "grades.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="replace") as file,
    ):
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(one.row() for own in graded.values() for one in own)
    everything = [one for own in graded.values() for one in own]
    with atomic_path(out / "by_hand.html") as temporary:
        temporary.write_text(page_by_hand(everything), encoding="utf-8", errors="replace")
    for student, own in graded.items():
        with atomic_path(out / "feedback" / f"{student}.html") as temporary:
            temporary.write_text(page(student, own), encoding="utf-8", errors="replace")
    return everything


def _choose(paths: list[Path], homeworks: list[Homework]) -> list[tuple[Homework | None, Submission | None, list[str]]]:
    """A student's submissions, one for each homework, and what cannot be graded with its reason."""
    chosen: dict[str, tuple[Homework, Submission, list[str]]] = {}
    refused = []
    for path in sorted(paths, key=lambda path: (path.lstat().st_mtime, path.name)):
        try:
            submission = Submission.read(path)
            homework = submission.homework(homeworks)
        except (InputError, OSError) as error:
            refused.append((None, None, [f"not graded: {path.name}: {error}"]))
            continue
        earlier = chosen.pop(homework.name, None)
        notes = [f"{earlier[1].path.name} was left aside, because {path.name} is newer"] if earlier else []
        chosen[homework.name] = (homework, submission, [*notes, *submission.notes])
    return [*(chosen[name] for name in sorted(chosen)), *refused]


def _by_answer(submission: Submission, homework: Homework, stopped: dict[int, str]) -> dict[str, str]:
    """Why cells stopped that hold an answer, by the names of its functions."""
    found = {}
    for number, why in stopped.items():
        names = [name for name in functions_of(submission.cells[number]) if name in homework.functions]
        if names:
            found[", ".join(names)] = why
    return found


def _add_missing(graded: dict[str, list[Graded]]) -> None:
    """Give everybody a row for every homework that somebody handed in."""
    names = sorted({one.assignment for own in graded.values() for one in own if one.assignment})
    for student, own in graded.items():
        if not any(not one.assignment for one in own):  # what could not be read may be any of them
            have = {one.assignment for one in own}
            own += [Graded(student, name, [], notes=["not handed in"]) for name in names if name not in have]
