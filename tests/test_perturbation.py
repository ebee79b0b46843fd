"""Output perturbation: one patient never moves the answer farther than proven, and the noise is what that needs."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from dopamine_lib.fairness import output_perturbation as module
from dopamine_lib.fairness.alternatives import MEAN_NOISE, choose_regularisation, perturbed_head
from dopamine_lib.fairness.output_perturbation import TOLERANCE, clip_rows, output_perturbation, sensitivity, solve
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.privacy.gaussian import gaussian_delta
from dopamine_lib.privacy.randomness import Randomness


def material(seed=0, n=60, p=6, classes=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, p)), rng.integers(0, classes, n)


def test_what_l_bfgs_leaves_is_solved_all_the_same(monkeypatch):
    """A failure told of the patients for whom it stops. Planted: it stops at once, far from the answer."""
    features, labels = material()
    rows = clip_rows(features, radius=1.5)
    exact = solve(rows, labels, 4, regularisation=2.0)
    monkeypatch.setattr(module, "minimize", lambda objective, start, **terms: mock.Mock(x=start + 3))
    assert np.linalg.norm(solve(rows, labels, 4, regularisation=2.0) - exact) <= 2 * TOLERANCE / 2.0


def release(features, labels, hospitals=None, *, classes=4, seed=0, **changes):
    terms = dict(classes=classes, regularisation=2.0, radius=1.5, epsilon=1.0, delta=1e-4)
    hospitals = hospitals or [np.arange(len(labels))]
    return output_perturbation(features, labels, hospitals, randomness=Randomness(seed), **(terms | changes))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 25),
    regularisation=st.floats(0.01, 50),
    radius=st.floats(0.2, 5),
    hospitals=st.integers(1, 4),
)
def test_one_patient_never_moves_the_answer_beyond_the_bound(seed, n, regularisation, radius, hospitals):
    """Neighbours leave out one patient's loss; hospital sizes stay as they are."""
    features, labels = material(seed, n=n + hospitals, p=3)
    owner, total = np.arange(len(labels)) % hospitals, len(labels)
    rows = clip_rows(features, radius)

    def answer(present):
        mean = 0
        for k in range(hospitals):
            share = (owner == k).sum() / total
            own = (owner == k) & present
            mean = mean + share * solve(rows[own], labels[own], 4, share * regularisation)
        return mean

    everybody = np.ones(total, dtype=bool)
    patient = seed % total
    moved = np.linalg.norm(answer(everybody) - answer(everybody & (np.arange(total) != patient)))
    assert moved <= sensitivity(regularisation, radius)


def test_half_the_bound_would_not_hold():
    """Planted: a sensitivity of half. Of many grades, the first patient of one moves the answer by more than that."""
    rows = clip_rows(np.full((1, 2), 3.0), 1.0)
    moved = np.linalg.norm(solve(rows, np.array([3]), 10, 100.0) - solve(rows[:0], np.array([], dtype=int), 10, 100.0))
    assert 0.5 * sensitivity(100.0, 1.0) < moved <= sensitivity(100.0, 1.0)


def test_rows_are_clipped_to_the_radius_with_the_bias_inside():
    features, _ = material()
    rows = clip_rows(3 * features, 2.0)
    assert np.linalg.norm(rows, axis=1).max() <= 2.0 + 1e-12
    assert np.allclose(clip_rows(features / 100, 2.0)[:, :-1], features / 100)


@pytest.mark.parametrize("regularisation", [0.1, 5.0])
def test_the_answer_is_scikit_learns_and_as_exact_as_the_bound_assumes(regularisation):
    features, labels = material(1)
    rows = clip_rows(features, 2.0)
    own = solve(rows, labels, 4, regularisation)
    theirs = LogisticRegression(C=1 / regularisation, fit_intercept=False, tol=1e-8, max_iter=10_000)
    assert np.allclose(own, theirs.fit(rows, labels).coef_, atol=2 * TOLERANCE / regularisation)


@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_the_noise_spends_exactly_delta(epsilon):
    given = release(*material(), epsilon=epsilon)
    assert given.sensitivity == sensitivity(2.0, 1.5)
    assert gaussian_delta(given.noise, epsilon, given.sensitivity) == pytest.approx(1e-4, rel=1e-6)


