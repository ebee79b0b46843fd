"""The judge of homework: tests run here, the answers that they test run in another process.

A student's code may do to its interpreter what it likes: give NumPy or ``isinstance`` another meaning, end the process,
define ``passes`` anew. So the judge never runs it. In the tests, which are those of the solved notebook and not of the
submission, a call of a student's function goes to a process of the student's own (``dopamine_lib.course.answers``),
and plain values come back.

An exercise has a point for each test, whatever the others say, with four exceptions. A function that says the same to
everything, where the right answers differ, proves nothing: tests that rest on such functions alone give no points. That
a function refuses bad input counts where it answers good input rightly, once at least. A test whose inputs are always
the same, which can be learned by heart, counts where its functions are right on drawn input, once at least. And where
functions change what
they are given, the solution is still asked on inputs as they were drawn; a test that does not ask it must then hold
once more on inputs as changed, since it may be the one that looks for changes.
"""

import ast
import contextlib
import itertools
import json
import secrets
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dopamine_lib.course.calls import MEMORY, SECONDS, Answers, Call
from dopamine_lib.course.exercises import Exercise, Homework
from dopamine_lib.course.feedback import Named, show
from dopamine_lib.course.wire import pack, unpack
from dopamine_lib.errors import InputError

_SHOWN, _LOOKED_AT = 2, 50  # calls of a failed test that are shown, and looked at
_ASKED_EVERY_YEAR = "its input is the same every year, so it counts only where drawn input is answered rightly"


@dataclass
class Test:
    """One test of an exercise: whether it holds, its hint, why it stopped, its calls, those to show.

    asks_right  whether it compares with the solution
    """

    passed: bool
    hint: str = ""
    error: str = ""
    calls: list[Call] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    asks_right: bool = False


@dataclass
class Verdict:
    """What one exercise earned, and its tests."""

    exercise: Exercise
    tests: list[Test]

    @property
    def points(self) -> int:
        """A point for each test that holds."""
        return sum(test.passed for test in self.tests)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stop what takes this process more processor time: a test that counts up to an answer, say.

    It works in the main thread of Linux and macOS; elsewhere there is no such limit. Raises TimeoutError.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"the test took longer than {seconds:g} s with this answer")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run_tests(
    test: str,
    names: dict[str, Any],
    begin: Callable[[], None],
    calls: Callable[[], list[Call]],
    seconds: float = SECONDS,
) -> list[Test]:
    """The tests of a cell: each ``assert`` and each ``passes`` is one, and none stops another.

    test   the cell's source; names  what it works with, ``passes`` excepted
    begin  is told where a new test begins; calls  gives the calls since then
    seconds  of processor time for each
    """
    found: list[Test] = []

    def passes(check: Callable[[], object], hint: str = "") -> int:
        try:
            with within(seconds):
                passed, error = bool(check()), ""
        except Exception as stop:
            passed, error = False, f"{type(stop).__name__}: {stop}"
        asks = any(isinstance(node, ast.Name) and node.id == "right" for node in ast.walk(statement))
        found.append(Test(passed, hint, error, calls(), asks_right=asks))
        begin()
        return int(passed)

    names["passes"] = passes
    begin()
    for statement in ast.parse(test).body:
        if isinstance(statement, ast.Assert):
            check = compile(ast.Expression(statement.test), "test", "eval")
            passes(lambda check=check: eval(check, names))
        else:
            try:
                exec(compile(ast.Module([statement], []), "test", "exec"), names)
            except Exception:  # the test that needs what is missing now says so
                continue
    return found


