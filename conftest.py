"""Every notebook that pytest runs is measured: minutes, and the memory of its kernel and of all that it starts.

A table of them ends the run, beside what is promised. Memory is a promise that is checked here, Binder's ceiling;
minutes depend on what else the machine does.
"""

import os
import threading
import time

import pytest

from dopamine_lib.page.process_memory import children, together

MINUTES, BYTES = 2, 2 * 2**30
EVERY = 1.0  # seconds between two looks


class _Costs:
    """The notebook that runs now, and what each has cost so far: {name: [seconds, bytes]}."""

    def __init__(self):
        self.notebooks: dict[str, list[float]] = {}
        self.now, self.since, self.end = None, 0.0, threading.Event()

    def watch(self) -> None:
        """Look at the memory again and again, until the tests are over."""
        while not self.end.wait(EVERY):
            name = self.now
            try:
                taken = together(children(os.getpid())) if name else 0
            except OSError:  # one of them ended while it was looked at
                continue
            if name:
                self.notebooks[name][1] = max(self.notebooks[name][1], taken)

    def turn_to(self, name: str | None) -> None:
        """The next test belongs to this notebook, or to none."""
        if name != self.now:
            if self.now:
                self.notebooks[self.now][0] = time.monotonic() - self.since
            self.now, self.since = name, time.monotonic()
            if name:
                self.notebooks.setdefault(name, [0.0, 0.0])


costs = _Costs()


def pytest_sessionstart(session):
    threading.Thread(target=costs.watch, daemon=True).start()


def pytest_runtest_logstart(nodeid, location):
    file = nodeid.partition("::")[0]
    costs.turn_to(file if file.endswith(".ipynb") else None)


def pytest_sessionfinish(session, exitstatus):
    costs.turn_to(None)
    costs.end.set()
    if exitstatus == 0 and any(taken > BYTES for _, taken in costs.notebooks.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if not costs.notebooks:
        return
    terminalreporter.section(f"what the notebooks cost (at most {MINUTES} min and {BYTES / 1e6:.0f} MB)")
    for name, (seconds, taken) in sorted(costs.notebooks.items()):
        missed = " TOO MUCH MEMORY" * (taken > BYTES) + " slow" * (seconds > 60 * MINUTES)
        terminalreporter.line(f"{name:60} {seconds / 60:5.1f} min {taken / 1e6:6.0f} MB{missed}")
