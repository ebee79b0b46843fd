"""A student's page of feedback: points, and for every test that failed its hint, an input and what was expected there.

And a page for whoever marks answers in words: each question with its rubric, and what all students wrote. Each is one
HTML file without scripts, pictures or addresses of other machines. What a student wrote is shown as text.
"""

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dopamine_lib.course.grading import Graded

_STYLE = (
    "body{max-width:50em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif;color:#222}"
    "code{background:#f3f3f3;padding:0 .2em;overflow-wrap:anywhere}h2,h3{margin-bottom:.2em}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid #888;padding-left:.7em}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}code{background:#2a2a2a}}"
)
_LONGEST, _WIDE = 10_000, 160  # characters of an answer in words, and of a value
_NUMBERS = 1000  # of an array with several axes that NumPy writes itself


def page(student: str, graded: "list[Graded]") -> str:
    """The page, as HTML."""
    parts = [f"<h1>{escape(student)}</h1>"]
    for one in graded:
        parts.append(f"<h2>{escape(one.assignment or 'Not graded')}</h2>")
        if one.verdicts:
            parts.append(f"<p>{one.score} of {one.most} points</p>")
        parts += [f"<p>{escape(note)}</p>" for note in one.notes]
        for names, why in one.stopped.items():
            parts.append(f"<p><code>{escape(names)}</code>: the cell stopped with <code>{escape(why)}</code></p>")
        for verdict in one.verdicts or ():
            parts.append(f"<h3>{escape(verdict.exercise.title)}: {verdict.points} of {verdict.exercise.points}</h3>")
            failed = [_said(number + 1, test) for number, test in enumerate(verdict.tests) if not test.passed]
            parts.append(f"<ul>{''.join(failed)}</ul>" if failed else "<p>All tests hold.</p>")
        for question, answer in one.answers.items():
            said = f"{question.points} points, by hand" if answer else f"0 of {question.points}, no answer"
            parts.append(f"<h3>{escape(question.title)}: {said}</h3>")
    return _html(f"Homework of {student}", parts)


def page_by_hand(graded: "list[Graded]") -> str:
    """The page for marking by hand, as HTML: by question, not by student, so that all are marked alike."""
    asked = {(one.assignment, question): None for one in graded for question in one.answers}
    parts = ["<h1>To be graded by hand</h1>"] + ["<p>Nothing is.</p>"] * (not asked)
    for assignment, question in asked:
        parts.append(f"<h2>{escape(assignment)}: {escape(question.title)}</h2><pre>{escape(question.rubric)}</pre>")
        for one in graded:
            if answer := one.answers.get(question) if one.assignment == assignment else "":
                parts.append(f"<h3>{escape(one.student)}</h3><pre>{escape(answer[:_LONGEST])}</pre>")
    return _html("To be graded by hand", parts)


def _html(title: str, parts: list[str]) -> str:
    title = escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>'


def _said(number: int, test: object) -> str:
    lines = [f"Test {number} failed" + (f": {escape(test.hint)}" if test.hint else "")]
    lines += [f"<code>{escape(text)}</code>" for text in test.shown]
    if not test.shown and test.error:
        lines.append(f"<code>{escape(test.error)}</code>")
    return f"<li>{'<br>'.join(lines)}</li>"


def show(value: Any) -> str:
    """A value as a short text for feedback.

    >>> show(np.arange(3)), show([0.5, None])
    ('array([0, 1, 2])', '[0.5, None]')
    """
    with np.printoptions(threshold=12, edgeitems=3, precision=8, override_repr=_array):
        text = " ".join(repr(value.item() if isinstance(value, np.generic) else value).split())
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]} … {text[-17:]}"


def _array(value: np.ndarray) -> str:
    """As NumPy writes it, up to a size: of a short side it leaves nothing out, and ten such make a million numbers."""
    if value.size > _NUMBERS and value.ndim > 1:
        return f"{show(value.ravel())} in the shape {value.shape}"
    with np.printoptions(override_repr=None):
        return repr(value)


class Named:
    """Stands in feedback for one of a test's own objects: its name, where it has one."""

    def __init__(self, what: Any):
        name = getattr(what, "__name__", type(what).__name__)
        self._name = "a function" if name == "<lambda>" else name

    def __repr__(self) -> str:
        return self._name
