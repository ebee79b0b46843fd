"""Child processes that speak JSON, and a pool of them that shares out jobs.

    with WorkerPool(shared_jobs, 2) as pool:
        pool.introduce({"options": ...})
        answers = pool.run([{"run": ["FSCDP", 0]}, ...], advance)

A ``Child`` is a fresh interpreter, and ``Parent`` is its view of the process that started it. Between the two lies a
pipe of its own: what a library prints goes to standard error and never stands between the messages. A message is one
JSON object or an array's bytes, so nothing is pickled, as concurrent.futures and joblib would, and no secret stands in
an argument or in the environment. The pipe ends when the parent does, however it ends, and the child with it: none
outlives its parent, and none goes on drawing noise that nobody is going to account for.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING

from dopamine_lib.errors import InputError
from dopamine_lib.machine import GB, cores, memory_size

if TYPE_CHECKING:
    import numpy as np  # the command line starts without it

MAX_WORKERS = 2
#: Memory of one worker: torch, a compiler, some thousand images with their features, what the PRV accountant keeps.
WORKER_MEMORY = GB
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
#: ``python -m`` for an environment that the kit is not installed in; its path names the kit last.
ELSEWHERE = "import runpy, sys; sys.path.append({home!r}); runpy.run_module({module!r}, None, '__main__', True)"


class Child:
    """``python -m module words … DESCRIPTOR`` as a process with one thread for its arithmetic.

    quiet   drop what it prints; otherwise that goes to this process's standard error
    python  another environment's Python, at least 3.11, whose packages stand before those beside the kit
    """

    def __init__(self, module: str, *words: str, quiet: bool = False, python: str | None = None):
        home = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        # -P: a student's random.py beside the notebook is not Python's
        start = [sys.executable, "-P", "-m", module]
        if python is not None:  # -I reads no environment variables: what one of them forbids is said again
            silent = ["-B"] if sys.dont_write_bytecode else []
            start = [python, "-I", *silent, "-c", ELSEWHERE.format(home=home, module=module)]
        self._pipe, its = Pipe()
        with its:
            self._process = subprocess.Popen(
                [*start, *words, str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if quiet else 2,
                stderr=subprocess.DEVNULL if quiet else 2,
                env=os.environ | ONE_THREAD | {"PYTHONPATH": path},
                pass_fds=[its.fileno()],
                start_new_session=True,  # an interrupt from the keyboard is for this process, which then ends its own
            )

    def say(self, message: dict) -> None:
        """Send it one object. Where it has ended, ``hear`` says so: its last words may explain why."""
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(json.dumps(message).encode())

    def hear(self, timeout: float | None = None) -> dict:
        """Its next object.

        Raises InputError where the child found bad input, and EOFError where it has ended; a child that says nothing
        for ``timeout`` seconds is killed first.
        """
        try:
            if not self._pipe.poll(timeout):
                self._process.kill()
            message = json.loads(self._pipe.recv_bytes())
        except OSError as error:  # it ended in the middle of a message, or was ended from here
            raise EOFError(str(error)) from None
        if "wrong input" in message:
            raise InputError(message["wrong input"])
        return message

    def take(self, out: "np.ndarray") -> "np.ndarray":
        """Fill an array with the bytes that ``Parent.give`` sends next; returns it. Raises EOFError like ``hear``."""
        try:
            self._pipe.recv_bytes_into(memoryview(out).cast("B"))
        except OSError as error:
            raise EOFError(str(error)) from None
        return out

    def fileno(self) -> int:
        """The pipe's descriptor, so that one can ``wait`` for several children."""
        return self._pipe.fileno()

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def close(self, patience: float = 0.0) -> None:
        """End it: after ``patience`` seconds, or at a second interrupt, by force. May be called twice."""
        self._pipe.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        finally:
            self._process.kill()
            self._process.wait()


def close_all(children: Iterable[Child], patience: float = 0.0) -> None:
    """Close every child, the last one first, also where an interrupt arrives meanwhile."""
    with contextlib.ExitStack() as stack:
        for child in children:
            stack.callback(child.close, patience)


