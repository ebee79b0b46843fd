"""What the kit can do without says so in one sentence: numba, mpi4py, grpcio, syft. Each is hidden in a process.

The browser's tests skip themselves without Chromium, and nothing else asks for it.
"""

import os
import subprocess
import sys

import pytest

from dopamine_lib import machine

HIDE = "import sys; sys.modules[{name!r}] = None; "


def without(name: str, program: str, **environment) -> subprocess.CompletedProcess:
    """Run a program in which ``import name`` fails."""
    command = [sys.executable, "-W", "ignore", "-c", HIDE.format(name=name) + program]
    more = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | more | environment)


def test_private_inference_without_numba_is_exact_and_says_once_that_it_is_slow():
    program = """
import numpy as np
from dopamine_lib.inference.protocols import kernels
w, x = np.full((2, 3), 2**31 + 1, np.uint32), np.arange(12, dtype=np.uint32).reshape(3, 4)
out = np.empty((2, 4), np.uint32)
for _ in range(3):
    kernels.active().multiply(w, x, out)
assert kernels.active() is kernels and (out == w @ x).all()
"""
    ran = without("numba", program)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and "numba" in ran.stderr and "slower" in ran.stderr
    asked_for = without("numba", program, DOPAMINE_KERNELS="numpy")
    assert asked_for.returncode == 0 and not asked_for.stderr


def test_training_without_numba_says_once_that_it_is_slow():
    program = """
import torch
from dopamine_lib.privacy.head import HeadTask
task = HeadTask(torch.nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
for _ in range(3):
    assert task.clipped_sums(task.start, torch.arange(4), 1.0).any()
"""
    ran = without("numba", program)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and "numba" in ran.stderr and "slower" in ran.stderr


def test_mpi_without_mpi4py_ends_in_one_line():
    program = (
        "from dopamine_lib.federation.mpi.__main__ import main; sys.exit(main(['--hospitals', '2', '--out', 'none']))"
    )
    ran = without("mpi4py", program, PMI_RANK="0", PMI_SIZE="3")
    assert ran.returncode == 2 and not ran.stdout
    assert len(ran.stderr.splitlines()) == 1 and 'pip install "dopamine-kit[mpi]"' in ran.stderr
    other = without("mpi4py", program, PMI_RANK="1", PMI_SIZE="3")
    assert other.returncode == 2 and not other.stderr, "one rank says it for all"


def test_gRPC_without_grpcio_ends_in_one_line():
    program = "from dopamine_lib.federation.remote.__main__ import main; "
    ran = without("grpc", program + "sys.exit(main(['server', '--identities', 'keys', '--out', 'none']))")
    assert ran.returncode == 2 and not ran.stdout
    assert len(ran.stderr.splitlines()) == 1 and 'pip install "dopamine-kit[grpc]"' in ran.stderr


def test_a_measurement_of_mpi_without_mpi4py_ends_in_one_line():
    """Its ranks are processes of their own: they find one that cannot be imported."""
    program = """
import pathlib, tempfile, os
from dopamine_lib.__main__ import main
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "mpi4py.py").write_text("raise ImportError('hidden')")
    os.environ["PYTHONPATH"] = folder
    sys.exit(main(["bench", "scaling"]))
"""
    ran = without("mpi4py", program)
    assert ran.returncode == 2 and not ran.stdout
    assert len(ran.stderr.splitlines()) == 1 and 'pip install "dopamine-kit[mpi]"' in ran.stderr


def test_training_and_inference_load_without_any_of_them():
    hidden = "sys.modules.update(dict.fromkeys(('mpi4py', 'grpc', 'syft', 'voila', 'playwright', 'nbgrader'))); "
    rooms = "federation.experiment, reproduction.run, __main__, course.homework, federation.mpi.__main__, "
    rooms += "inference.workers.processes, inference.workers.commands"
    ran = without("numba", hidden + "; ".join(f"import dopamine_lib.{room}" for room in rooms.split(", ")))
    assert ran.returncode == 0 and not ran.stderr, ran.stderr


@pytest.mark.parametrize("name", ["numba", "mpi4py", "grpcio", "syft"])
def test_the_machine_check_says_what_is_lost(name, monkeypatch):
    def gone(package):
        raise machine.PackageNotFoundError(package)

    monkeypatch.setattr(machine, "version", gone)
    (missing,) = (finding for finding in machine.machine_check() if finding.part == name)
    assert not missing.found and missing.means.startswith("optional: ")
