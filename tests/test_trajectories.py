"""A trajectory of local steps for each patient, clipped once: what it is, spends and refuses, and attacked."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from dopamine_lib.__main__ import main
from dopamine_lib.auditing.audit import audit, claims
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.federation.training import Training
from dopamine_lib.federation.transports import make_aggregation
from dopamine_lib.models.networks import cnn, squeezenet
from dopamine_lib.privacy.accounting import SampledGaussian
from dopamine_lib.privacy.dpsgd import Task, clip_factors
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness

PATIENTS, HOSPITALS, C = 40, 4, 1.0


def make_task(net, *shape, patients=PATIENTS, **terms):
    x = torch.randn(patients, *shape, generator=torch.Generator().manual_seed(0)).to(next(net.parameters()))
    return Task(net, lambda index: x[index], torch.arange(patients) % 3, classes=3, **terms)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def by_sgd(task, w, i, steps, eta, offset=0.0):
    """The mean gradient (d,) of patient ``i``'s steps from w: torch's own SGD on a copy of the network."""
    task.load(w.clone())
    net, (x, y) = copy.deepcopy(task.net), task._batch(torch.tensor([i]), w)
    sgd = torch.optim.SGD(net.parameters(), lr=eta)
    for _ in range(steps):
        sgd.zero_grad()
        F.cross_entropy(net(x) + offset, y).backward()
        sgd.step()
    return (w - parameters_to_vector(net.parameters()).detach()) / (steps * eta)


@pytest.mark.parametrize(
    "make, shape",
    [
        (small, (4,)),
        (lambda: cnn(3), (3, 16, 16)),
        (lambda: squeezenet(3), (3, 33, 33)),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.LazyLinear(3)), (3, 6, 6)),
    ],
    ids=["mlp", "cnn", "squeezenet", "group norm"],
)
def test_all_trajectories_at_once_are_a_loop_over_patients(make, shape):
    """In float64 to 1e-6 and below, in pieces too, and with a balanced loss; one step is a clipped gradient."""
    net = make()
    net(torch.zeros(1, *shape))
    task, index, C = make_task(net.double(), *shape, patients=5, chunk=2), torch.tensor([4, 0, 0, 2, 3]), 0.7
    w, task.offset = task.start, torch.tensor([0.5, -1.0, 0.0]).double()
    apart = [by_sgd(task, w, i, 3, 0.1, task.offset) for i in index.tolist()]
    expected = sum(own / max(1.0, float(own.norm()) / C) for own in apart)
    found = task.trajectory_sum(w, index, C, steps=3, eta=0.1)
    assert float((found - expected).norm()) < 1e-9 * float(expected.norm()) and min(map(torch.norm, apart)) > C / 4
    once = task.trajectory_sum(w, index, C, steps=1, eta=0.1)
    assert torch.allclose(once, task.clipped_sums(w, index, C)[0], rtol=0, atol=1e-9)
    assert not torch.allclose(once, found, rtol=0, atol=1e-4)


def test_a_head_s_trajectories_are_among_centred_features():
    task = HeadTask(nn.Linear(3, 3).double(), torch.randn(6, 3).double(), torch.arange(6) % 3)
    task.centre_on(torch.tensor([0.1, 0.2, 0.3]).double())
    w = torch.randn(task.d).double()
    once, several = (task.trajectory_sum(w, torch.arange(6), C, steps, 0.1) for steps in (1, 4))
    assert torch.allclose(once, task.clipped_sums(w, torch.arange(6), C)[0])
    assert float(once.norm()) > float(several.norm()), "every step lessens the patient's own loss"


def moved(task, w, steps, eta):
    """How far patient 0 moves the sum among all others, in units of C."""
    others = torch.arange(1, PATIENTS)
    both = [task.trajectory_sum(w, index, C, steps, eta) for index in (torch.arange(PATIENTS), others)]
    return float((both[0] - both[1]).norm()) / C


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("eta", [0.01, 1.0, 1e30])
def test_a_patient_moves_the_sum_by_c_at_most_whatever_the_steps(steps, eta):
    """Also where a trajectory leaves the range of floats: it counts as zero then."""
    task = make_task(small(), 4)
    found = [moved(task, scale * torch.randn(task.d), steps, eta) for scale in (0.1, 1.0, 30.0)]
    assert max(found) <= 1 + 1e-5


def test_clipping_each_step_alone_would_break_it(monkeypatch):
    """Planted: E gradients of C each, whose sum is then C for each of them."""

    def clipped_apart(net, parameters, x, y, offset, steps, eta):
        own = task._keeper.open(parameters, x[:, 0], y)
        rows = x.new_zeros(len(x), task.d)
        own.add_to(rows, clip_factors(own.norms, C), list(range(len(x))))
        return steps * rows

    task = make_task(small(), 4)
    w = 3 * torch.randn(task.d, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("dopamine_lib.privacy.dpsgd.mean_gradients", clipped_apart)
    assert moved(task, w, 7, 0.1) <= 1 + 1e-5, "the one clip at the end holds for any"
    monkeypatch.setattr("dopamine_lib.privacy.dpsgd.shorten_rows", lambda rows, norms, C: rows)
    assert moved(task, w, 7, 0.1) > 2


def make_training(kind="plain", *, choice=None, **terms):
    task, patients = make_task(small(), 4), np.array_split(np.arange(PATIENTS), HOSPITALS)
    terms = dict(rounds=6, local_steps=3, sample_rate=0.3, noise_multiplier=2.0, trajectories=True) | terms
    declared = replace(SETTINGS["FSCDP"], **terms)
    plan = Plan.of(declared, choice or Choice(0.5, C, averaging=10), task, patients, aggregation=kind)
    return Training(plan, task, patients, Randomness(3), aggregation=make_aggregation(plan))


def test_a_round_costs_one_step_of_the_same_noise():
    three, one = (make_training(local_steps=steps, trajectories=steps > 1).plan for steps in (3, 1))
    assert three.setting.draws == one.setting.draws == 1 and three.charged() == [6]
    for accountant in ("rdp_classic", "rdp", "prv", "pld"):
        assert three.bound.epsilon(6, accountant) == one.bound.epsilon(6, accountant)
    assert three.setting.gradients(100) == 3 * one.setting.gradients(100)
    # planted: as if patients went on where others ended, each step would be a draw
    assert replace(three.setting, trajectories=False).draws == 3


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_encrypted_and_masked_they_are_the_same_to_the_last_bit(kind):
    plain, secure = (make_training(k).run() for k in ("plain", kind))
    assert torch.equal(plain.server.w, secure.server.w) and not torch.equal(plain.server.w, plain.task.start)


def test_a_round_is_the_average_of_the_patients_own_models():
    """With next to no noise, nobody clipped and everybody drawn: FedAvg, whose clients are patients."""
    terms = dict(rounds=1, sample_rate=1.0, noise_multiplier=1e-3, choice=Choice(0.5, 50.0, momentum=0.0))
    training = make_training(**terms)
    task, w = training.task, training.task.start.clone()
    ends = [w - 0.5 * by_sgd(task, w, i, 3, 0.5 / 3) for i in range(PATIENTS)]
    found = training.run().server.w
    assert torch.allclose(found, sum(ends) / PATIENTS, atol=5e-3) and float((found - w).norm()) > 0.05


def test_at_a_given_bound_rounds_and_rate_follow():
    terms = dict(settings=("FSCDP",), model="cnn", size=28, accountant="rdp")
    options = Options(epsilon=3.0, local_steps=5, **terms)
    plan = make_plan(options, "FSCDP", (293,) * 10, 30629)
    assert plan.setting.trajectories and plan.setting.rounds == 601 and plan.choice.momentum == 0.9
    assert plan.setting.gradients(2930) == pytest.approx(3001 * 100)
    assert 2.97 < plan.bound.epsilon(601, "rdp") <= 3.0
    fewest = make_plan(replace(options, rounds="auto"), "FSCDP", (293,) * 10, 30629)
    assert fewest.setting.rounds == 100, "the server's momentum remembers rounds"
    convex = make_plan(replace(options, model="head"), "FSCDP", (293,) * 10, 2565)
    assert not convex.setting.trajectories and convex.setting.draws == 5


class TakesANumber(nn.Linear):
    """A network that reads a number out of each patient's row, which torch.func cannot do for all at once."""

    def forward(self, x):
        return super().forward(x) * (1 + 0 * len(str(x.sum().item())))