class Parent:
    """The other end, in the child. When the parent ends, so does this process.

    grace  seconds between the two, for a farewell; with 0 the process stops in the middle of whatever it does
    """

    def __init__(self, descriptor: int, grace: float = 0.0):
        os.set_inheritable(descriptor, False)  # else a process started from here would keep the pipe open
        self._pipe, self._heard = Connection(descriptor), queue.Queue()
        threading.Thread(target=self._listen, args=(grace,), daemon=True).start()

    def hear(self) -> dict:
        """The next object. Raises EOFError where the parent has ended."""
        message = self._heard.get()
        if message is None:
            raise EOFError("the parent has ended")
        return message

    def say(self, **message: object) -> None:
        """Send the parent one object; "wrong input" becomes an InputError there. Raises EOFError like ``hear``."""
        try:
            self._pipe.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise EOFError("the parent has ended") from error

    def give(self, array: "np.ndarray") -> None:
        """Send the parent an array's bytes. Raises EOFError like ``hear``."""
        try:
            self._pipe.send_bytes(array.tobytes())
        except OSError as error:
            raise EOFError("the parent has ended") from error

    def _listen(self, grace: float) -> None:
        try:
            while True:
                self._heard.put(json.loads(self._pipe.recv_bytes()))
        finally:  # whatever ended it: a process that no longer listens would never end
            self._heard.put(None)
            time.sleep(grace)
            os._exit(1)


def fitting_workers(jobs: int) -> int:
    """How many workers this machine has cores and memory for beside this process, at most one per job."""
    memory = memory_size()
    fitting = MAX_WORKERS if memory is None else memory // WORKER_MEMORY - 1
    return max(1, min(cores(), jobs, fitting, MAX_WORKERS))


class WorkerPool:
    """``count`` processes that do the jobs of ``work``; a context manager that ends them all on the way out.

    work  a function of a module: ``work(introduction)`` is a context manager that gives ``do(job, advance)``, whose
          answer is plain data; ``advance(n)`` reports n more epochs
    """

    def __init__(self, work: Callable, count: int):
        self._children = []
        try:
            for _ in range(count):
                self._children.append(Child(__name__, f"{work.__module__}:{work.__qualname__}"))
        except BaseException:  # an interrupt, or no memory for another process
            self.close()
            raise

    def introduce(self, message: dict) -> None:
        """Tell every worker what all jobs have in common."""
        for child in self._children:
            child.say(message)

    def run(self, jobs: list, advance: Callable[[int], object] = lambda epochs: None) -> list:
        """The answers to ``jobs``, in their order; ``advance`` hears of epochs as they are done.

        Raises InputError where a worker does, RuntimeError where a worker ended.
        """
        answers, waiting, doing = [None] * len(jobs), iter(enumerate(jobs)), {}

        def give(child: Child) -> None:
            for number, job in waiting:  # the next one, if there is one
                doing[child] = number
                child.say(job)
                return

        for child in self._children:
            give(child)
        while doing:
            for child in wait(list(doing)):
                try:
                    message = child.hear()
                except EOFError:
                    raise RuntimeError("a worker's process has ended; what it said is above") from None
                if "epochs" in message:
                    advance(message["epochs"])
                else:
                    answers[doing.pop(child)] = message["answer"]
                    give(child)
        return answers

    def close(self) -> None:
        """Kill the workers: what they must not lose is on disk already."""
        close_all(self._children)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(work: str, descriptor: str) -> None:
    """One worker of a pool: do one job after another until the parent ends."""
    sys.path.append("")  # where modules of the user's own lie, behind Python's
    parent = Parent(int(descriptor))
    module, _, name = work.partition(":")
    begin = getattr(importlib.import_module(module), name)
    try:
        with begin(parent.hear()) as do:
            while True:
                parent.say(answer=do(parent.hear(), lambda epochs: parent.say(epochs=epochs)))
    except InputError as error:
        parent.say(**{"wrong input": str(error)})
    except EOFError:  # the parent has ended, and so do we
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
