"""``grades.csv`` in which homework that could not be graded is told from homework that earned nothing.

    nbgrader export --exporter=dopamine_lib.course.grades.Grades    # in the course folder; notebooks/pages/grading.md

nbgrader's own export gives 0 to both, and to whoever handed in nothing.
"""

import csv
import re
from pathlib import Path
from typing import Any

import nbformat
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.plugins import ExportPlugin

#: nbgrader's columns, and why a score is missing or not final.
COLUMNS = (
    *("assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email"),
    *("raw_score", "late_submission_penalty", "score", "max_score", "note"),
)
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class Grades(ExportPlugin):
    """nbgrader's table with one column more, ``note``; a score that is not known is empty there, not 0."""

    def export(self, gradebook: Gradebook) -> None:
        """Write ``--to FILE``, by default ``grades.csv``, for ``--student`` and ``--assignment``, by default all."""
        with open(self.to or "grades.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            for assignment in gradebook.assignments:
                for student in gradebook.students:
                    if assignment.name in (self.assignment or [assignment.name]) and student.id in (
                        self.student or [student.id]
                    ):
                        table.writerow(self._row(gradebook, assignment, student))

    def _row(self, gradebook: Gradebook, assignment: Any, student: Any) -> dict:
        row = {key: getattr(student, key) for key in ("last_name", "first_name", "email")}
        row |= {"assignment": assignment.name, "student_id": student.id}
        row |= {key: getattr(assignment, key) for key in ("duedate", "max_score")}
        came, graded = (
            Path(self.parent.coursedir.format_path(step, student.id, assignment.name))
            for step in ("submitted", "autograded")
        )
        if not came.is_dir():
            return row | {"raw_score": 0.0, "late_submission_penalty": 0.0, "score": 0.0, "note": "not handed in"}
        if not any(graded.glob("*.ipynb")):
            return row | {"note": f"not graded: {problem(came, assignment.name)}"}
        try:
            submission = gradebook.find_submission(assignment.name, student.id)
        except MissingEntry:
            return row | {"note": "not graded: it is not in the gradebook; grade it again"}
        row |= {"timestamp": submission.timestamp, "late_submission_penalty": submission.late_submission_penalty}
        row |= {"raw_score": submission.score, "score": max(0.0, submission.score - submission.late_submission_penalty)}
        by_hand = sum(grade.needs_manual_grade for one in submission.notebooks for grade in one.grades)
        return row | {"note": f"not final: {by_hand} cells wait to be graded by hand" if by_hand else ""}


def problem(folder: Path, name: str) -> str:
    """Why nbgrader did not grade ``name``.ipynb of a submission's ``folder``, and what to do about it."""
    file = folder / f"{name}.ipynb"
    if not file.is_file():
        others = sorted(path.name for path in folder.glob("*.ipynb"))
        return f"there is no {file.name}" + (f", but {', '.join(others)}: give it back its name" if others else "")
    content = file.read_bytes()
    if content.startswith(_BYTE_ORDER_MARKS):
        return "the file begins with a byte-order mark: save it as UTF-8 without one"
    if re.search(rb"^(<{7}|>{7}) ", content, re.MULTILINE):
        return "there are merge markers in the file: keep one side of each"
    try:
        nbformat.reads(content.decode(), 4)
    except Exception as error:  # nbformat and JSON have many kinds
        return f"the file is no notebook ({str(error).strip().splitlines()[0]})"
    return "the kernel died or the code did not end: nbgrader's log says which"