def test_what_cannot_be_is_refused(tmp_path, capsys, refuses):
    with refuses("cannot take steps patient by patient", "take 1 local step"):
        task = make_task(TakesANumber(4, 3), 4)
        task.trajectory_sum(task.start, torch.arange(3), C, 2, 0.1)
    for words, said in (
        ("local_steps = 3", "not for 'cnn': say trajectories = true"),
        ("trajectories = true", "say local_steps"),
        ("trajectories = true\nlocal_steps = 3\nshared_noise = false", "under shared noise"),
        ("trajectories = 1", "must be true or false"),
    ):
        own = tmp_path / "own.toml"
        own.write_text(f'[mine]\nlike = "FSCDP"\n{words}\n', encoding="utf-8")
        asked = ["reproduce", "--model", "cnn", "--size", "28", "--settings", str(own), "--out", str(tmp_path / "out")]
        assert main(asked) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_statement_results_and_report_say_it(tmp_path):
    asked = "reproduce --data heart --model mlp --settings FSCDP --runs 1 --epsilon 3 --rounds 8 --local-steps 3"
    assert main([*asked.split(), "--out", str(tmp_path)]) == 0 and main(["report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["settings"]["FSCDP"]
    assert "every patient of a Poisson sample" in found["statement"]
    assert "takes 3 gradient steps alone, from the global model" in found["statement"]
    assert found["steps"] == 8 and found["epsilon"]["prv"] <= 3
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "8 rounds of 3 local steps" in report and "mean gradients of patients' own trajectories clipped to" in report


# --- attacked as a white box -----------------------------------------------------------------------------------------


def seen(with_victim, releases, event, steps, clip=0.01):
    """How far the messages of ``releases`` rounds go along the victim's own, in units of C, each from one model."""
    torch.manual_seed(0)
    task = make_task(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)), 2, patients=3)
    direction = task.trajectory_sum(task.start, torch.tensor([2]), clip, steps, 0.05) / clip
    whole, known = task.trajectory_sum, {}

    def once(w, index, *terms):  # of three patients there are eight samples, and each has one sum
        key = tuple(index.tolist())
        if key not in known:
            known[key] = whole(w, index, *terms)
        return known[key]

    task.trajectory_sum = once
    declared = replace(SETTINGS["FSCDP"], rounds=releases, local_steps=steps, trajectories=True)
    declared = replace(declared, sample_rate=event.sample_rate, noise_multiplier=event.noise_multiplier)
    plan = Plan(declared, Choice(0.05 * steps, clip), (2,), task.d)
    patients = [np.arange(2 + with_victim)]
    (hospital,) = Training(plan, task, patients, Randomness(f"white box {with_victim}")).hospitals
    messages = (hospital.noisy_sum(task.start, number) for number in range(releases))
    return np.array([float(direction @ torch.as_tensor(plan.noise.decode(m)).float()) / clip for m in messages])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
