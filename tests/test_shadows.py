"""Targets are reproduce's own models; shadow heads train as the kit does, in lock-step and with other randomness."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats

from dopamine_lib.auditing.membership import Roc, confidence, likelihood_scores, loss_scores, most_true_positives
from dopamine_lib.auditing.shadow_models import (
    other_split,
    poisson_samples,
    shadow_confidences,
    train_heads,
    train_targets,
)
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import SETTINGS, Choice
from dopamine_lib.federation.training import Training
from dopamine_lib.privacy.head import HeadTask
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.reproduction.run import reproduce

N, P, HOSPITALS, CLASSES = 130, 6, 4, 3


def data(seed=0):
    """Features (N, P) of norm 1 at most, and labels (N,) that depend on them."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(N, P, generator=rng)
    labels = (features @ torch.randn(P, CLASSES, generator=rng)).argmax(1)
    return features / features.norm(dim=1).max(), labels


def hospitals(seed=0):
    """Four hospitals of different sizes; a tenth of the patients in none."""
    order = np.random.default_rng(seed).permutation(N)[: 9 * N // 10]
    return np.split(order, [20, 50, 90])


def kit(declared, choice, patients, features, labels, run=0):
    """The head that the kit's own training hands out, as a matrix (classes, P + 1) for the features as they are."""
    task = HeadTask(torch.nn.Linear(P, CLASSES), features, labels)
    task.start.zero_()
    patients = patients if declared.federated else [np.concatenate(patients)]
    training = Training(Plan.of(declared, choice, task, patients), task, patients, Randomness(3), run=run).run()
    task.load(training.server.model)
    return torch.cat([task.net.weight, task.net.bias[:, None]], dim=1).detach()


CERTAIN = {
    "C": Choice(0.5, math.inf, averaging=10, mean_noise_multiplier=0.0),
    "clipped, last iterate": Choice(0.3, 0.2, momentum=0.5),
    "FSCDP": Choice(0.25, 0.5, averaging=10, mean_noise_multiplier=0.0),
    "F": Choice(0.2, math.inf, averaging=3, mean_noise_multiplier=0.0),
    "F, clipped": Choice(0.2, 0.1),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_with_nothing_left_to_chance_both_trainings_agree(name):
    """Everybody in every sample, every hospital in every round, no noise: the same numbers, for several models."""
    declared = SETTINGS[{"clipped, last iterate": "CDP", "F, clipped": "FPDP"}.get(name, name)]
    steps = min(declared.local_steps, 4)
    declared = replace(
        declared, sample_rate=1.0, rounds=30, local_steps=steps, participation=1.0, noise_multiplier=None
    )
    features, labels = data()
    patients = [hospitals(seed) for seed in range(3)]
    own = train_heads(features, labels, patients, declared, CERTAIN[name], classes=CLASSES)
    for model, split in enumerate(patients):
        theirs = kit(declared, CERTAIN[name], split, features, labels)
        assert torch.allclose(own[model], theirs, atol=2e-5), (own[model] - theirs).abs().max()
    wrong = replace(CERTAIN[name], momentum=0.8 * CERTAIN[name].momentum)
    assert not torch.allclose(train_heads(features, labels, patients, declared, wrong, classes=CLASSES), own, atol=2e-4)


@pytest.mark.parametrize("name", ["C", "FSCDP", "FPDP"])
def test_left_to_chance_they_agree_in_distribution(name):
    """32 models of each kind: mean and spread of a patient's phi. Twelve patients, three settings: two-sided tests at
    1e-5 each have a false-alarm rate below 1e-3 together, and fail where the noise is wrong by a factor of 3."""
    declared = replace(SETTINGS[name], rounds=20, local_steps=min(SETTINGS[name].local_steps, 4))
    declared = replace(declared, sample_rate=0.3, noise_multiplier=4.0 if declared.private else None)
    choice = Choice(0.2, 0.5 if declared.private else math.inf, averaging=10, mean_noise_multiplier=1.0)
    features, labels = data()
    patients, everybody = hospitals(), torch.cat([features, torch.ones(N, 1)], dim=1)[:12]
    theirs = torch.stack([kit(declared, choice, patients, features, labels, run) for run in range(32)])

    def compare(setting):
        own = train_heads(features, labels, [patients] * 32, setting, choice, classes=CLASSES, seed=1)
        one, other = (confidence((everybody @ heads.mT).numpy(), labels[:12]) for heads in (own, theirs))
        ratio = one.var(axis=0, ddof=1) / other.var(axis=0, ddof=1)
        spread = 2 * np.minimum(stats.f.sf(ratio, 31, 31), stats.f.cdf(ratio, 31, 31))
        return min(stats.ttest_ind(one, other, equal_var=False).pvalue.min(), spread.min())

    assert compare(declared) > 1e-5
    if declared.private:
        assert compare(declared.with_noise(declared.noise_multiplier / 3)) < 1e-5


@pytest.mark.parametrize("name, spread", [("FSCDP", 1.0), ("FPDP", math.sqrt(2))])
def test_the_noise_is_sigma_c(name, spread):
    """One step on features that are 0: the weights hold nothing but noise. 19,200 numbers, band of 5 standard errors.

    In FPDP the mean of two of four hospitals' changes carries sigma C sqrt(2) over the patients of both.
    """
    declared = replace(SETTINGS[name], rounds=1, local_steps=2, participation=0.5, sample_rate=0.25, noise_multiplier=2)
    declared = declared if name == "FPDP" else replace(declared, local_steps=1, participation=1.0)
    choice = Choice(0.1, 0.7, momentum=0.0)
    zeros, (_, labels) = torch.zeros(N, 32), data()
    equal = np.array_split(np.arange(120), HOSPITALS)
    heads = train_heads(zeros, labels, [equal] * 200, declared, choice, classes=CLASSES, seed=2)[..., :-1]
    patients = 60 if name == "FPDP" else 120
    expected = 0.1 * 2 * 0.7 * spread / (0.25 * patients) * math.sqrt(declared.local_steps)
    assert heads.std().item() / expected == pytest.approx(1, abs=5 / math.sqrt(2 * heads.numel()))


def test_poisson_samples_have_the_right_counts():
    """4,000 samples of groups of 5, 0 and 40 patients at rate 0.2: every patient's count within 5 standard errors, the
    sizes' variance too, and no two neighbours more often together than chance."""
    rng, sizes, rate, draws = np.random.default_rng(0), np.array([5, 0, 40]), 0.2, 4000
    present = np.zeros((draws, 45))
    for draw in range(draws):
        position, there = poisson_samples(sizes, rate, rng)
        assert position.shape == there.shape and not there[1].any()
        present[draw, position[0][there[0]]] += 1
        present[draw, 5 + position[2][there[2]]] += 1
    assert present.max() == 1, "nobody is drawn twice"
    error = math.sqrt(rate * (1 - rate) / draws)
    assert np.abs(present.mean(axis=0) - rate).max() < 5 * error
    sizes_drawn = present[:, 5:].sum(axis=1)
    assert sizes_drawn.var() / (40 * rate * (1 - rate)) == pytest.approx(1, abs=5 * math.sqrt(2 / draws))
    together = np.mean(present[:, :-1] * present[:, 1:], axis=0)
    assert np.abs(together - rate**2).max() < 5 * math.sqrt(rate**2 * (1 - rate**2) / draws)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0.001, 1), st.integers(0, 2**32))
