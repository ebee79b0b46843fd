"""The judge of homework: tests run here, the answers that they test run in another process.

A student's code may do to its interpreter what it likes: give NumPy or ``isinstance`` another meaning, end the process,
define ``passes`` anew. So the judge never runs it. In the tests, which are those of the solved notebook and not of the
submission, a call of a student's function goes to a process of the student's own (``dopamine_lib.course.answers``),
and plain values come back.

An exercise has a point for each test, whatever the others say. Only a function that says the same to everything, where
the right answers differ, proves nothing: tests that rest on such functions alone give no points.
"""

import ast
import json
import secrets
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dopamine_lib.course.exercises import Exercise, Homework
from dopamine_lib.course.wire import pack, unpack
from dopamine_lib.errors import InputError
from dopamine_lib.machine import GB
from dopamine_lib.pool import Child

#: Seconds for one cell, and for all the calls of one test; bytes of memory; bytes of one answer.
SECONDS, MEMORY, LONGEST = 20.0, 2 * GB, 2**26
_START = 120.0  # seconds until a fresh interpreter is there, on a busy machine
_SHOWN, _LOOKED_AT, _WIDE = 2, 50, 160  # calls of a failed test that are shown, and looked at; their characters
_MOST_NUMBERS = 10**7  # that an answer may ask a generator for at once


class AnswerError(Exception):
    """An answer stopped, or is none. It is no ValueError: a refusal that was asked for is."""


@dataclass
class Call:
    """A call of a student's function: its name, what it was given, and what it gave or why it stopped."""

    name: str
    arguments: Any
    outcome: Any = None
    error: str = ""

    @property
    def said(self) -> str:
        """The outcome as text, to tell it from others: 0, 0.0 and False are the same."""
        if self.error:
            return f"! {self.error.partition(':')[0]}"
        return f"{self.outcome:.6g}" if isinstance(self.outcome, int | float) else json.dumps(self.outcome)


@dataclass
class Test:
    """One test of an exercise: whether it holds, its hint, why it stopped, its calls, and those to show."""

    passed: bool
    hint: str = ""
    error: str = ""
    calls: list[Call] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """What one exercise earned, and its tests."""

    exercise: Exercise
    tests: list[Test]

    @property
    def points(self) -> int:
        """A point for each test that holds."""
        return sum(test.passed for test in self.tests)


class _Student(Child):
    """The process of the answers. What it says is taken for nothing but an answer, and only up to a length."""

    def hear(self, timeout: float | None = None) -> dict:
        if not self._pipe.poll(timeout):
            raise TimeoutError
        try:
            message = json.loads(self._pipe.recv_bytes(LONGEST))
        except (OSError, EOFError):
            raise EOFError from None
        except (ValueError, RecursionError):
            return {"error": "what came back cannot be read"}
        return message if isinstance(message, dict) else {}


