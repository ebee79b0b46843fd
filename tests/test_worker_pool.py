"""The pool of processes: answers in order, errors in one line, and no worker that outlives its parent."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dopamine_lib import pool as pool_module
from dopamine_lib.errors import InputError
from dopamine_lib.pool import ELSEWHERE, Child, WorkerPool, close_all, fitting_workers

#: Jobs that sleep for a number of seconds, among libraries that print: from Python, and past it, from C.
SLEEPERS = """
import contextlib, os, sys, time
from dopamine_lib.errors import InputError

@contextlib.contextmanager
def sleepers(told):
    def do(job, advance):
        os.write(1, b'onednn_verbose,info\\n{"answer": "nonsense"}\\n')
        if job == "die":
            os._exit(3)
        if job == "inherited":
            return os.get_inheritable(int(sys.argv[-1]))
        if job == "refuse":
            raise InputError("job is 'refuse', but must be a number")
        advance(1)
        time.sleep(job)
        return [told["factor"] * job, os.getpid()]

    print("a library says hello")
    yield do
"""
DEAF = "import time; time.sleep(60)"
GREETING = """
import os
os.write(1, b"Welcome to this Python!\\n")
"""


@pytest.fixture
def sleepers(tmp_path, monkeypatch):
    """The function ``sleepers`` above, in a module that workers can import; their Python greets."""
    (tmp_path / "sleeping.py").write_text(SLEEPERS)
    (tmp_path / "deaf.py").write_text(DEAF)
    (tmp_path / "sitecustomize.py").write_text(GREETING)
    home = str(Path(pool_module.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), home]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sleeping", raising=False)
    return importlib.import_module("sleeping").sleepers


@pytest.fixture
def pool(sleepers):
    """A pool of two workers that sleep for as long as a job says."""
    with WorkerPool(sleepers, 2) as workers:
        workers.introduce({"factor": 10})
        yield workers


def test_answers_come_in_the_order_of_the_jobs_from_both_workers(pool):
    epochs = []
    jobs = [0.5, 0.0, 0.3, 0.0, 0.1]
    answers = pool.run(jobs, epochs.append)
    assert [answer for answer, _ in answers] == [10 * job for job in jobs]
    assert len({worker for _, worker in answers}) == 2 and sum(epochs) == len(jobs)
    assert pool.run([0.0])[0][0] == 0 and pool.run([]) == []


def test_what_libraries_print_goes_to_standard_error(sleepers, capfd):
    with WorkerPool(sleepers, 1) as workers:
        workers.introduce({"factor": 10})
        assert workers.run([0.5])[0][0] == 5
    printed = capfd.readouterr()
    assert "onednn_verbose" in printed.err and "Welcome" in printed.err and printed.out == ""


def test_bad_input_found_by_a_worker_is_raised_here(pool):
    with pytest.raises(InputError, match="must be a number"):
        pool.run([0.0, "refuse", 5.0])


def test_a_worker_that_ends_is_noticed(pool):
    assert pool.run(["inherited"]) == [False]  # what a worker starts and leaves behind does not keep its pipe open
    with pytest.raises(RuntimeError, match="ended"):
        pool.run([0.0, "die", 0.0])


def test_closing_ends_workers_in_the_middle_of_a_job(sleepers):
    with pytest.raises(InputError), WorkerPool(sleepers, 2) as workers:
        workers.introduce({"factor": 1})
        children = list(workers._children)
        begin = time.monotonic()
        workers.run([60.0, "refuse"])
    assert not any(child.alive for child in children) and time.monotonic() - begin < 30


def test_interrupts_while_workers_start_or_end_leave_none_behind(sleepers, monkeypatch):
    """As in a notebook, where the traceback keeps the pipes open, so that workers do not notice by themselves."""
    started = []

    class Interrupted(Child):
        def __init__(self, *words, **more):
            if started:
                raise KeyboardInterrupt
            super().__init__(*words, **more)
            started.append(self)

    monkeypatch.setattr(pool_module, "Child", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        WorkerPool(sleepers, 2)
    assert len(started) == 1 and not started[0].alive
    children = [Child("deaf"), Child("deaf")]
    monkeypatch.setattr(children[1]._process, "wait", interrupted_once(children[1]._process.wait))
    with pytest.raises(KeyboardInterrupt):
        close_all(children)
    assert not any(child.alive for child in children)


def interrupted_once(wait):
    """``wait`` as the user sees it who presses Ctrl-C once more."""
    calls = []

    def interrupted(*patience):
        calls.append(patience)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(*patience)

    return interrupted


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_an_interrupted_cell_leaves_no_worker(sleepers, tmp_path):
    """In a kernel that goes on, as in JupyterLab by the button Interrupt."""
    note = "pathlib.Path('note').write_text(json.dumps([os.getpid(), *(child.pid for child in pool._children)]))"
    cells = [
        "import json, os, pathlib; from dopamine_lib.pool import WorkerPool; from sleeping import sleepers\n"
        "with WorkerPool(sleepers, 2) as pool:\n    pool.introduce({'factor': 1})\n"
        f"    pool.run([60.0, 60.0], lambda epochs: {note})",
        "[pid for pid in json.loads(pathlib.Path('note').read_text())[1:] if pathlib.Path(f'/proc/{pid}').exists()]",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    kernel = NotebookClient(notebook, kernel_name="python3", allow_errors=True, timeout=120)

    def interrupt():
        for _ in range(6000):
            time.sleep(0.01)
            with contextlib.suppress(OSError, ValueError):  # not there yet, or half of it
                return os.kill(json.loads((tmp_path / "note").read_text())[0], signal.SIGINT)

    threading.Thread(target=interrupt).start()
    kernel.execute(cwd=str(tmp_path))
    first, second = (cell.outputs[-1] for cell in notebook.cells)
    assert first.ename == "KeyboardInterrupt" and second.data["text/plain"] == "[]"


def test_modules_beside_the_notebook_do_not_stand_in_for_pythons(sleepers, tmp_path, monkeypatch):
    """A student's queue.py: the kernel has Python's already, a worker would import the other. Own modules are found."""
    (tmp_path / "here").mkdir()
    (tmp_path / "sleeping.py").rename(tmp_path / "here" / "sleeping.py")
    for name in ("queue", "random", "copy"):
        (tmp_path / "here" / f"{name}.py").write_text("raise ImportError('homework 1')")
    monkeypatch.chdir(tmp_path / "here")
    with WorkerPool(sleepers, 1) as workers:
        workers.introduce({"factor": 10})
        assert workers.run([0.0])[0][0] == 0


def test_a_child_that_says_nothing_is_killed_and_one_that_was_closed_hears_nothing(sleepers):
    child = Child("deaf")
    with pytest.raises(EOFError):
        child.hear(0.1)
    child.close(), child.close()
    child.say({"factor": 1})
    with pytest.raises(EOFError):
        child.hear()
    assert not child.alive


def test_a_child_of_another_environment_has_its_packages_first(tmp_path, monkeypatch):
    """What lies beside the kit, which has a NumPy of its own there when it is installed, comes last."""
    venv.create(tmp_path / "elsewhere", symlinks=True)
    (modules,) = (tmp_path / "elsewhere").glob("lib/python*/site-packages")
    python = str(tmp_path / "elsewhere" / "bin" / "python")
    (modules / "echo.py").write_text(
        "import sys\nfrom dopamine_lib.pool import Parent\n"
        "Parent(int(sys.argv[-1])).say(python=sys.executable, words=sys.argv[1:-1], path=sys.path)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("echo", "one", "", python=python)
    said = child.hear(60)
    child.close()
    assert said["python"] == python and said["words"] == ["one", ""]
    assert said["path"][-2:] == [str(modules), str(Path(pool_module.__file__).parents[1])]
    assert str(tmp_path) not in said["path"]


@pytest.mark.parametrize("forbidden", [True, False])
def test_a_child_of_another_environment_writes_bytecode_where_its_parent_does(forbidden, tmp_path, monkeypatch):
    """No variable reaches it, and a kit may be somebody else's, in which nothing is to be written."""
    echo = "import sys\nfrom dopamine_lib.pool import Parent\nParent(int(sys.argv[-1])).say()"
    (tmp_path / "echo.py").write_text(echo)
    cache = tmp_path / "cache"
    places = f"import sys; sys.pycache_prefix = {str(cache)!r}; sys.path.append({str(tmp_path)!r}); "
    monkeypatch.setattr(sys, "dont_write_bytecode", forbidden)
    monkeypatch.setattr(pool_module, "ELSEWHERE", places + ELSEWHERE)
    child = Child("echo", python=sys.executable)
    child.hear(60)
    child.close()
    assert cache.exists() != forbidden


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "start, ends",
    [
        ("from sleeping import sleepers; p = pool.WorkerPool(sleepers, 1); p.introduce({'factor': 1}); ", True),
        ("p = pool.Child('deaf'); ", False),
    ],
    ids=["a worker", "one that does not listen"],
)
def test_a_worker_ends_when_its_parent_is_killed(sleepers, start, ends):
    """Also in the middle of a job; a process that does not listen to its pipe stays, and this test sees it."""
    wait = "p.run([60.0], lambda epochs: say(p._children[0].pid))" if ends else "say(p.pid); time.sleep(60)"
    program = "import time; from dopamine_lib import pool; say = lambda pid: print(pid, flush=True); "
    process = subprocess.Popen([sys.executable, "-c", program + start + wait], stdout=subprocess.PIPE, text=True)
    worker = int(next(line for line in process.stdout if line.strip().isdecimal()))
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + (20 if ends else 1)
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _alive(worker) != ends
    if not ends:
        os.kill(worker, signal.SIGKILL)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "cores, memory, jobs, fitting",
    [
        (8, 16.0, 25, 2),
        (2, None, 25, 2),
        (1, 16.0, 25, 1),
        (8, 3.0, 25, 2),
        (8, 2.0, 25, 1),
        (8, 1.0, 25, 1),
        (8, 0.4, 25, 1),
        (8, 16.0, 1, 1),
    ],
)
def test_as_many_workers_as_fit(monkeypatch, cores, memory, jobs, fitting):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(pool_module, "memory_size", lambda: None if memory is None else int(memory * 2**30))
    assert fitting_workers(jobs) == fitting
