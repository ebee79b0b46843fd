"""Local steps under one round's noise: as far as the proof says and no further, accounted, encrypted and audited."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from dopamine_lib.__main__ import main
from dopamine_lib.auditing.audit import audit, claims
from dopamine_lib.errors import InputError
from dopamine_lib.federation import algorithm1
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.federation.training import Training
from dopamine_lib.federation.transports import make_aggregation
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon, group_epsilon, large_order_rdp
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.local_steps import local_sum, longest_step
from dopamine_lib.privacy.mixture import mixture_rdp
from dopamine_lib.privacy.randomness import Randomness

PATIENTS, HOSPITALS, FEATURES, GRADES, C = 120, 5, 8, 3, 2.0


@pytest.fixture
def task():
    torch.manual_seed(0)
    features = nn.functional.normalize(torch.randn(PATIENTS, FEATURES) + 1, dim=1)
    return HeadTask(nn.Linear(FEATURES, GRADES), features, torch.arange(PATIENTS) % GRADES)


def make_training(task, kind="plain", *, rounds=8, draws=3, choice=None, **terms):
    declared = replace(SETTINGS["FSCDP"], rounds=rounds, local_steps=draws, sample_rate=0.2, noise_multiplier=3.0)
    patients = np.array_split(np.arange(PATIENTS), HOSPITALS)
    choice = choice or Choice(0.5, C, momentum=0.0, averaging=10)
    plan = Plan.of(declared, choice, task, patients, aggregation=kind, **terms)
    return Training(plan, task, patients, Randomness(3), aggregation=make_aggregation(plan))


# --- what one patient moves ------------------------------------------------------------------------------------------


def moved(rng, eta, *, classes=3, others=30, steps=4, width=5):
    """How far one patient moves the sum, in units of j C, from a model and among patients that favour them."""
    far, near = rng.normal(size=width), rng.normal(size=(others + 1, width))
    rows = torch.as_tensor((far if rng.random() < 0.5 else 0 * far) + near * rng.choice([0.01, 1, 30]))
    labels = torch.as_tensor(rng.integers(0, classes, others + 1))
    matrix = torch.as_tensor(rng.normal(size=(classes, width)) * rng.choice([0, 1, 20]))
    samples = [torch.as_tensor(rng.permutation(np.flatnonzero(rng.random(others + 1) < 0.5))) for _ in range(steps)]
    samples[0] = torch.cat([torch.tensor([0]), samples[0][samples[0] != 0]])  # the first of all is patient 0
    without = [sample[sample != 0] for sample in samples]
    terms = (rows, labels, torch.zeros(classes))
    both = [local_sum(matrix, *terms, own, max_grad_norm=C, eta=eta) for own in (samples, without)]
    return float((both[0] - both[1]).norm()) / (C * sum(int((sample == 0).sum()) for sample in samples))


@pytest.mark.parametrize("eta", [0.001, 0.1, longest_step(C)])
def test_a_patient_moves_the_sum_by_no_more_than_once_for_each_draw(eta):
    """Also where everybody is drawn in every step: the bound knows no largest batch."""
    rng = np.random.default_rng(0)
    found = [moved(rng, eta) for _ in range(150)]
    assert max(found) <= 1 + 1e-9
    assert max(found) > 0.85, "the bound is attained, nearly"


def test_a_longer_step_would_break_the_bound_and_is_refused(monkeypatch, refuses):
    """Planted: steps beyond 8 / C^2 draw two models apart."""
    with refuses("eta is 2.1", "must not exceed 2"):
        moved(np.random.default_rng(0), 2.1)
    with refuses("the model's norm is", "at most 200"):  # the sum is 1 / eta times what its steps are rounded by
        local_sum(torch.full((2, 2), 150.0), torch.ones(1, 2), torch.tensor([0]), torch.zeros(2), [], 2.0, 1e-4)
    monkeypatch.setattr("dopamine_lib.privacy.local_steps.longest_step", lambda C: math.inf)
    rng = np.random.default_rng(0)
    assert max(moved(rng, 30.0) for _ in range(150)) > 1.05


def test_rows_are_shortened_whatever_they_are():
    far = torch.cat([1e6 * torch.ones(1, 4), torch.full((1, 4), math.nan), torch.zeros(1, 4)])
    wrong = torch.tensor([[-9.0] * 4, [9.0] * 4]).double()
    terms = far, torch.zeros(3, dtype=torch.int64), torch.zeros(2)
    sums = [local_sum(wrong, *terms, [torch.tensor([i])], C, 0.01) for i in range(3)]
    assert [float(own.norm()) for own in sums] == pytest.approx([C, 0, 0], rel=1e-6)
    with pytest.raises(InputError, match="the model's norm is"):
        local_sum(1e5 * wrong, *terms, [torch.tensor([0])], C, 0.01)


def test_the_steps_are_algorithm_1s_gradients_one_after_another(task):
    """Line 10 at the model that the patients before have made of w, with momentum 0 and nothing clipped."""
    w, samples = torch.randn(task.d), [torch.randint(PATIENTS, (9,)) for _ in range(3)]
    task.offset = torch.tensor([0.5, -1.0, 0.0])
    found = task.local_sum(w, samples, 2 * C, 0.3)
    local, x = w.double().numpy(), task._fixed.double().numpy()
    offset = np.append(np.zeros(task.d - GRADES), task.offset)  # to the biases
    for i in torch.cat(samples).tolist():
        local = local - 0.3 * algorithm1.softmax_gradient(local + offset, x[i], int(task.labels[i]))
    assert found.numpy() == pytest.approx((w.double().numpy() - local) / 0.3, abs=1e-5)


# --- what it spends --------------------------------------------------------------------------------------------------


def test_one_draw_is_the_sampled_gaussian_and_several_are_googles_mixture():
    for sigma, q, order in ((2.0, 0.1, 8), (0.5, 0.034, 2), (19.0, 0.34, 63)):
        assert mixture_rdp(sigma, q, 1, order) == pytest.approx(large_order_rdp(sigma, q, order), rel=1e-8)
    from dp_accounting.pld import privacy_loss_distribution

    event = SampledGaussian(3.0, 0.034, 600, draws=5)
    weights = binom.pmf(range(6), 5, 0.034)
    oracle = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        3.0, list(range(6)), weights, value_discretization_interval=1e-3
    ).self_compose(600)
    exact = oracle.get_epsilon_for_delta(1e-4)
    assert epsilon(event, 1e-4, "pld") == epsilon(event, 1e-4, "prv") == pytest.approx(exact, rel=2e-4)
    assert exact < epsilon(event, 1e-4, "rdp") < epsilon(event, 1e-4, "rdp_classic") < 1.3 * exact
    # planted: as if a patient were in one step of a round at most
    assert epsilon(SampledGaussian(3.0, 1 - 0.966**5, 600), 1e-4, "pld") < 0.95 * exact


def test_the_moments_are_the_sum_over_all_draws_of_all_copies():
    """E_Q (P / Q)^2 = sum over i, j of w_i w_j e^(i j / sigma^2), and for everybody a Gaussian's of E C."""
    j = np.arange(4)
    weights = binom.pmf(j, 3, 0.2)
    exact = math.log(weights @ np.exp(np.outer(j, j) / 1.5**2) @ weights)
    assert mixture_rdp(1.5, 0.2, 3, 2) == pytest.approx(exact, rel=1e-9)
    assert mixture_rdp(4.0, 1.0, 3, 5) == pytest.approx(5 * 9 / (2 * 16), rel=1e-9)
    assert math.isnan(mixture_rdp(0.2, 0.1, 1000, 1e4))


