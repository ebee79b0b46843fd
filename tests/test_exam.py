"""The exam: a question for each outcome of the instructors' page, points that add up, and solutions that compute."""

import doctest
import re

from readme import REPOSITORY

from dopamine_lib.course import site
from dopamine_lib.course.exercises import SOURCES

EXAM, SOLVED = SOURCES / "EXAM.md", SOURCES / "EXAM_SOLUTIONS.md"
OUTCOME = re.compile(r"^\| (?:\[\d+\]\([^)]+\))? ?\| ([^|]+) \|", re.MULTILINE)


def questions() -> list[tuple[str, int, str, str]]:
    """Number, points, outcome and text of each question."""
    found = re.findall(r"^\*\*(\d+)\.\*\* \((\d+) points: \*([^*]+)\*\)\n(.+)$", EXAM.read_text("utf-8"), re.MULTILINE)
    return [(number, int(points), outcome, text) for number, points, outcome, text in found]


def solutions() -> dict[str, tuple[int, str]]:
    """By number, the points and the text of a solution."""
    parts = re.split(r"^\*\*(\d+)\.\*\* \((\d+) points", SOLVED.read_text("utf-8"), flags=re.MULTILINE)
    return {number: (int(points), text) for number, points, text in zip(*[iter(parts[1:])] * 3, strict=True)}


def test_there_is_a_question_for_each_outcome_in_their_order():
    page = (REPOSITORY / "notebooks" / "INSTRUCTORS.md").read_text("utf-8")
    outcomes = OUTCOME.findall(page.partition("## Twelve weeks")[0])
    asked = questions()
    assert [outcome for _, _, outcome, _ in asked] == [outcome for outcome in outcomes if outcome.strip("- ")]
    assert [number for number, *_ in asked] == [str(n) for n in range(1, len(asked) + 1)]


def test_points_add_up():
    told = solutions()
    assert {number: points for number, points, *_ in questions()} == {n: points for n, (points, _) in told.items()}
    assert f"worth {sum(points for _, points, *_ in questions())} points" in EXAM.read_text("utf-8")
    for points, text in told.values():
        parts = re.findall(r"\([a-c](?: and [a-c])?, (\d)\)", text)
        assert not parts or sum(map(int, parts)) == points, text[:80]


def test_every_part_of_a_question_is_answered():
    told = solutions()
    for number, _, _, text in questions():
        parts = set(re.findall(r"\(([a-d])\)", text))
        if parts and "one each" not in told[number][1][:20]:
            answered = set("".join(re.findall(r"\(([a-d](?: and [a-d])?)[,)]", told[number][1])).replace(" and ", ""))
            assert parts - answered == set(), f"question {number}: {parts - answered}"


def test_what_the_solutions_compute_is_what_they_say():
    done = doctest.testfile(str(SOLVED), module_relative=False, encoding="utf-8")
    assert done.failed == 0 and done.attempted > 30


def test_neither_lies_where_students_look(tmp_path):
    site._gather(tmp_path / "source")
    assert list((tmp_path / "source").rglob("NOTATION.md")) and not list((tmp_path / "source").rglob("EXAM*"))
    assert f"rm -r {SOURCES.relative_to(REPOSITORY).as_posix()}" in (REPOSITORY / "binder" / "postBuild").read_text(
        "utf-8"
    )


def test_long_numbers_in_the_text_stand_in_the_code_beside_it():
    """Of three digits or more, in a solution that computes at all; what was given in the question needs no code."""
    given = {number: text for number, _, _, text in questions()}
    for number, (_, text) in solutions().items():
        code = "".join(re.findall(r"^    .*\n", text, re.MULTILINE))
        prose = re.sub(r"^    .*\n|\$[^$]*\$", "", text, flags=re.MULTILINE)  # and formulas
        said = {one.replace(",", "").strip(".") for one in re.findall(r"\d[\d,.]*", prose)}
        known = (code + given[number]).replace(",", "")
        assert not [one for one in said if len(one.replace(".", "")) > 2 and one not in known], number
