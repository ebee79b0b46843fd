"""The machine check: true findings, a remedy for everything missing, and no path of this machine."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from dopamine_lib import machine
from dopamine_lib.machine import machine_check, threads


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
