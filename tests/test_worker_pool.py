"""The pool of processes: answers in order, errors in one line, and no worker that outlives whoever started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dopamine_lib import pool as pool_module
from dopamine_lib.errors import InputError
from dopamine_lib.pool import WorkerPool, fitting_workers

WORKER = """
import os, sys, time
from dopamine_lib.pool import Worker

worker = Worker()
print("a library says hello")
factor = worker.hear()["factor"]
while True:
    job = worker.hear()
    if job == "die":
        os._exit(3)
    if job == "refuse":
        worker.say(**{"wrong input": "job is 'refuse', but must be a number"})
        continue
    worker.say(epochs=1)
    time.sleep(job)
    worker.say(answer=[factor * job, os.getpid()])
"""
DEAF = """
import time
print('{"epochs": 1}', flush=True)
time.sleep(30)
"""


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A pool of two workers that sleep for as long as a job says."""
    (tmp_path / "sleepers.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerPool("sleepers", 2) as workers:
        workers.introduce({"factor": 10})
        yield workers


def test_answers_come_in_the_order_of_the_jobs_from_both_workers(pool):
    epochs = []
    jobs = [0.5, 0.0, 0.3, 0.0, 0.1]
    answers = pool.run(jobs, epochs.append)
    assert [answer for answer, _ in answers] == [10 * job for job in jobs]
    assert len({worker for _, worker in answers}) == 2 and sum(epochs) == len(jobs)
    assert pool.run([0.0])[0][0] == 0 and pool.run([]) == []


def test_bad_input_found_by_a_worker_is_raised_here(pool):
    with pytest.raises(InputError, match="must be a number"):
        pool.run([0.0, "refuse", 5.0])


def test_a_worker_that_ends_is_noticed(pool):
    with pytest.raises(RuntimeError, match="ended"):
        pool.run([0.0, "die", 0.0])


def test_closing_ends_workers_in_the_middle_of_a_job(tmp_path, monkeypatch):
    (tmp_path / "sleepers.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError), WorkerPool("sleepers", 2) as workers:
        workers.introduce({"factor": 1})
        processes = list(workers._processes)
        begin = time.monotonic()
        workers.run([60.0, "refuse"])
    assert all(process.returncode is not None for process in processes) and time.monotonic() - begin < 30


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("code, ends", [(WORKER, True), (DEAF, False)], ids=["a worker", "one that does not listen"])
def test_a_worker_ends_when_its_parent_is_killed(tmp_path, monkeypatch, code, ends):
    """Also in the middle of a job; a worker that reads no input would stay, and this test would see it."""
    (tmp_path / "sleepers.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(pool_module.__file__).parents[1])]))
    parent = (
        "from dopamine_lib.pool import WorkerPool; pool = WorkerPool('sleepers', 1); "
        "pool.introduce({'factor': 1}); "
        "pool.run([60.0], lambda epochs: print(pool._processes[0].pid, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
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