def test_samples_lie_within_their_groups(sizes, rate, seed):
    sizes = np.array(sizes)
    position, there = poisson_samples(sizes, rate, np.random.default_rng(seed))
    assert len(position) == len(sizes) and (there.sum(axis=1) <= sizes).all()
    for own, size, here in zip(position, sizes, there, strict=True):
        assert (own[here] < size).all() and len(set(own[here])) == here.sum()
        assert rate < 1 or here.sum() == size


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_aptos):
    """An experiment of 60 small images with a random backbone, and its options."""
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    options = Options(
        data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4, seed=5, settings=("FSCDP",), runs=2
    )
    return Experiment.load(options, progress=False), options


def shorten(monkeypatch, rounds):
    """From here on every setting is planned with this many rounds."""
    declared = Experiment.plan

    def plan(self, name):
        whole = declared(self, name)
        return replace(whole, setting=replace(whole.setting, rounds=rounds))

    monkeypatch.setattr(Experiment, "plan", plan)


@pytest.fixture
def short(monkeypatch):
    """Settings with a few rounds only."""
    shorten(monkeypatch, 100)


def test_a_target_is_the_model_that_reproduce_writes(small, tmp_path, short):
    """Run 0 from the file, on the same split; and the bound is what results.json says."""
    experiment, options = small
    targets = train_targets(experiment, "FSCDP", 2)
    results = reproduce(replace(options, runs=1), tmp_path, progress=False, workers=1)
    state = load_file(tmp_path / "FSCDP-0.safetensors")
    logits = experiment.features @ state["weight"].T + state["bias"]
    assert np.allclose(targets.phi[0], confidence(logits, experiment.dataset.labels), rtol=1e-3, atol=0.01)
    assert np.flatnonzero(targets.members[0]).tolist() == experiment.dataset.train.tolist()
    assert targets.accuracy[0] == results["settings"]["FSCDP"]["test_accuracy"]["mean"]
    assert targets.epsilon == pytest.approx(results["settings"]["FSCDP"]["epsilon"]["prv"], rel=1e-9)
    assert not np.array_equal(*targets.members) and not np.array_equal(*targets.phi)


def test_other_splits_keep_people_together(small):
    experiment, _ = small
    person, seen = experiment.dataset.person, []
    for seed in range(6, 10):
        twin = other_split(experiment, seed)
        assert not np.intersect1d(person[twin.train], person[twin.test]).size
        assert np.array_equal(np.sort(np.concatenate(twin.patients)), twin.train)
        assert len(twin.train) == pytest.approx(len(experiment.train), abs=20)  # 60 patients: 6 standard deviations
        assert twin.sizes == experiment.sizes  # what divides is declared, whoever is dealt where
        seen.append(twin.test.tolist())
    assert len(set(map(tuple, seen))) == 4 and experiment.train is experiment.dataset.train


