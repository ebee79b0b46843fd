"""Calls of a student's functions, which run in a process of the student's own (``dopamine_lib.course.answers``)."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from dopamine_lib.course.wire import LONGEST, pack, unpack
from dopamine_lib.machine import GB
from dopamine_lib.pool import Child

#: Seconds of a processor for one cell, and for all the calls of one test; bytes of memory.
SECONDS, MEMORY = 20.0, 2 * GB
#: Times as long that may pass on a busy machine, or asleep.
_PATIENCE = 4.0
_START = 120.0  # seconds until a fresh interpreter is there, on a busy machine
_LARGEST, _PARTS = 2**26, 10**5  # bytes of one answer, and its numbers outside of arrays
_LONGEST_ERROR = 300  # characters
_UNREADABLE = "what came back cannot be read"


class AnswerError(Exception):
    """An answer stopped, or is none. It is no ValueError: a refusal that was asked for is."""


@dataclass
class Call:
    """A call of a student's function: what it was given, what it gave or why not, and whether it changed the former."""

    name: str
    arguments: Any
    outcome: Any = None
    error: str = ""
    changed: bool = False
    #: The test's own objects among the arguments, which stay with the judge.
    kept: list = field(default_factory=list)

    @property
    def said(self) -> str:
        """The outcome as text, to tell it from others: 0, 0.0 and False are the same."""
        if self.error:
            return f"! {self.error.partition(':')[0]}"
        try:
            return f"{self.outcome:.6g}" if isinstance(self.outcome, int | float) else json.dumps(self.outcome)
        except OverflowError:  # a whole number beyond floats
            return repr(self.outcome)