class Judge:
    """Judges submissions of one homework, all on the same inputs, which are drawn anew when it is made.

    Raises InputError where the solution itself does not pass: then the notebook is wrong, not a student.
    """

    def __init__(self, homework: Homework):
        self.homework, self._seed = homework, secrets.randbits(62)
        self._right = vars(homework.right())
        recorded: list[Call] = []

        def record(name: str, arguments: tuple) -> Any:
            recorded.append(call := Call(name, json.dumps(pack(list(arguments), lambda value: 0))))
            try:
                value = self._right[name](*arguments)
            except Exception as error:
                call.error = type(error).__name__
                raise
            call.outcome = pack(value)
            return value

        self._vary: dict[str, set[str]] = {}
        self._valued: dict[str, set[str]] = {}
        self._drawn: dict[str, list[bool]] = {}
        asked = [
            [[[(call.name, call.arguments) for call in test.calls] for test in verdict.tests] for verdict in verdicts]
            for verdicts in (self._verdicts(record, recorded.clear, recorded.copy, seed) for seed in (1, 2))
        ]
        for verdict, *calls in zip(self._verdicts(record, recorded.clear, recorded.copy), *asked, strict=True):
            exercise = verdict.exercise
            self._drawn[exercise.name] = [one != other for one, other in zip(*calls, strict=True)]
            if same := {call.name for test in verdict.tests for call in test.calls} - self._proven(verdict):
                raise InputError(
                    f"{homework.name}: {exercise.name} asks {min(same)} the same every time; draw its input"
                )
            if not verdict.points == len(verdict.tests) == exercise.points:
                passed = f"{verdict.points} of {len(verdict.tests)} tests, for {exercise.points} points"
                raise InputError(f"{homework.name}: the solution of {exercise.name} passes {passed}; correct it")
            self._vary[exercise.name] = _varying(verdict)
            self._valued[exercise.name] = _answering(verdict)

    def judge(self, cells: list[str], seconds: float = SECONDS, memory: int = MEMORY) -> tuple[list[Verdict], dict]:
        """The verdict on each exercise, and why cells stopped, by their number, for a submission's code cells."""
        _, setup = self.homework.begin(0)  # the judge's own numbers are not for students
        first = len(setup)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what tests compute from wrong answers
            with Answers([*setup, *cells], seconds, memory) as answers:
                verdicts = self._verdicts(answers.call, answers.begin, lambda: answers.calls, seconds=seconds)
            if any(call.changed for verdict in verdicts for test in verdict.tests for call in test.calls):
                with Answers([*setup, *cells], seconds, memory, change=True) as again:
                    changed = self._verdicts(again.call, again.begin, lambda: again.calls, seconds=seconds)
                for verdict, other in zip(verdicts, changed, strict=True):
                    for test, same in zip(verdict.tests, other.tests, strict=False):
                        if test.passed and not (same.passed or test.asks_right):
                            names = sorted({call.name for call in test.calls if call.changed}) or ["a function"]
                            change = "changes what it is given" if len(names) == 1 else "change what they are given"
                            test.passed, test.error = False, f"{' and '.join(names)} {change}: work on a copy"
            for verdict in verdicts:
                self._doubt(verdict)
                self._explain(verdict)
        return verdicts, {number - first: why for number, why in answers.stopped.items() if number >= first}

    def _verdicts(
        self,
        call: Callable,
        begin: Callable[[], None],
        calls: Callable[[], list[Call]],
        seed: int | None = None,
        seconds: float = SECONDS,
    ) -> list[Verdict]:
        """All tests, on ``call(name, arguments)`` in the place of the functions that they test."""
        names, _ = self.homework.begin(self._seed if seed is None else seed)
        verdicts = []
        for exercise in self.homework.exercises:
            names |= {name: lambda *given, name=name: call(name, given) for name in exercise.functions}
            verdicts.append(Verdict(exercise, run_tests(exercise.test, names, begin, calls, seconds)))
        return verdicts

    def _doubt(self, verdict: Verdict) -> None:
        """Take away what the same answer to everything earned, and refusals of what is answered wrongly."""
        idle = self._vary[verdict.exercise.name] - _varying(verdict)
        for test in verdict.tests:
            asked = self._vary[verdict.exercise.name].intersection(call.name for call in test.calls)
            if test.passed and asked and asked <= idle:
                test.passed, test.error = False, "the same answer to everything proves nothing"
        proven = self._proven(verdict)
        for test, fresh in zip(verdict.tests, self._drawn[verdict.exercise.name], strict=False):
            if test.passed and not fresh and not {call.name for call in test.calls} <= proven:
                test.passed, test.error = False, _ASKED_EVERY_YEAR
        unproven = self._valued[verdict.exercise.name] - _answering(verdict)
        for test in verdict.tests:
            refusing = all(call.error for call in test.calls)
            if test.passed and refusing and unproven.intersection(call.name for call in test.calls):
                test.passed, test.error = False, "a refusal counts where good input is answered rightly"

    def _proven(self, verdict: Verdict) -> set[str]:
        """The functions asked in a test that holds and whose inputs are drawn."""
        drawn = self._drawn[verdict.exercise.name]
        held = (test for test, fresh in zip(verdict.tests, drawn, strict=False) if fresh and test.passed)
        return {call.name for test in held for call in test.calls}

    def _explain(self, verdict: Verdict) -> None:
        """Say of failed tests on which input an answer differs from the solution's."""
        for test in verdict.tests:
            if not test.passed:
                said = filter(None, map(self._difference, test.calls[:_LOOKED_AT]))
                test.shown = list(itertools.islice(said, _SHOWN))

    def _difference(self, call: Call) -> str:
        if '"generator"' in json.dumps(call.arguments):
            return f"{call.name}(…): found {call.error or show(unpack(call.outcome))}"  # chance has no right value
        text = f"{call.name}({', '.join(map(show, unpack(call.arguments, lambda at: Named(call.kept[at]))))})"
        expected, right = self._expected(call)
        again, other = self._expected(call) if call.kept else (expected, right)
        if expected != again or not alike(other, right):  # what depends on chance has no right value
            return f"{text}: {call.error}" if call.error else ""
        if call.error:
            same = bool(expected) and call.error.startswith(expected.removeprefix("a "))
        else:
            same = not expected and alike(unpack(call.outcome), right)
        found = call.error or ("" if same else show(unpack(call.outcome)))
        if call.error.startswith("NotImplementedError"):
            found = "no answer yet"
        return "" if same else f"{text}: expected {expected or show(right)}, found {found}"

    def _expected(self, call: Call) -> tuple[str, Any]:
        """The error that the solution ends in, "" for none, and what it gives."""
        try:
            with within(SECONDS):
                return "", self._right[call.name](*unpack(call.arguments, call.kept.__getitem__))
        except Exception as error:
            return f"a {type(error).__name__}", None