def test_shadows_leave_every_patient_out_of_half_of_them(small, refuses, monkeypatch):
    experiment, options = small
    shorten(monkeypatch, 3)
    for name in ("CDP", "FPDP"):
        phi = shadow_confidences(experiment, name, 6, seed=1)
        assert phi.shape == (6, 60) and (np.isnan(phi).sum(axis=0) == 3).all()
        # halves of 59 persons: the first two images are one person's, and a stranger's twin is no member
        assert set(np.isnan(phi[:, 1:]).sum(axis=1)) == {29, 30}
        assert (np.isnan(phi[:, 0]) == np.isnan(phi[:, 1])).all()
        assert np.array_equal(phi, shadow_confidences(experiment, name, 6, seed=1), equal_nan=True)
    for count in (2, 5):
        with refuses(f"{count} shadow models", "take 4, 6, 8"):
            shadow_confidences(experiment, "C", count)
    with refuses("--model head and linear only"):
        shadow_confidences(Experiment.load(replace(options, model="cnn"), progress=False), "C", 4)
    with refuses("FSCDP takes 3"):
        several = Experiment.load(replace(options, epsilon=5.0, local_steps=3), progress=False)
        shadow_confidences(several, "FSCDP", 4)


@pytest.mark.parametrize("name, rounds", [("C", 200), ("FPDP", 8), ("FSCDP", 200)])
def test_shadows_of_a_table_s_rows(name, rounds, monkeypatch):
    """Logistic regression on the heart-disease patients: a target's confidence is spread like its shadows'."""
    shorten(monkeypatch, rounds)
    experiment = Experiment.load(Options(data="heart", seed=0), progress=False)
    targets, phi = train_targets(experiment, name, 1), shadow_confidences(experiment, name, 4)
    assert phi.shape == (4, 920) and targets.members[0].sum() == len(experiment.train) == 630
    out = ~targets.members[0]
    typical = np.nanmean(phi[:, out], axis=0)
    assert np.corrcoef(typical, targets.phi[0, out])[0, 1] > 0.8
    assert 0.8 < typical.std() / targets.phi[0, out].std() < 1.25
    assert likelihood_scores(targets.phi, phi).shape == (1, 920)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_lira_on_the_models_of_reproduce(capsys):
    """The whole experiment on the embedded patients: 20 targets of each kind, some 14,600 pooled non-members.

    The attack finds members of the head without noise; the bounds hold. Private settings have fewer hospitals than
    ten, to be quick: FSCDP's total noise, so its model, is distributed alike, and FPDP's epsilon is the same.
    """
    kinds = [("C", None, 10), ("FPDP", None, 4), ("FSCDP", None, 2), ("FSCDP", 1.0, 2)]
    found, began = {}, time.perf_counter()
    for name, epsilon, hospitals in kinds:
        experiment = Experiment.load(Options(seed=0, epsilon=epsilon, hospitals=hospitals), progress=False)
        targets = train_targets(experiment, name, 20)
        scores = likelihood_scores(targets.phi, shadow_confidences(experiment, name, 8 if name == "FPDP" else 16))
        found[name, epsilon] = Roc(scores, targets.members).bootstrap([0.001, 0.01])
        loss = Roc(loss_scores(targets.phi), targets.members).bootstrap([0.001, 0.01])
        with capsys.disabled():
            print(f"\n{name}, epsilon {targets.epsilon}, accuracy {targets.accuracy.mean():.3f}")
            for attack, figures in (("LiRA", found[name, epsilon]), ("loss", loss)):
                print(f"  {attack}: {'; '.join(f'{key}: {np.round(figures[key], 4)}' for key in figures)}")
        if targets.epsilon is not None:
            assert epsilon is None or targets.epsilon <= epsilon
            for rate in (0.001, 0.01):
                assert found[name, epsilon][rate][1] <= most_true_positives(rate, targets.epsilon, 1e-4)
    with capsys.disabled():
        print(f"{time.perf_counter() - began:.0f} s")
    assert found["C", None][0.01][1] > 0.01 and found["C", None]["auc"][1] > 0.52
    assert found["FSCDP", 1.0][0.01][0] < found["C", None][0.01][0]


def test_shadow_models_of_a_balanced_loss_find_the_rare_class_as_its_targets_do():
    labels = (torch.arange(2000) % 10 == 0).long()
    features = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)) / 4
    features[:, 0] += 0.3 * labels
    declared, patients, found = replace(SETTINGS["FSCDP"], rounds=200), np.array_split(np.arange(2000), 5), {}
    for counts in (0.0, 0.5, 1.0):
        choice = Choice(0.5, 1.0, averaging=10, mean_noise_multiplier=20.0, counts=counts)
        (head,) = train_heads(features, labels, [patients], declared, choice, classes=2)
        called = (torch.nn.functional.pad(features, (0, 1), value=1.0) @ head.T).argmax(1)
        found[counts] = [float((called == c)[labels == c].float().mean()) for c in (0, 1)]
    assert found[0.0][1] < 0.1 and min(found[0.5]) > 0.5 and min(found[1.0]) > 0.5