class Answers:
    """A student's functions, at work in a process of their own; a context manager that ends it.

    cells    the code cells of the submission, in order
    seconds  for each cell, and for the calls of one test
    memory   bytes that the process may have
    """

    def __init__(self, cells: list[str], seconds: float = SECONDS, memory: int = MEMORY):
        self.cells, self.seconds, self.memory = list(cells), seconds, memory
        #: Why a cell stopped, by its number.
        self.stopped: dict[int, str] = {}
        #: The calls since the test began.
        self.calls: list[Call] = []
        self._given_up: dict[str, str] = {}
        self._deadline = 0.0
        self._child: _Student | None = None

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def begin(self) -> None:
        """A new test begins: its time, and its list of calls."""
        self._deadline, self.calls = time.monotonic() + self.seconds, []

    def call(self, name: str, arguments: tuple) -> Any:
        """What the student's function ``name`` gives; what it changed in ``arguments`` is changed there.

        Raises ValueError where it does, AnswerError where it stops in another way, takes too long, ends its process or
        gives what is no plain data.
        """
        kept: list[Any] = []
        message = pack(list(arguments), lambda value: kept.append(value) or len(kept) - 1)
        call = Call(name, message)
        self.calls.append(call)
        answer = self._ask(name, message, kept)
        if "error" in answer:
            call.error = str(answer["error"])
            raise (ValueError if answer.get("refused") is True else AnswerError)(call.error)
        call.outcome = answer.get("value")
        try:
            value = unpack(call.outcome)
            for argument, new in zip(arguments, answer["changed"], strict=True):
                if new is not None:
                    _change(argument, unpack(new[0]))
        except Exception:  # whatever a process may send that has been made to
            call.outcome, call.error = None, "what came back cannot be read"
            raise AnswerError(call.error) from None
        return value

    def _ask(self, name: str, message: Any, kept: list[Any]) -> dict:
        if name in self._given_up:
            return {"error": self._given_up[name]}
        if self._child is None:
            self._start()
        self._child.say({"call": name, "arguments": message})
        try:
            while True:
                answer = self._child.hear(max(0.0, self._deadline - time.monotonic()))
                if "ask" not in answer:
                    return answer
                self._child.say(_do(kept, answer))
        except (TimeoutError, EOFError) as error:
            late = isinstance(error, TimeoutError)
            self._given_up[name] = f"it took longer than {self.seconds:g} s" if late else "it ended its process"
            self._end()
            return {"error": self._given_up[name]}

    def _start(self) -> None:
        """Run all cells in a fresh process, without those that ended or held up an earlier one."""
        since = time.monotonic()
        while self._child is None:
            child = _Student("dopamine_lib.course.answers", quiet=True)
            child.say({"memory": self.memory, "cells": self.cells})
            at, limit = None, _START
            try:
                while "ready" not in (answer := child.hear(limit)):
                    limit = self.seconds
                    if answer.get("cell") in range(len(self.cells)):
                        at = int(answer["cell"])
                        self.stopped |= {at: str(answer["error"])} if "error" in answer else {}
                self._child = child
            except (TimeoutError, EOFError) as error:
                child.close()
                if at is None:
                    raise RuntimeError("a fresh process for answers does not start") from error
                late = isinstance(error, TimeoutError)
                self.stopped[at] = f"it took longer than {self.seconds:g} s" if late else "it ended its process"
                self.cells[at] = ""
        self._deadline += time.monotonic() - since

    def _end(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None


def _do(kept: list[Any], request: dict) -> dict:
    """Call an object of a test's for an answer: a method with a public name, on plain data, for plain data."""
    try:
        target, method = kept[request["ask"]], request["method"]
        if method:
            if method.startswith("_"):
                raise TypeError(f"{method} is not for answers")
            target = getattr(target, method)
        arguments, named = unpack(request["arguments"]), unpack(request["named"])
        if any(isinstance(one, int) and abs(one) > _MOST_NUMBERS for one in [*arguments, *named.values()]):
            raise TypeError(f"more than {_MOST_NUMBERS} numbers at once")
        return {"value": pack(target(*arguments, **named))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _change(argument: Any, new: Any) -> None:
    """Make of a test's argument what the student's function has made of its copy."""
    if isinstance(argument, np.ndarray):
        argument[...] = new
    elif isinstance(argument, list):
        argument[:] = new
    elif isinstance(argument, dict):
        argument.clear()
        argument.update(new)


def run_tests(
    test: str, names: dict[str, Any], begin: Callable[[], None], calls: Callable[[], list[Call]]
) -> list[Test]:
    """The tests of a cell: each ``assert`` and each ``passes`` is one, and none stops another.

    test   the cell's source; names  what it works with, ``passes`` excepted
    begin  is told where a new test begins; calls  gives the calls since then
    """
    found: list[Test] = []

    def passes(check: Callable[[], object], hint: str = "") -> int:
        try:
            passed, error = bool(check()), ""
        except Exception as stop:
            passed, error = False, f"{type(stop).__name__}: {stop}"
        found.append(Test(passed, hint, error, calls()))
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
            recorded.append(call := Call(name, None))
            try:
                value = self._right[name](*arguments)
            except Exception as error:
                call.error = type(error).__name__
                raise
            call.outcome = pack(value)
            return value

        self._vary: dict[str, set[str]] = {}
        for verdict in self._verdicts(record, recorded.clear, recorded.copy):
            exercise = verdict.exercise
            if not verdict.points == len(verdict.tests) == exercise.points:
                passed = f"{verdict.points} of {len(verdict.tests)} tests, for {exercise.points} points"
                raise InputError(f"{homework.name}: the solution of {exercise.name} passes {passed}; correct it")
            self._vary[exercise.name] = _varying(verdict)

    def judge(self, cells: list[str], seconds: float = SECONDS, memory: int = MEMORY) -> tuple[list[Verdict], dict]:
        """The verdict on each exercise, and why cells stopped, by their number, for a submission's code cells."""
        _, setup = self.homework.begin(0)  # the judge's own numbers are not for students
        first = len(setup)
        with Answers([*setup, *cells], seconds, memory) as answers, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what tests compute from wrong answers
            verdicts = self._verdicts(answers.call, answers.begin, lambda: answers.calls)
            for verdict in verdicts:
                idle = self._vary[verdict.exercise.name] - _varying(verdict)
                for test in verdict.tests:
                    if test.passed and {call.name for call in test.calls} <= idle:
                        test.passed, test.error = False, "the same answer to everything proves nothing"
                self._explain(verdict)
        return verdicts, {number - first: why for number, why in answers.stopped.items() if number >= first}

    def _verdicts(self, call: Callable, begin: Callable[[], None], calls: Callable[[], list[Call]]) -> list[Verdict]:
        """All tests, on ``call(name, arguments)`` in the place of the functions that they test."""
        names, _ = self.homework.begin(self._seed)
        verdicts = []
        for exercise in self.homework.exercises:
            names |= {name: lambda *given, name=name: call(name, given) for name in exercise.functions}
            verdicts.append(Verdict(exercise, run_tests(exercise.test, names, begin, calls)))
        return verdicts

    def _explain(self, verdict: Verdict) -> None:
        """Say of failed tests on which input an answer differs from the solution's."""
        for test in verdict.tests:
            if not test.passed:
                said = [text for call in test.calls[:_LOOKED_AT] if (text := self._difference(call))]
                test.shown = said[:_SHOWN]

    def _difference(self, call: Call) -> str:
        try:
            given = unpack(call.arguments)
            text = f"{call.name}({', '.join(map(show, given))})"
        except ValueError:  # the test's own objects are not shown, and what depends on chance has no right value
            return f"{call.name}(…): {call.error}" if call.error else ""
        try:
            right, expected = self._right[call.name](*given), ""
        except Exception as error:
            right, expected = None, f"a {type(error).__name__}"
        if call.error:
            same = bool(expected) and call.error.startswith(expected.removeprefix("a "))
        else:
            same = not expected and alike(unpack(call.outcome), right)
        found = call.error or ("" if same else show(unpack(call.outcome)))
        return "" if same else f"{text}: expected {expected or show(right)}, found {found}"


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
    except (TypeError, ValueError):
        return bool(np.array_equal(found, right))


def show(value: Any) -> str:
    """A value as a short text for feedback.

    >>> show(np.arange(3)), show([0.5, None])
    ('array([0, 1, 2])', '[0.5, None]')
    """
    with np.printoptions(threshold=12, edgeitems=3, precision=8):
        text = " ".join(repr(value.item() if isinstance(value, np.generic) else value).split())
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 20]} … {text[-17:]}"


def _varying(verdict: Verdict) -> set[str]:
    """The functions that gave different answers in an exercise's tests."""
    said: dict[str, set[str]] = {}
    for test in verdict.tests:
        for call in test.calls:
            said.setdefault(call.name, set()).add(call.said)
    return {name for name, answers in said.items() if len(answers) > 1}
