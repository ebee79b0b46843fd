"""A student's page of feedback: points, and for every test that failed its hint, an input and what was expected there.

One HTML file without scripts, pictures or addresses of other machines. What a student's code said is shown as text.
"""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dopamine_lib.course.grading import Graded

_STYLE = (
    "body{max-width:50em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif;color:#222}"
    "code{background:#f3f3f3;padding:0 .2em;overflow-wrap:anywhere}h2,h3{margin-bottom:.2em}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}code{background:#2a2a2a}}"
)


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
    title = f"Homework of {escape(student)}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>'


def _said(number: int, test: object) -> str:
    lines = [f"Test {number} failed" + (f": {escape(test.hint)}" if test.hint else "")]
    lines += [f"<code>{escape(text)}</code>" for text in test.shown]
    if not test.shown and test.error:
        lines.append(f"<code>{escape(test.error)}</code>")
    return f"<li>{'<br>'.join(lines)}</li>"