def test_an_earlier_release_is_paid_for():
    """Two Gaussians are one whose 1 / sigma^2 is the sum: together they spend delta, and neither can be left out."""
    given = release(*material(), before=8.0)
    z = given.noise / given.sensitivity
    both = (z**-2 + 8.0**-2) ** -0.5
    assert gaussian_delta(both, 1.0) == pytest.approx(1e-4, rel=1e-6)
    assert given.noise > release(*material()).noise


@pytest.mark.parametrize("hospitals", [1, 3])
@pytest.mark.parametrize("scale, accepted", [(1.0, True), (0.9, False), (1.1, False)])
def test_what_is_released_carries_that_noise_and_no_other(hospitals, scale, accepted):
    """Rejects 0.9 and 1.1 times the noise, whether one curator adds it or hospitals add shares."""
    features, labels = material(2, p=300)
    split = np.array_split(np.arange(60), hospitals)
    clean = release(features, labels, split, epsilon=None)
    assert clean.noise == 0
    drawn = torch.cat([(release(features, labels, split, run=run).weights - clean.weights).ravel() for run in range(6)])
    noise = release(features, labels, split).noise
    assert (stats.kstest(drawn.double().numpy() / (scale * noise), "norm").pvalue > 0.01) == accepted


def test_runs_differ_and_a_seed_repeats_them():
    features, labels = material(3)
    first = release(features, labels).weights
    assert torch.equal(first, release(features, labels).weights)
    assert not torch.equal(first, release(features, labels, run=1).weights)
    assert not torch.equal(first, release(features, labels, seed=None).weights)


def test_the_mean_over_hospitals_is_near_the_answer_of_all():
    features, labels = material(4, n=400, p=3)
    together = release(features, labels, epsilon=None, regularisation=40.0).weights
    apart = release(features, labels, np.array_split(np.arange(400), 4), epsilon=None, regularisation=40.0).weights
    assert (together - apart).norm() < 0.2 * together.norm()


def test_bad_input_is_refused(refuses):
    with refuses("regularisation is 0", "without bound"):
        release(*material(), regularisation=0)
    with refuses("radius is inf"):
        release(*material(), radius=math.inf)
    with refuses("epsilon is 0.1", "raise one"):
        release(*material(), epsilon=0.1, before=1.0)


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_aptos):
    folder = make_aptos(tmp_path_factory.mktemp("eyes"))
    return Options(data="aptos", data_dir=str(folder), size=32, weights="random", hospitals=4, runs=2, seed=1)


@pytest.mark.parametrize("federated", [False, True])
def test_a_head_of_the_kits_patients_keeps_to_epsilon_with_the_mean_features(small, federated):
    experiment = Experiment.load(small, progress=False)
    head, graded = perturbed_head(experiment, 3.0, 5.0, federated=federated)
    assert graded.shape == (len(experiment.test), 5) and np.allclose(graded.sum(1), 1)
    z = head.noise / head.sensitivity
    assert gaussian_delta((z**-2 + MEAN_NOISE**-2) ** -0.5, 3.0) == pytest.approx(1e-4, rel=1e-6)
    clean, certain = perturbed_head(experiment, None, 5.0, federated=federated)
    assert clean.noise == 0 and not np.allclose(certain, graded)


def test_the_penalty_is_chosen_on_validation_patients(small):
    """Scored on them alone: spoiling the labels of test images changes nothing."""
    experiment = Experiment.load(small, progress=False).held_out()
    chosen = choose_regularisation(experiment, 3.0, federated=False, grid=(1.0, 20.0))
    labels = experiment.dataset.labels
    labels[experiment.dataset.test] = (labels[experiment.dataset.test] + 1) % 5
    assert choose_regularisation(experiment, 3.0, federated=False, grid=(1.0, 20.0)) == chosen
    seen = [perturbed_head(experiment, 3.0, 1.0, federated=False)[1].shape[0], len(experiment.dataset.validation)]
    assert seen[0] == seen[1]


def test_only_the_head_has_a_convex_loss(small, refuses):
    experiment = replace(Experiment.load(small, progress=False), options=replace(small, model="cnn"))
    with refuses("model is cnn", "head"):
        perturbed_head(experiment, 1.0, 1.0, federated=False)
