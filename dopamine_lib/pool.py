"""Processes of this machine that share out jobs: JSON lines over pipes, so nothing is pickled.

    with WorkerPool("dopamine_lib.reproduction.worker", 2) as pool:
        pool.introduce({"options": ...})
        answers = pool.run([{"run": ["FSCDP", 0]}, ...], advance)

Every worker is a fresh interpreter with one thread for its arithmetic. It hears and says one object a line:

    in   the introduction, then jobs
    out  {"epochs": n} for progress, any number of times in a job; then {"answer": ...}
         or {"wrong input": "..."}, which is raised here as InputError

A worker ends when its standard input does, even in the middle of a job. So none outlives this process, however this
process ends, and none goes on drawing noise that nobody is going to account for.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from dopamine_lib.errors import InputError
from dopamine_lib.machine import GB, cores, memory_size

MOST_WORKERS = 2
#: Memory of one worker: torch, a compiler, some thousand images with their features, what the PRV accountant keeps.
WORKER_MEMORY = GB


def fitting_workers(jobs: int) -> int:
    """How many workers this machine has cores and memory for beside this process, at most one a job."""
    memory = memory_size()
    room = MOST_WORKERS if memory is None else memory // WORKER_MEMORY - 1
    return max(1, min(cores(), jobs, room, MOST_WORKERS))


class WorkerPool:
    """So many processes that run ``module``; a context manager that ends them all, at once, on the way out."""

    def __init__(self, module: str, count: int):
        self._heard: queue.Queue = queue.Queue()  # (worker's number, message); None where a worker ended
        self._processes = [_start(module) for _ in range(count)]
        for number in range(count):
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()

    def introduce(self, message: dict) -> None:
        """Tell every worker what all jobs have in common."""
        for number in range(len(self._processes)):
            self._say(number, message)

    def run(self, jobs: list, advance: Callable[[int], object] = lambda epochs: None) -> list:
        """The answers to ``jobs``, in their order; ``advance`` hears of epochs as they are done.

        Raises InputError where a worker does, RuntimeError where a worker ended.
        """
        answers, doing, waiting = [None] * len(jobs), {}, iter(range(len(jobs)))
        for number in range(len(self._processes)):
            self._next(number, jobs, waiting, doing)
        while doing:
            number, message = self._heard.get()
            if message is None:
                raise RuntimeError("a worker's process has ended; what it said is above")
            if "wrong input" in message:
                raise InputError(message["wrong input"])
            if "epochs" in message:
                advance(message["epochs"])
            else:
                answers[doing.pop(number)] = message["answer"]
                self._next(number, jobs, waiting, doing)
        return answers

    def close(self) -> None:
        """Kill the workers: what they must not lose is on disk already."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # a message that was never read
                process.stdin.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _next(self, number: int, jobs: list, waiting, doing: dict) -> None:
        job = next(waiting, None)
        if job is not None:
            doing[number] = job
            self._say(number, jobs[job])

    def _say(self, number: int, message) -> None:
        try:
            self._processes[number].stdin.write(json.dumps(message) + "\n")
            self._processes[number].stdin.flush()
        except BrokenPipeError:  # _listen tells the same
            pass

    def _listen(self, number: int) -> None:
        with self._processes[number].stdout as lines:
            for line in lines:
                self._heard.put((number, json.loads(line)))
        self._heard.put((number, None))


def _start(module: str) -> subprocess.Popen:
    home = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,  # an interrupt from the keyboard is for this process, which then ends them
    )


class Worker:
    """The other end: reads jobs on standard input, and ends this process when there is no more input."""

    def __init__(self):
        self._out, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not stand between the messages
        self._heard: queue.Queue = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def hear(self) -> dict:
        """The next message."""
        return self._heard.get()

    def say(self, **message) -> None:
        """Tell whoever started this worker."""
        try:
            print(json.dumps(message), file=self._out, flush=True)
        except BrokenPipeError:
            os._exit(1)

    def _listen(self) -> None:
        # unbuffered: a worker that ends by itself must not wait for this thread's hold on a buffer
        with open(0, "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                self._heard.put(json.loads(line))
        os._exit(1)  # nobody is there any more: stop in the middle of whatever this is