def test_draws_cost_no_more_than_steps_of_their_own_and_images_multiply_them():
    """At 1 / sqrt(E) of the noise in each step: 0.87 of it is enough at epsilon 9, as the issue expects."""
    apart, together = (
        SampledGaussian(1.15, 0.034, 3000),
        SampledGaussian(1.15 * math.sqrt(5) * 0.875, 0.034, 600, draws=5),
    )
    assert epsilon(together, 1e-4, "pld") < epsilon(apart, 1e-4, "pld")
    assert group_epsilon(SampledGaussian(4.0, 0.1, 10), 3, 1e-4) == epsilon(
        SampledGaussian(4.0, 0.1, 10, draws=3), 1e-4, "pld"
    )
    everybody = SampledGaussian(20.0, 1.0, 4, draws=5), SampledGaussian(4.0, 1.0, 4)
    assert epsilon(everybody[0], 1e-4, "pld") == epsilon(everybody[1], 1e-4, "pld")


@pytest.mark.parametrize("accountant", ["rdp_classic", "prv"])
def test_noise_is_calibrated_to_the_bound_of_a_whole_run(accountant):
    options = Options(epsilon=2.0, accountant=accountant, rounds=60, local_steps=5, settings=("FSCDP",))
    plan = make_plan(options, "FSCDP", (293,) * 10, 2565)
    assert 1.97 < plan.bound.epsilon(60, accountant) <= 2.0
    assert plan.setting.sample_rate == pytest.approx(100 / 2930 * 3001 / 300)
    assert plan.ledgers()[0].left == plan.setting.steps == 60 and plan.charged() == [60]
    assert plan.choice.momentum == 0 and plan.setting.gradients(2930) == pytest.approx(3001 * 100)
    assert make_plan(replace(options, rounds="auto"), "FSCDP", (293,) * 10, 2565).setting.rounds == 20


# --- how it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfv", "masks"])
def test_encrypted_and_masked_local_steps_are_plain_ones_to_the_last_bit(task, kind):
    plain, secure = (make_training(task, k).run() for k in ("plain", kind))
    assert torch.equal(plain.server.w, secure.server.w) and not torch.equal(plain.server.w, task.start)


