"""Every notebook that pytest runs is measured: its minutes, and the memory of its kernel and all child processes.

A table of both ends the run. Memory must stay below Binder's ceiling, or the run fails; minutes depend on what else the
machine does, and are only shown.
"""

import os
import threading
import time
from pathlib import Path

import pytest

from dopamine_lib.machine import GB, cores, memory_size
from dopamine_lib.page.process_memory import children, together

# no progress: it shows after five seconds, which depends on the machine, and would be part of an output
os.environ["TQDM_DISABLE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers take the cores; the threads of each would wait for the others'
    os.environ.setdefault("OMP_NUM_THREADS", "1")

MINUTES, BYTES = 2, 2 * 2**30
#: The students' copies, whose tests fail until somebody answers; their sources are run.
collect_ignore = [str(path) for path in (Path(__file__).parent / "notebooks" / "homework").glob("*.ipynb")]
INTERVAL = 1.0  # seconds between two samples


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Folders are run by a worker for each core that has 4 GB; files that are named, by this process."""
    named = (Path(config.invocation_params.dir, argument.partition("::")[0]) for argument in config.args)
    workers = min(cores(), (memory_size() or 0) // (4 * GB))
    return workers if workers > 1 and any(path.is_dir() for path in named) else 0


class _Costs:
    """The notebook that is running, and the cost of each until now: {name: [seconds, bytes]}."""

    def __init__(self):
        self.notebooks: dict[str, list[float]] = {}
        self.now, self.since, self.end = None, 0.0, threading.Event()

    def watch(self) -> None:
        """Sample the memory until the tests are over."""
        while not self.end.wait(INTERVAL):
            name = self.now
            try:
                taken = together(children(os.getpid())) if name else 0
            except OSError:  # a process ended while it was sampled
                continue
            if name:
                self.notebooks[name][1] = max(self.notebooks[name][1], taken)

    def turn_to(self, name: str | None) -> None:
        """The next test belongs to this notebook, or to no notebook."""
        if name != self.now:
            if self.now:
                self.notebooks[self.now][0] = time.monotonic() - self.since
            self.now, self.since = name, time.monotonic()
            if name:
                self.notebooks.setdefault(name, [0.0, 0.0])


costs = _Costs()


class _Here:
    """What is measured by the process that runs the tests: pytest, or each of its workers (``-n 2``)."""

    def pytest_sessionstart(self, session):
        threading.Thread(target=costs.watch, daemon=True).start()

    def pytest_runtest_logstart(self, nodeid, location):
        file = nodeid.partition("::")[0]
        costs.turn_to(file if file.endswith(".ipynb") else None)

    def pytest_sessionfinish(self, session):
        costs.turn_to(None)
        costs.end.set()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["costs"] = costs.notebooks


def pytest_configure(config):
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(_Here())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    costs.notebooks |= getattr(node, "workeroutput", {}).get("costs", {})


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and any(taken > BYTES for _, taken in costs.notebooks.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if not costs.notebooks:
        return
    terminalreporter.section(f"cost of the notebooks (at most {MINUTES} min and {BYTES / 1e6:.0f} MB)")
    for name, (seconds, taken) in sorted(costs.notebooks.items()):
        missed = " TOO MUCH MEMORY" * (taken > BYTES) + " slow" * (seconds > 60 * MINUTES)
        terminalreporter.line(f"{name:60} {seconds / 60:5.1f} min {taken / 1e6:6.0f} MB{missed}")