class _Student(Child):
    """The process of the answers. What it says is taken for nothing but an answer, and only up to a length."""

    late = False

    @contextlib.contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        """Kill it if it is not done by then, whatever it holds up: a message may stop in the middle, too."""

        def kill() -> None:
            self.late = True
            self._process.kill()

        watch = threading.Timer(_PATIENCE * seconds + 1, kill)
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def worked(self) -> float:
        """Seconds for which it has had a processor: a busy machine costs nobody an answer."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:  # it has ended
            return 0.0
        return times.user + times.system

    def hear(self, seconds: float | None = None) -> dict:
        """As ``Child.hear``. Raises TimeoutError once it has worked for ``seconds``, or kept one waiting far longer."""
        begin, end = self.worked(), None if seconds is None else time.monotonic() + _PATIENCE * seconds
        while not self._pipe.poll(None if seconds is None else min(0.5, max(0.0, seconds))):
            if self.worked() - begin >= seconds or time.monotonic() >= end:
                self.late = True
                raise TimeoutError
        try:
            data = self._pipe.recv_bytes(_LARGEST)
        except (OSError, EOFError):
            raise EOFError from None
        if data.count(b",") > _PARTS:  # before anything is made of it: a long list costs the judge seconds in each test
            return {"error": f"an answer of more than {_PARTS} parts"}
        try:
            message = json.loads(data)
            if (
                b"\\u" in data or not data.isascii()
            ):  # halves of characters cannot be written: they become question marks
                message = json.loads(json.dumps(message, ensure_ascii=False).encode(errors="replace"))
        except (ValueError, RecursionError):
            return {"error": _UNREADABLE}
        return message if isinstance(message, dict) else {}


class Answers:
    """A student's functions, at work in a process of their own; a context manager that ends it.

    cells    the code cells of the submission, in order
    seconds  for each cell, and for the calls of one test
    memory   bytes that the process may have
    change   whether what a function changed in its arguments is changed here, too
    """

    def __init__(self, cells: list[str], seconds: float = SECONDS, memory: int = MEMORY, change: bool = False):
        self.cells, self.seconds, self.memory, self.change = list(cells), seconds, memory, change
        #: Why a cell stopped, by its number.
        self.stopped: dict[int, str] = {}
        #: The calls since the test began.
        self.calls: list[Call] = []
        self._given_up: dict[str, str] = {}
        self._left = seconds
        self._child: _Student | None = None

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def begin(self) -> None:
        """A new test begins: its time, and its list of calls."""
        self._left, self.calls = self.seconds, []

    def call(self, name: str, arguments: tuple) -> Any:
        """What the student's function ``name`` gives.

        Raises ValueError where it does, AnswerError where it stops in another way, takes too long, ends its process or
        gives what is no plain data.
        """
        kept: list[Any] = []
        message = pack(list(arguments), lambda value: kept.append(value) or len(kept) - 1)
        call = Call(name, message, kept=kept)
        self.calls.append(call)
        answer = self._ask(name, message, kept)
        if "error" in answer:
            call.error = _error(answer)
            raise (ValueError if answer.get("refused") is True else AnswerError)(call.error)
        call.outcome = answer.get("value")
        try:
            value = unpack(call.outcome)
            for argument, new in zip(arguments, answer["changed"], strict=True):
                call.changed |= new is not None
                if new is not None and self.change:
                    _change(argument, unpack(new[0]))
        except Exception:  # whatever a process may send that has been made to
            call.outcome, call.error = None, _UNREADABLE
            raise AnswerError(call.error) from None
        return value

    def _ask(self, name: str, message: Any, kept: list[Any]) -> dict:
        if name in self._given_up:
            return {"error": self._given_up[name]}
        if self._child is None:
            self._start()
        child, begin = self._child, self._child.worked()
        try:
            with child.watched(self._left):
                child.say({"call": name, "arguments": message})
                while "ask" in (answer := child.hear(self._left + begin - child.worked())):
                    child.say(_do(kept, answer))
                self._left -= max(0.0, child.worked() - begin)
                return answer
        except (TimeoutError, EOFError):
            late = child.late
            self._given_up[name] = f"it took longer than {self.seconds:g} s" if late else "it ended its process"
            self._end()
            return {"error": self._given_up[name]}

    def _start(self) -> None:
        """Run all cells in a fresh process, without those that ended or held up an earlier one."""
        while self._child is None:
            child = _Student("dopamine_lib.course.answers", quiet=True)
            at, limit = None, _START
            try:
                child.say({"memory": self.memory, "cells": self.cells})
                for _ in range(2 * len(self.cells) + 1):  # whoever says more holds up the judge
                    with child.watched(limit):
                        answer = child.hear(limit)
                    if "ready" in answer:
                        break
                    limit = self.seconds
                    if answer.get("cell") in range(len(self.cells)):
                        at = int(answer["cell"])
                        self.stopped |= {at: _error(answer)} if "error" in answer else {}
                else:
                    raise TimeoutError
                self._child = child
            except (TimeoutError, EOFError) as error:
                late = child.late or isinstance(error, TimeoutError)
                child.close()
                if at is None:
                    raise RuntimeError("a fresh process for answers does not start") from error
                self.stopped[at] = f"it took longer than {self.seconds:g} s" if late else "it ended its process"
                self.cells[at] = ""

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
        shapes = {_shape(one) for one in (*arguments, *named.values())}
        if math.prod(max(1, length) for shape in shapes for length in shape) > LONGEST:
            raise TypeError(f"more than {LONGEST} numbers at once")
        return {"value": pack(target(*arguments, **named))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _shape(argument: Any) -> tuple[int, ...]:
    """The shape of what a generator makes of an argument: a size, or numbers that have one.

    >>> _shape(100), _shape((100, 200)), _shape(np.zeros((3, 4))), _shape(0.5)
    ((100,), (100, 200), (3, 4), ())
    """
    if isinstance(argument, int | np.integer):
        return (abs(int(argument)),)
    if isinstance(argument, list | tuple) and all(isinstance(one, int | np.integer) for one in argument):
        return tuple(abs(int(one)) for one in argument)
    return np.shape(argument)


def _error(answer: dict) -> str:
    """Why an answer stopped, in its process's words."""
    return answer["error"][:_LONGEST_ERROR] if isinstance(answer["error"], str) else _UNREADABLE


def _change(argument: Any, new: Any) -> None:
    """Make of a test's argument what the student's function has made of its copy."""
    if isinstance(argument, np.ndarray):
        argument[...] = new
    elif isinstance(argument, list):
        argument[:] = new
    elif isinstance(argument, dict):
        argument.clear()
        argument.update(new)
