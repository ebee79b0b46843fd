"""``bench dp`` at tiny sizes: the form of its rows, and that every peer does the same work."""

import json
import math
import platform
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from dopamine_lib.benchmarks import cost, dp, steps
from dopamine_lib.benchmarks.steps import Case, batch_of

TINY = Case("cnn", 16, 10, most=1e9, least=1e-9, minutes=1e9)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns of its own hooks
        yield


def test_rows_compare_ours_with_every_peer_and_are_written(tmp_path):
    path = tmp_path / "dp.json"
    result = dp.run(path, steps=(TINY,), federated=(TINY,), memory=(), repeats=2)
    assert json.loads(path.read_text()) == result and result["machine"]
    rows = result["rows"][1:]
    peers = ["plain SGD step", "Opacus hooks", "Opacus functorch", "Opacus ghost", "10 Opacus models", None]
    assert [line["peer"] for line in rows] == peers
    for line in rows[:5]:
        ours, peer = line["value"], line["peer_value"]
        assert line["ratio"] == pytest.approx(ours / peer if line["peer"] == "plain SGD step" else peer / ours)
        assert line["fastest"] <= ours <= line["slowest"] and str(TINY) in line["name"]
    assert [line["holds"] for line in rows].count(True) == 4  # plain, Opacus's best mode, the iteration, its minutes
    assert rows[5]["value"] == pytest.approx(rows[4]["value"] * 3001 / 60)


def test_one_network_is_measured_alone_without_what_opacus_cannot_take():
    """MobileNet adds to a layer's output in place: an error in each of Opacus's modes."""
    rows = dp.run(model="mobilenet_v3_small", size=32, repeats=1)["rows"]
    assert [line["peer"] for line in rows] == [None, "plain SGD step"] and "mobilenet_v3_small, 32 px" in rows[1][
        "name"
    ]


@pytest.mark.parametrize("most, least, holds", [(1.9, None, False), (2.1, None, True), (None, 2.1, False)])
def test_a_missed_promise_is_said(most, least, holds):
    peer, peers = ("plain SGD step", [1.0]) if least is None else ("Opacus hooks", [4.0])
    assert dp.compared("x", [2.0, 2.0, 9.0], peer, peers, most=most, least=least)["holds"] == holds


@pytest.mark.parametrize("make", [steps.opacus_hooks, steps.opacus_functorch, steps.opacus_ghost])
def test_every_mode_of_opacus_takes_our_step(make):
    net, x, y = batch_of(TINY)
    start = parameters_to_vector(net.parameters()).detach().clone()
    ours = steps.our_step(net, x, y)()
    make(net, x, y)()
    theirs = parameters_to_vector(net.parameters()).detach()
    assert (ours - start).norm() > 1e-5
    assert (ours - theirs).norm() < 1e-4 * (ours - start).norm()  # Opacus divides by the norm plus 1e-6


def test_opacus_hooks_are_wrong_in_channels_last_memory():
    """Why the benchmark gives them plain memory: the same module, the same images, another gradient."""
    from opacus.grad_sample import GradSampleModule

    net, x, y = batch_of(TINY)
    module = GradSampleModule(net.train())
    samples = []
    for images in (x, x.contiguous()):
        module.zero_grad()
        torch.nn.functional.cross_entropy(module(images), y).backward()
        samples.append(module._module[0].weight.grad_sample)
    assert (samples[0] - samples[1]).norm() > 0.1 * samples[1].norm()


class NoNoise:
    """In place of ``RoundedGaussian``: a fine grid without noise."""

    def __init__(self, *terms, **named):
        self.scale = 2.0**40

    def draw(self, stream):
        return [None]

    def combine(self, clipped_sum, drawn):
        return np.rint(clipped_sum.numpy().astype(np.float64) * self.scale).astype(np.int64)

    def decode(self, total):
        return total / self.scale


def test_ten_models_of_opacus_take_our_iteration(monkeypatch):
    monkeypatch.setattr(steps, "SIGMA", 0.0)
    monkeypatch.setattr(steps, "RoundedGaussian", NoNoise)
    net, x, y = batch_of(TINY)
    start = parameters_to_vector(net.parameters()).detach().clone()
    ours, theirs = steps.our_iteration(net, x, y)(), steps.opacus_iteration(*batch_of(TINY))()
    assert (ours - theirs).norm() < 1e-3 * (ours - start).norm()


def test_the_noise_of_an_iteration_is_the_bounds():
    """One iteration moves the model by the clipped sum and by noise of sigma C / batch an entry."""
    net, x, y = batch_of(TINY)
    first, second = (make(*batch_of(TINY))() for make in (steps.our_iteration, steps.our_iteration))
    expected = steps.RATE * steps.SIGMA * steps.CLIP / len(x) * math.sqrt(2)
    d = len(first)  # a standard deviation's own relative error is 1 / sqrt(2 d); five of them: false alarm 6e-7
    assert (first - second).std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * d))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="another system counts peak memory from the process's start")
def test_peak_memory_counts_what_a_step_holds():
    case = Case("cnn", 64, 16, most=1e9)
    line = dp.memory_row(case)
    floor = 16 * 16 * 64 * 64 * 4 / 2**20  # the first layer's output alone
    assert line["value"] > floor and line["peer_value"] > floor and line["holds"]


FAULTS = """
import resource
from dopamine_lib.machine import keep_freed_memory
{keep}
faults = []
for turn in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
@pytest.mark.parametrize("keep, kept", [("assert keep_freed_memory()", True), ("", False)])
def test_freed_memory_stays_in_the_process_only_when_told(keep, kept):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True, timeout=60
    )
    assert (int(done.stdout) < 100) == kept  # of 16384 pages


@pytest.mark.parametrize("name, expected", [("C", 50 * 5862), ("CDP", 50 * 5862), ("FSCDP", 100 * 3001)])
def test_gradients_of_a_run_are_batch_times_steps(name, expected):
    assert cost.gradients(cost.SETTINGS[name]) == pytest.approx(expected, rel=1e-3)


def test_operations_are_those_of_the_convolutions():
    """Counted by hand from the layers' shapes: forward, and backward by weights and, but for the first, by inputs."""
    net, forward = cost.build("squeezenet", 5, cost.load_weights("random"), 0), []

    def count(layer, _, out):
        forward.append(2 * out.numel() * layer.weight[0].numel())

    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    net(torch.zeros(1, 3, 64, 64))
    by_hand = 3 * sum(forward) - forward[0]
    plain, private = (cost.operations(private, pixels=64, batch=4) for private in (False, True))
    assert plain == pytest.approx(by_hand, rel=0.01)
    assert 1 < private / plain < 1.2


def test_the_price_follows_from_the_count():
    rows = {line["name"]: line["value"] for line in cost.rows(0.01)}
    asked = rows["gradients of the paper's run, five settings, five runs"]
    assert rows["the paper's run on this machine"] == pytest.approx(asked * 0.01 / 3600)
    hours = next(value for name, value in rows.items() if "GPU" in name)
    assert hours == pytest.approx(rows["operations of the paper's run"] / cost.GPU_OPERATIONS / 3600)