def test_20_000_rounds_of_trajectories_keep_a_single_step_s_bound_and_none_below_it(steps):
    event = SampledGaussian(1.0, 0.5, 1)
    worlds = [seen(victim, 10_000, event, steps) for victim in (True, False)]
    assert worlds[0].mean() - worlds[1].mean() == pytest.approx(0.5, abs=0.05), "C, for half of the rounds"
    verdict = audit(*worlds, claims((event,)), 0.99)
    assert not verdict.broken, str(verdict)
    for short in (replace(event, sample_rate=0.1), replace(event, noise_multiplier=2.0)):  # planted: what costs less
        assert audit(*worlds, claims((short,)), 0.99).broken


@pytest.mark.slow
def test_an_audit_catches_trajectories_that_are_clipped_step_by_step(monkeypatch):
    """Planted: a sum of E clipped gradients, accounted as one."""

    def apart(rows, norms, clip):  # every step of a trajectory is as long as C, and all go the same way
        return 4 * clip * (rows / norms[:, None]).to(rows)

    monkeypatch.setattr("dopamine_lib.privacy.dpsgd.shorten_rows", apart)
    event = SampledGaussian(1.0, 0.5, 1)
    worlds = [seen(victim, 3000, event, 4) for victim in (True, False)]
    assert audit(*worlds, claims((event,)), 0.99).broken