def test_without_noise_it_is_the_average_of_local_models(task):
    """Line 21: the global model moves by the mean of how far the hospitals' own models move, weighed by patients."""
    training = make_training(task, rounds=1, choice=Choice(0.5, C, momentum=0.0))
    plan, w = training.plan, task.start.double()
    changes = []
    for hospital in training.hospitals:
        samples, eta = hospital._draw(0)[0], 0.5 / (0.2 * len(hospital))
        changes.append(-eta * task.local_sum(w, samples, C, eta) * len(hospital) / PATIENTS)
    noise = 0.5 * 3.0 * C / (0.2 * PATIENTS)  # of the step, in each value
    found = (training.run().server.w - w - sum(changes)) / noise
    assert len(hospital.sample(0)) > 0 and plan.setting.draws == 3
    assert 0.5 < float(found.std()) < 1.6 and float(sum(changes).norm()) > noise


def test_a_run_that_stops_goes_on_to_the_same_model(task):
    whole, first, second = (make_training(task) for _ in range(3))
    whole.run()
    first.run(after=lambda epoch: epoch == 50)
    vectors, record = first.state()
    second.restore(vectors, json.loads(json.dumps(record)))
    assert torch.equal(second.run().server.w, whole.server.w) and second.ledgers[0].charged == 8


def test_what_has_no_bound_is_refused(task, refuses, capsys, tmp_path):
    with refuses("learning_rate is 100", "up to 9.6"):
        make_training(task, choice=Choice(100.0, C, momentum=0.0))
    with refuses("Gaussian noise"):
        make_training(task, discrete=True)
    for words, said in (
        ("--local-steps 5", "say --epsilon too"),
        ("--local-steps 0 --epsilon 1", "local steps is 0"),
        ("--local-steps 5 --epsilon 1 --settings FPDP,C", "FPDP, C do not"),
    ):
        assert main(["reproduce", *words.split(), "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_local_steps_are_told_in_a_setting_of_ones_own_and_in_its_statement(tmp_path, make_aptos):
    own = (
        '[mine]\nlike = "FSCDP"\nrounds = 6\nsample_rate = 0.3\nlocal_steps = 4\nmax_grad_norm = 2.0\nmomentum = 0.0\n'
    )
    (tmp_path / "own.toml").write_text(own)
    asked = f"reproduce --data aptos --data-dir {make_aptos(tmp_path / 'eyes')} --size 32 --weights random --runs 1"
    asked += f" --hospitals 4 --settings {tmp_path / 'own.toml'} --out {tmp_path / 'out'}"
    assert main(asked.split()) == 0 and main(["report", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["settings"]["mine"]
    events = SampledGaussian(40.0, 1.0, 1), SampledGaussian(1.15, 0.3, 6, draws=4)
    assert found["steps"] == 6 and found["epsilon"]["pld"] == pytest.approx(epsilon(events, 1e-4, "pld"), rel=1e-3)
    assert "in each of 6 rounds hospitals take 4 local steps" in found["statement"]
    assert "6 rounds of 4 local steps" in (tmp_path / "out/report.md").read_text()


# --- attacked as a white box -----------------------------------------------------------------------------------------


def seen(with_victim, releases, event):
    """How far the messages of ``releases`` rounds go along the victim's gradient, in units of C, each from one model.

    That is so wrong about the victim that no number of steps helps, so each draw adds C. To the others it is right, and
    they add nothing: what is seen is what the bound allows.
    """
    start = nn.Linear(2, 2)
    with torch.no_grad():
        start.weight.copy_(torch.tensor([[-90.0, 0.0], [90.0, 0.0]]))
        start.bias.zero_()
    task = HeadTask(start, 1000 * torch.eye(2)[[0, 0, 0]], torch.tensor([1, 1, 0]))
    declared = replace(SETTINGS["FSCDP"], rounds=releases, local_steps=event.draws, sample_rate=event.sample_rate)
    choice = Choice(longest_step(C) * event.sample_rate * 2, C, momentum=0.0)
    plan = Plan(declared.with_noise(event.noise_multiplier), choice, (2,), task.d)
    (hospital,) = Training(plan, task, [np.arange(2 + with_victim)], Randomness(f"white box {with_victim}")).hospitals
    direction = torch.tensor([-1.0, 0, 1, 0, 0, 0]).double() / math.sqrt(2)
    messages = (hospital.noisy_sum(task.start, number) for number in range(releases))
    return np.array([float(direction @ torch.as_tensor(plan.noise.decode(message))) / C for message in messages])


@pytest.mark.slow
def test_20_000_rounds_of_local_steps_keep_their_bound_and_none_below_it():
    event = SampledGaussian(3.0, 0.5, 1, draws=4)
    worlds = [seen(canary, 10_000, event) for canary in (True, False)]
    assert abs(worlds[0].mean()) == pytest.approx(4 * 0.5, abs=0.2), "C for each draw"
    verdict = audit(*worlds, claims((event,)), 0.99)
    assert not verdict.broken, str(verdict)
    for short in (replace(event, draws=1), replace(event, noise_multiplier=6.0)):  # planted: what would cost less
        assert audit(*worlds, claims((short,)), 0.99).broken
