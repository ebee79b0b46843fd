"""A job with a time budget: it stops at an epoch, says how far it came, and goes on as if nothing had been."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dopamine_lib.federation.options import Options
from dopamine_lib.federation.results_table import table
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.report.verification import read_results
from dopamine_lib.reproduction import run
from dopamine_lib.reproduction.estimate import Estimate
from dopamine_lib.reproduction.run import reproduce

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def options(tmp_path_factory, make_aptos):
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    small = dict(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4)
    return Options(**small, settings=("C", "FSCDP"), runs=1, seed=5)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    seconds = iter(range(10**6))
    turning = SimpleNamespace(monotonic=lambda: float(next(seconds)), perf_counter=time.perf_counter)
    monkeypatch.setattr(run, "time", turning)


def test_what_was_begun_is_kept_counted_and_finished_later(options, clock, tmp_path, refuses):
    stopped = reproduce(options, tmp_path / "out", progress=False, workers=1, minutes=0.5)
    begun = stopped["unfinished"]
    assert [record["setting"] for record in begun] == ["FSCDP"] and not stopped["settings"]  # C was not begun
    epochs = len(begun[0]["history"])
    assert 1 < epochs < 31 and begun[0]["history"][-1]["epoch"] == epochs
    spent = SampledGaussian(1.15, 100 / 2930, begun[0]["charged"][0])
    assert stopped["folder"]["epsilon_private"]["rdp_classic"] == pytest.approx(epsilon(spent, 1e-4), rel=1e-3)
    said = table(stopped)
    assert f"after {epochs} of 100 epochs" in said and "runs of FSCDP" in said
    assert (tmp_path / "out" / "figure1.png").exists()
    with refuses("--minutes", "--resume"):
        read_results(tmp_path / "out")
    whole = reproduce(options, tmp_path / "whole", progress=False, workers=1)
    resumed = reproduce(options, tmp_path / "out", progress=False, workers=1, resume=True)
    assert not resumed["unfinished"] and resumed["settings"] == whole["settings"]
    assert resumed["device"] == "cpu" and list(whole["settings"]) == ["C", "FSCDP"]
    assert read_results(tmp_path / "out")[0] == json.loads(json.dumps(resumed))


def test_a_budget_that_is_over_at_once_is_good_for_an_epoch_of_one_run(options, clock, tmp_path):
    for epoch in (1, 2):
        terms = {"progress": False, "workers": 1, "resume": epoch > 1, "minutes": 1e-3}
        (begun,) = reproduce(options, tmp_path / "out", **terms)["unfinished"]
        assert begun["setting"] == "FSCDP" and begun["history"][-1]["epoch"] == epoch


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_budget_is_a_positive_time(options, tmp_path, refuses, minutes):
    with refuses("minutes"):
        reproduce(options, tmp_path / "out", progress=False, minutes=minutes)


def test_the_rest_is_estimated_once_after_a_minute_and_from_this_process_alone(capsys):
    now = iter([0.0, 30.0, 61.0, 90.0])
    with Estimate(1000, "2 runs", True, clock=lambda: next(now)) as bar:
        bar.update(400)  # done by an earlier process
        for _ in range(3):
            bar.update(50)
    said = [line for line in capsys.readouterr().err.splitlines() if "minutes" in line]
    assert len(said) == 1 and "about 5 minutes" in said[0]  # 100 in 61 seconds, and 500 to go


@pytest.mark.slow
def test_the_script_for_a_rented_gpu_goes_on_where_it_stopped(make_aptos, tmp_path):
    data, out = make_aptos(tmp_path / "eyes"), tmp_path / "out"
    small = ["--data-dir", str(data), "--size", "32", "--weights", "random", "--device", "cpu", "--seed", "1"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    reached = []
    for _ in range(2):
        command = ["bash", str(REPOSITORY / "dopamine_lib" / "reproduction" / "on_a_gpu.sh"), str(out), "0.05", *small]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert "--resume goes on" in done.stdout and "s on cpu" in done.stdout
        reached.append(len(json.loads((out / "results.json").read_text())["unfinished"][0]["history"]))
    assert 0 < reached[0] < reached[1]