def alike(found: Any, right: Any) -> bool:
    """Whether two answers agree, up to rounding.

    >>> alike((1, [0.1 + 0.2]), (1, [0.3])), alike([1], (1,))
    (True, False)
    """
    if isinstance(right, tuple | list):
        return type(found) is type(right) and len(found) == len(right) and all(map(alike, found, right))
    if isinstance(right, dict):
        same = isinstance(found, dict) and found.keys() == right.keys()
        return same and all(alike(found[key], right[key]) for key in right)
    try:
        found, right = np.asarray(found), np.asarray(right)
        return found.shape == right.shape and np.allclose(found, right, rtol=1e-9, atol=1e-12, equal_nan=True)
    except (TypeError, ValueError, OverflowError):
        return bool(np.array_equal(found, right))


def _answering(verdict: Verdict) -> set[str]:
    """The functions that gave an answer in a test that holds."""
    return {call.name for test in verdict.tests if test.passed for call in test.calls if not call.error}


def _varying(verdict: Verdict) -> set[str]:
    """The functions that gave different answers in an exercise's tests."""
    said: dict[str, set[str]] = {}
    for test in verdict.tests:
        for call in test.calls:
            said.setdefault(call.name, set()).add(call.said)
    return {name for name, answers in said.items() if len(answers) > 1}
