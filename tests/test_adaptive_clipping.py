"""Fairer training: adaptive clipping, group-aware sampling and a balanced loss, each within the bound it is charged."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from dopamine_lib.fairness.adaptive_clipping import AdaptiveClip, AdaptiveHead, AdaptiveServer
from dopamine_lib.fairness.group_sampling import ThinnedHospital
from dopamine_lib.fairness.measures import graded, group_epsilons, measures
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy import head
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.privacy.balanced import LEAST, log_shares
from dopamine_lib.privacy.dpsgd import Task, clip_factors
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness

PATIENTS, FEATURES = 120, 8
CLIP = AdaptiveClip(target=0.5, rate=0.1, budget=0.1, start=0.7)


def material(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features, labels = torch.randn(PATIENTS, FEATURES, generator=generator), torch.arange(PATIENTS) % 3
    net = nn.Linear(FEATURES, 3)
    nn.init.normal_(net.weight, std=0.3, generator=generator)
    nn.init.zeros_(net.bias)
    return net, features, labels


def adaptive(clip=CLIP):
    return AdaptiveHead(*material(), clip)


def train(task, declared, choice, *, hospitals=5, seed=0, **more):
    patients = np.array_split(np.arange(PATIENTS), hospitals)
    return Training(Plan.of(declared, choice, task, patients), task, patients, Randomness(seed), **more).run()


def short(rounds, **changes):
    return replace(SETTINGS["FSCDP"], rounds=rounds, **changes)


# adaptive clipping


@pytest.mark.parametrize("unit", [1.0, 0.3])
def test_no_patient_moves_gradients_and_bits_together_by_more_than_the_unit(unit):
    task, everybody = adaptive(), torch.arange(PATIENTS)
    whole = task.clipped_sums(task.start, everybody, unit)[0]
    moved = []
    for patient in range(PATIENTS):
        without = task.clipped_sums(task.start, everybody[everybody != patient], unit)[0]
        moved.append((whole - without).norm().item())
    assert max(moved) <= unit * (1 + 1e-4) and max(moved) > unit * 0.999  # a clipped gradient uses all of it


def test_the_bound_on_a_patient_is_missed_where_the_bit_comes_on_top(monkeypatch):
    """Planted: the clipped gradient keeps its whole length and the bit is added at no cost."""
    monkeypatch.setattr(AdaptiveClip, "gradient_scale", 1.0)
    task = adaptive()
    moved = [task.clipped_sums(task.start, torch.tensor([patient]), 1.0).norm() for patient in range(PATIENTS)]
    assert max(moved) > 1.04


@pytest.mark.parametrize("z, budget", [(1.15, 0.02), (6.0, 0.3)])
def test_the_noise_is_split_as_in_theorem_1_of_andrew_et_al(z, budget):
    clip = AdaptiveClip(budget=budget)
    gradients, bits = z / clip.gradient_scale, z / clip.bit_scale
    assert gradients**-2 + (2 * bits) ** -2 == pytest.approx(z**-2)


def test_sums_are_those_of_the_head_at_the_clip_in_w_with_the_bits_beside_them():
    task, plain = adaptive(), HeadTask(*material())
    w = torch.cat([plain.start + 0.1, torch.tensor([math.log(0.9)])])
    index, group = torch.arange(0, PATIENTS, 2), torch.arange(60) % 3
    sums = task.clipped_sums(w, index, 1.0, group, 4)
    expected = plain.clipped_sums(w[:-1], index, 0.9, group, 4) * (CLIP.gradient_scale / 0.9)
    assert torch.allclose(sums[:, :-1], expected, atol=1e-5)
    norms = torch.stack([plain.clipped_sums(w[:-1], i[None], math.inf)[0].norm() for i in index])
    bits = [((norms[group == g] <= 0.9).float() - 0.5).sum().item() for g in range(4)]
    assert sums[:, -1].tolist() == pytest.approx([CLIP.bit_scale * b for b in bits], abs=1e-5)
    assert len(set(bits)) > 1 and bits[3] == 0
    assert torch.equal(task.logits(w, index), plain.logits(w[:-1], index))
    task.load(w)
    assert torch.equal(task.net.weight, (plain.load(w[:-1]), plain.net.weight)[1])


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_the_clip_settles_at_the_quantile_it_is_told(target):
    clip = AdaptiveClip(target=target, rate=0.1, budget=0.1, start=20.0)
    declared = short(400, sample_rate=0.5, noise_multiplier=0.5)
    training = train(adaptive(clip), declared, Choice(0.001, 1.0), server=partial(AdaptiveServer, clip=clip))
    plain, w = HeadTask(*material()), training.server.w
    norms = torch.stack([plain.clipped_sums(w[:-1], torch.tensor([i]), math.inf)[0].norm() for i in range(PATIENTS)])
    assert (norms <= training.server.max_grad_norm).float().mean().item() == pytest.approx(target, abs=0.12)


def test_with_a_clip_that_stands_still_it_is_plain_training():
    still = AdaptiveClip(rate=1e-9, budget=1e-9, start=0.7)
    quiet = short(150, noise_multiplier=None)
    follows = train(adaptive(still), quiet, Choice(0.2, 1.0), server=partial(AdaptiveServer, clip=still))
    plain = train(HeadTask(*material()), quiet, Choice(0.2, 0.7))
    assert torch.allclose(follows.server.w[:-1], plain.server.w, atol=1e-4)
    assert (plain.server.w - plain.task.start).norm() > 0.1


@pytest.mark.parametrize("scale, accepted", [(1.0, True), (0.9, False), (1.1, False)])
def test_gradients_carry_noise_of_z_over_a_and_the_bits_of_z_over_b(scale, accepted):
    """With next to nobody sampled a step is noise alone; the right scale passes, 10 % off either way does not."""
    declared, seen = short(400, sample_rate=1e-9), []

    class Looking(AdaptiveServer):
        def gradient_step(self, gradient):
            seen.append(gradient * declared.sample_rate * PATIENTS)  # the total

    train(adaptive(), declared, Choice(0.1, 1.0), server=partial(Looking, clip=CLIP))
    totals = torch.stack(seen).double().numpy()
    z = declared.noise_multiplier
    gradients = totals[:, :-1].ravel() / CLIP.gradient_scale / (scale * z / CLIP.gradient_scale)
    assert (stats.kstest(gradients, "norm").pvalue > 0.01) == accepted
    bits = totals[:, -1] / CLIP.bit_scale
    low, high = stats.chi2.ppf([0.0005, 0.9995], len(bits)) / len(bits)  # a false alarm in 1 of 1000
    assert low < (bits**2).mean() / (z / CLIP.bit_scale) ** 2 < high


def test_the_ledger_charges_it_what_it_charges_plain_training():
    choice = Choice(0.1, 1.0)
    follows = train(adaptive(), short(40), choice, server=partial(AdaptiveServer, clip=CLIP))
    assert follows.ledgers[0].charged == 40
    expected = epsilon(SampledGaussian(1.15, short(1).sample_rate, 40), 1e-4)
    assert follows.epsilons("rdp_classic") == [expected]


def test_adaptive_clipping_refuses_what_it_cannot_do(refuses):
    with refuses("target quantile is 1", "(0, 1)"):
        AdaptiveClip(target=1.0)
    with refuses("budget of the bits is 0", "0.02"):
        AdaptiveClip(budget=0.0)
    with refuses("max_grad_norm is inf"):
        adaptive().clipped_sums(adaptive().start, torch.arange(3), math.inf)
    with refuses("one step a round"):
        choice = Choice(0.1, 1.0)
        train(adaptive(), replace(SETTINGS["FPDP"], rounds=2), choice, server=partial(AdaptiveServer, clip=CLIP))


# group-aware sampling


def thinned(keep, rate=0.4, patients=100):
    declared = short(1, sample_rate=rate, noise_multiplier=None)
    task = HeadTask(*material())
    plan = Plan.of(declared, Choice(0.1, 0.5), task, [np.arange(patients)])
    return ThinnedHospital(0, np.arange(patients), task, plan, Randomness(3), keep=keep)


def test_patients_are_drawn_at_their_groups_rate_and_independently():
    keep = torch.where(torch.arange(100) < 50, 1.0, 0.25)
    hospital, times = thinned(keep), 400
    there = np.zeros((times, 100))
    for step in range(times):
        there[step, hospital.sample(step).numpy()] = 1
    for rows, rate in ((there[:, :50], 0.4), (there[:, 50:], 0.1)):
        low, high = stats.binom.ppf([0.0005, 0.9995], rows.size, rate)
        assert low <= rows.sum() <= high
        # the size of an independent sample has the binomial's variance
        assert rows.sum(1).var() == pytest.approx(50 * rate * (1 - rate), rel=0.4)


def test_a_sample_is_the_same_when_asked_again_and_all_are_kept_at_one():
    hospital = thinned(torch.full((100,), 0.5))
    assert torch.equal(hospital.sample(40), hospital.sample(40))
    everyone, plain = thinned(torch.ones(100)), thinned(torch.full((100,), 1e-12))
    assert len(everyone.sample(0)) > 20 and len(plain.sample(0)) == 0


@pytest.mark.parametrize("bad", [0.0, 1.5, math.nan])
def test_a_patient_cannot_be_kept_more_often_than_drawn(refuses, bad):
    with refuses("probability to keep a patient", "(0, 1]"):
        thinned(torch.full((100,), bad))


# a balanced loss


@pytest.mark.parametrize("kind", ["loop", "products", "any net"])
@pytest.mark.parametrize("clip", [0.9, math.inf])
def test_gradients_are_those_of_the_adjusted_loss_clipped_afterwards(kind, clip, monkeypatch):
    net, features, labels = material()
    task = HeadTask(net, features, labels)
    if kind == "loop":
        pytest.importorskip("numba")
    elif kind == "products":
        monkeypatch.setattr(head, "_loop", lambda: None)
    else:
        task = Task(net, lambda index: features[index], labels, classes=3)
    offset = torch.tensor([0.5, 0.3, 0.2]).log()
    task.offset, index, expected = offset, torch.arange(0, 30), torch.zeros(task.d)
    for i in index:
        loss = F.cross_entropy(net(features[i][None]) + offset, labels[i][None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
        expected += gradient * clip_factors(gradient.norm(), clip)
    assert torch.allclose(task.clipped_sums(task.start, index, clip)[0], expected, atol=1e-5)
    plain = HeadTask(net, features, labels).logits(task.start, index)  # another product of matrices: equal to rounding
    assert torch.allclose(task.logits(task.start, index), plain, atol=1e-6)


def test_no_patient_moves_the_first_release_by_more_than_one():
    net, features, labels = material()
    task, everybody = HeadTask(net, 5 * features, labels), torch.arange(PATIENTS)
    for counts in (0.4, 1.0):
        whole = task.first_sum(everybody, counts)
        for patient in range(0, PATIENTS, 7):
            moved = (whole - task.first_sum(everybody[everybody != patient], counts)).norm().item()
            assert moved == pytest.approx(1, abs=1e-3)  # a feature longer than 1 is cut to 1
    assert torch.cat([task.feature_sum(everybody[:1]), torch.ones(1)]).norm() > 1.1  # planted: both have all of it


def test_mean_and_shares_come_out_of_the_first_release():
    net, features, _ = material()
    labels = torch.tensor([0] * 60 + [1] * 40 + [2] * 20)
    for counts in (0.4, 1.0):
        task = HeadTask(net, features / 10, labels)
        task.take_first(task.first_sum(torch.arange(PATIENTS), counts).float() / PATIENTS, counts)
        assert task.offset.exp().tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6], rel=1e-5)
        assert torch.allclose(task.mean, features.mean(0) / 10 * (counts < 1), atol=1e-6)
    assert log_shares(torch.tensor([0.5, 0.5, -0.1]))[2] == pytest.approx(math.log(LEAST / 3 / (1 + LEAST / 3)))


def test_a_network_without_a_mean_is_balanced_by_counts_alone():
    net, features, labels = material()
    task = Task(net, lambda index: features[index], labels, classes=3)
    assert len(task.first_sum(torch.arange(9))) == 0
    task.take_first(task.first_sum(torch.arange(PATIENTS), 1.0).float() / PATIENTS, 1.0)
    assert task.offset.exp().tolist() == pytest.approx((labels.bincount() / PATIENTS).tolist(), rel=1e-5)


def test_shares_that_are_not_finite_are_refused(refuses):
    with refuses("the class counts are not finite"):
        log_shares(torch.tensor([0.5, math.nan]))


def test_a_resumed_run_has_the_shares_of_the_first():
    declared, choice = short(40), Choice(0.1, 0.5, mean_noise_multiplier=5.0, counts=0.5)
    trained = train(HeadTask(*material()), declared, choice)
    again = Training(trained.plan, HeadTask(*material()), np.array_split(np.arange(PATIENTS), 5), Randomness(0))
    again.restore(*trained.state())
    assert torch.equal(again.task.offset, trained.task.offset) and trained.task.offset.std() > 0


def test_a_rare_class_is_found_though_every_gradient_is_clipped():
    """One in ten is of class 1, and the features tell it apart badly: only a balanced loss calls it often."""
    labels = (torch.arange(2000) % 10 == 0).long()
    features = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    features[:, 0] += 1.2 * labels
    found = {}
    for counts in (0.0, 0.5):
        choice = Choice(0.5, 1.0, averaging=10, mean_noise_multiplier=20.0, counts=counts)
        task, patients = HeadTask(nn.Linear(4, 2), features / 4, labels), np.array_split(np.arange(2000), 5)
        plan = Plan.of(short(200), choice, task, patients)
        trained = Training(plan, task, patients, Randomness(0)).run()
        called = task.logits(trained.server.model, torch.arange(2000)).argmax(1)
        found[counts] = [float((called == c)[labels == c].float().mean()) for c in (0, 1)]
    assert found[0.0][1] < 0.1 < 0.3 < found[0.5][1] and found[0.5][0] > 0.8


# all of them, at one epsilon


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_aptos):
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    options = Options(
        data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4, runs=2, seed=1, accountant="rdp"
    )
    return Experiment.load(options, progress=False)


def test_every_measure_trains_within_the_same_epsilon(small):
    favoured = small.dataset.labels >= 3
    made = measures(small, 3.0, favoured=favoured, boost=2.0, shorter=50)
    assert list(made) == ["as it is", "group-aware sampling", "adaptive clipping", "class-balanced loss"]
    probabilities = {}
    for name, measure in made.items():
        training = measure.make(0)
        assert 2.98 < training.bound.epsilon(measure.setting.steps, "rdp") <= 3.0
        assert len(training.schedule) == measure.setting.steps == 60  # the budget is enough for all of them
        probabilities[name] = graded(small, measure)
        assert probabilities[name].shape == (2, len(small.test), 5)
        assert np.allclose(probabilities[name].sum(2), 1)
    assert len({p.tobytes() for p in probabilities.values()}) == 4  # each of them does something


def test_patients_sampled_more_have_the_bound_and_the_others_a_smaller_one(small):
    measure = measures(small, 3.0, favoured=small.dataset.labels >= 3, boost=2.0)["group-aware sampling"]
    found = group_epsilons(measure, 2.0, 1e-4, "rdp")
    assert found["others"] < 0.7 * found["favoured"] and 2.98 < found["favoured"] <= 3.0
    plain = measures(small, 3.0, favoured=small.dataset.labels >= 3)["as it is"].setting
    assert measure.setting.sample_rate == 2 * plain.sample_rate
    # charged at the usual rate, as if nobody were sampled more, the noise would be too little
    cheap = SampledGaussian(plain.noise_multiplier, measure.setting.sample_rate, plain.steps)
    assert epsilon(cheap, 1e-4, "rdp") > 4


def test_measures_refuse_what_makes_no_sense(small, refuses):
    nobody, some = np.zeros(60, dtype=bool), np.arange(60) < 9
    with refuses("0 of 60 images"):
        measures(small, 3.0, favoured=nobody)
    with refuses("boost is 0.5", "twice as often"):
        measures(small, 3.0, favoured=some, boost=0.5)
