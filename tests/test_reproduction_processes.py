"""The main job and other processes: its own workers end with it, and no other process's run is touched."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from reproduction_runs import alive, arguments, checkpoints, children

from dopamine_lib.__main__ import main
from dopamine_lib.errors import InputError
from dopamine_lib.federation.options import Options
from dopamine_lib.reproduction.run import reproduce


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_aptos):
    """Options of a quick experiment: 60 small images, a random backbone, the paper's step counts."""
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    return dict(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_worker_outlives_an_interrupt(small, tmp_path, sent, status):
    words = arguments(small, tmp_path, "--runs", "3", "--settings", "CDP,FSCDP")
    # a shell's background jobs ignore interrupts, and so would their children
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import sys, dopamine_lib.pool as pool; pool.fitting_workers = lambda jobs: 2\n"
    code += "from dopamine_lib.__main__ import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not checkpoints(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(sent)
    _, said = process.communicate(timeout=300)
    assert process.returncode == status
    if sent == signal.SIGINT:
        assert said.strip().splitlines()[-1].startswith("dopamine: interrupted") and "Traceback" not in said
    deadline = time.monotonic() + 60
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [worker for worker in workers if alive(worker)]


def test_two_processes_do_not_share_an_out(small, tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert main(arguments(small, tmp_path, "--runs", "1", "--settings", "C")) == 2
    assert "another process" in capsys.readouterr().err


def test_a_run_that_another_process_is_in_is_left_alone(small, tmp_path):
    """A checkpoint is never used by two at once: the begun epoch's noise would be drawn twice."""
    (tmp_path / "runs").mkdir()
    options = Options(**small, runs=1, settings=("C",))
    with FileLock(tmp_path / "runs" / "C-0.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("dopamine_lib.reproduction.run.PATIENCE", 0.1)
        with pytest.raises(InputError, match="another process"):
            reproduce(options, tmp_path, progress=False)
    assert not (tmp_path / "runs" / "C-0.safetensors").exists()
