"""The process in which a student's code runs, and nothing else does: it holds no tests, no solutions and no marks.

    python -m dopamine_lib.course.answers DESCRIPTOR

The judge (``dopamine_lib.course.judge``) sends the cells of a notebook first and then one call after another. Before
the first cell this process gives up what an answer does not need (``dopamine_lib.course.sandbox``).
"""

import os
import sys
import warnings
from typing import Any

from dopamine_lib.course.sandbox import confine, lock
from dopamine_lib.course.wire import pack, unpack
from dopamine_lib.pool import Parent

_LONGEST = 300  # characters of a message in feedback


def main(descriptor: str) -> None:
    """Run the judge's cells, then answer its calls until it ends."""
    confine()  # before the thread that listens to the judge, which an answer can make run its code
    parent = Parent(int(descriptor))
    first = parent.hear()
    os.environ.clear()  # an answer is shown in feedback: nothing of the instructor's may be in it
    os.chdir("/")
    lock(first["memory"])
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", RuntimeWarning)  # NumPy's: what divides by zero is no answer
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(first["cells"]):
        parent.say(cell=number)
        try:
            exec(compile(source, f"cell {number + 1}", "exec"), names)
        except BaseException as error:  # also SystemExit: the next cell may be an answer
            parent.say(cell=number, error=_said(error))
    parent.say(ready=True)
    while True:
        request = parent.hear()
        arguments = unpack(request["arguments"], lambda number: Remote(parent, number))
        try:
            if request["call"] not in names:
                raise NameError("there is no function of this name")
            value = pack(names[request["call"]](*arguments))
        except BaseException as error:
            parent.say(error=_said(error), refused=isinstance(error, ValueError))
            continue
        after = [_plain(argument) for argument in arguments]
        same = [one is None or one == other for one, other in zip(after, request["arguments"], strict=True)]
        parent.say(value=value, changed=[None if kept else [one] for kept, one in zip(same, after, strict=True)])


class Remote:
    """A function or object that stays with the judge: calling it, or a method of it, asks there."""

    def __init__(self, parent: Parent, number: int, method: str = ""):
        self._parent, self._number, self._method = parent, number, method

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the judge's function gives."""
        self._parent.say(ask=self._number, method=self._method, arguments=pack(list(arguments)), named=pack(named))
        answer = self._parent.hear()
        if "error" in answer:
            raise TypeError(answer["error"])
        return unpack(answer["value"])

    def __getattr__(self, name: str) -> "Remote":
        return Remote(self._parent, self._number, name)


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_LONGEST]
    except BaseException:  # an exception of the student's own, whose text is an error
        return type(error).__name__


def _plain(argument: Any) -> Any:
    try:
        return pack(argument)
    except TypeError:  # one of the judge's objects
        return None


if __name__ == "__main__":
    main(sys.argv[1])
