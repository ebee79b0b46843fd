"""The machine check: true findings, a remedy for everything missing, and no path of this machine."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch

from dopamine_lib import machine
from dopamine_lib.__main__ import main
from dopamine_lib.errors import InputError
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.machine import machine_check, threads
from dopamine_lib.models.features import extract_features
from dopamine_lib.models.networks import build
from dopamine_lib.models.weights import load_weights
from dopamine_lib.reproduction.run import reproduce


def find(findings, start):
    return next(finding for finding in findings if finding.part.startswith(start))


def test_it_finds_what_is_here():
    findings = machine_check()
    assert find(findings, "torch ").part == f"torch {version('torch')}"
    assert find(findings, "data: synthetic").found
    assert any(re.fullmatch(r"\d+ cores", finding.part) for finding in findings)
    assert not any(re.search(r"(^|\s)(/|[A-Z]:\\)", str(finding)) for finding in findings)


def test_the_check_imports_no_torch():
    program = "import sys; from dopamine_lib import machine; machine.machine_check(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    "files, count",
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_share_of_the_cores_counts(files, count, tmp_path, monkeypatch):
    """Docker's --cpus, Binder: a process there sees all cores of the machine, and libraries start a thread on each."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_allowed_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1"), monkeypatch.delenv("OMP_NUM_THREADS")
    machine.keep_to_cores()
    assert machine.cores() == count and os.environ.get("OMP_NUM_THREADS") == (None if count == 8 else str(count))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.keep_to_cores()
    assert os.environ["OMP_NUM_THREADS"] == "3"  # the user's word


def test_what_needs_jupyter_says_that_it_needs_a_home(tmp_path, monkeypatch, capsys):
    """The unknown users of some clusters and containers have none."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(machine.Path, "home", no_home)
    for command in (["homework", str(tmp_path / "out")], ["site", str(tmp_path / "site")], ["app"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "environment variable HOME" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_torch_gets_its_threads_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_data_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "data" / "aptos").mkdir(parents=True)
    (tmp_path / "data" / "aptos" / "train.csv").write_text("id_code,diagnosis\n")
    monkeypatch.chdir(tmp_path)
    found = find(machine_check(), "data: aptos")
    assert found.found and "--data aptos" in found.means


@pytest.mark.parametrize("name", ["tenseal", "nbgrader"])
def test_a_missing_package_is_named_with_what_it_costs(monkeypatch, name):
    def gone(package):
        if package == name:
            raise machine.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(machine, "version", gone)
    missing = find(machine_check(), name)
    assert not missing.found and missing.means == machine.PACKAGES[name]
    assert str(missing).startswith("missing")


def test_missing_weights_name_the_command_that_makes_them(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "EMBEDDED", tmp_path / "none.safetensors")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    findings = machine_check()
    assert "dopamine_lib pretrain" in find(findings, "weights: embedded").means
    assert not find(findings, "weights: ImageNet").found


def test_little_memory_and_an_unknown_one(monkeypatch):
    monkeypatch.setattr(machine, "memory_size", lambda: machine.GB)
    assert not find(machine_check(), "1.0 GB of memory").found
    monkeypatch.setattr(machine, "memory_size", lambda: None)
    assert "cannot be read" in find(machine_check(), "memory").means


@pytest.fixture
def _defaults():
    """PyTorch's defaults are put back after the test."""
    yield
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)


def one_epoch(folder):
    """The head after one seeded epoch on 60 small images."""
    options = Options(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4, seed=0)
    with machine.ordinary_torch():
        training = Experiment.load(options, progress=False).training("FSCDP", 0)
        next(training.epochs())
        return training.state()[0]


def test_a_run_is_the_same_whatever_the_user_has_told_torch(make_aptos, tmp_path, _defaults):
    folder = make_aptos(tmp_path / "eyes")
    expected = one_epoch(folder)
    threads_before = torch.get_num_threads()
    torch.set_default_dtype(torch.float64), torch.set_default_device("meta"), torch.set_num_threads(64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            found = one_epoch(folder)
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
    finally:
        torch.use_deterministic_algorithms(False), torch.set_num_threads(threads_before)
    assert any(value.any() for value in expected.values()) and found.keys() == expected.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[key]) for key, value in found.items())


def test_reproduce_computes_as_torch_does_by_itself(tmp_path, monkeypatch, _defaults, refuses):
    def load(options, **more):
        machine.check_torch()
        raise InputError("the defaults are right")

    monkeypatch.setattr("dopamine_lib.reproduction.run.Experiment.load", load)
    torch.set_default_dtype(torch.float64), torch.set_default_device("meta")
    with refuses("the defaults are right"):
        reproduce(Options(), tmp_path / "out", progress=False, workers=1)


@pytest.mark.parametrize("change", ["set_default_dtype(torch.float64)", "set_default_device('meta')"])
def test_what_is_computed_piece_by_piece_says_so_in_one_line(change, _defaults, refuses):
    eval(f"torch.{change}")
    with refuses("must be float32 on the processor", "set_default_dtype"):
        build("head", 5, None, 0)
    with refuses("must be float32 on the processor"):
        extract_features(load_weights("random"), np.zeros((1, 32, 32, 3), np.uint8))
