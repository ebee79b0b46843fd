"""The private generator: a patient moves its moments by 1 at most, the noise is what that needs, and it is of use."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopamine_lib.auditing.audit import audit, claims
from dopamine_lib.fairness import private_generator as module
from dopamine_lib.fairness.private_generator import from_moments, moments, private_generator, release
from dopamine_lib.federation.experiment import Experiment
from dopamine_lib.federation.options import Options
from dopamine_lib.privacy.accounting import epsilon
from dopamine_lib.privacy.gaussian import gaussian_delta
from dopamine_lib.privacy.randomness import Randomness


def material(rng, n, p=4, classes=3):
    rows = rng.normal(size=(n, p))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.eye(classes)[rng.integers(0, classes, n)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 4), p=st.integers(1, 6))
def test_a_patient_moves_the_moments_by_one_at_most(seed, images, p):
    rng = np.random.default_rng(seed)
    rows, onehot = material(rng, 20 + images, p)
    shares = np.ones(len(rows))
    shares[20:] = 1 / images  # one patient, with images that may be of several grades
    with_them, without = moments(rows, onehot * shares[:, None]), moments(rows[:20], onehot[:20])
    moved = np.linalg.norm(with_them - without)
    assert moved <= 1 + 1e-9 and (images > 1 or moved == pytest.approx(1))


def test_a_part_too_long_would_break_it(monkeypatch):
    """Planted: the three parts' squared norms do not add up to 1."""
    monkeypatch.setattr(module, "MEANS", 1.0)
    assert np.linalg.norm(moments(*material(np.random.default_rng(0), 1))) > 1.05


def test_without_noise_the_moments_are_the_patients_own():
    rows, onehot = material(np.random.default_rng(0), 400)
    generator, labels = from_moments(moments(rows, onehot), 3, 400), onehot.argmax(1)
    assert generator.shares == pytest.approx(onehot.mean(0))
    means = np.array([rows[labels == c].mean(0) for c in range(3)])
    assert generator.means == pytest.approx(means)
    assert generator.root.T @ generator.root == pytest.approx(np.cov((rows - means[labels]).T, bias=True), abs=1e-9)
    drawn, classes = generator.draw(20_000, np.random.default_rng(1))
    assert np.bincount(classes) / 20_000 == pytest.approx(generator.shares, abs=0.02)
    again = from_moments(moments(drawn, np.eye(3)[classes]), 3, 20_000)
    assert again.means == pytest.approx(generator.means, abs=0.05)
    assert again.root.T @ again.root == pytest.approx(generator.root.T @ generator.root, abs=0.02)


def test_the_noise_of_all_hospitals_is_what_the_bound_needs():
    rows, onehot = material(np.random.default_rng(0), 60, p=80)
    parts = [moments(rows[own], onehot[own]) for own in np.array_split(np.arange(60), 4)]
    released, event = release(parts, 1.0, 1e-4, 60, Randomness(0))
    assert gaussian_delta(event.noise_multiplier, 1.0) == pytest.approx(1e-4, rel=1e-6)
    assert epsilon(event, 1e-4, "pld") == pytest.approx(1.0, rel=5e-3)
    assert np.std(released - sum(parts)) == pytest.approx(event.noise_multiplier, rel=0.06), "four shares make up sigma"
    again, _ = release(parts, 1.0, 1e-4, 60, Randomness(None))
    assert not np.array_equal(released, again)


def test_noise_alone_gives_a_generator_all_the_same():
    """Classes that noise would make empty, and a covariance that it would make negative."""
    rng = np.random.default_rng(0)
    for sigma in (1.0, 100.0):
        generator = from_moments(sigma * rng.normal(size=3 + 3 * 5 + 15), 3, 50, sigma)
        assert generator.shares.sum() == pytest.approx(1) and generator.shares.min() >= 0.0066
        assert np.isfinite(generator.draw(10, rng)[0]).all() and np.linalg.matrix_rank(generator.root) == 5


def test_heads_of_drawn_heart_patients_are_right_about_real_ones():
    experiment = Experiment.load(Options(data="heart", seed=0), progress=False)
    rows, truth = experiment.features.numpy()[experiment.test], experiment.dataset.labels[experiment.test]
    right = {}
    for target in (None, 1.0, 0.01):
        hits = []
        for run in range(6):
            generator, event = private_generator(experiment, target, run=run)
            head = generator.head(600, np.random.default_rng(run))
            hits.append(np.mean((rows @ head[:, :-1].T + head[:, -1]).argmax(1) == truth))
        right[target] = np.mean(hits)
    assert event.steps == 1 and right[None] > 0.78 and right[1.0] > 0.72
    assert right[0.01] < 0.68, "noise that hides everybody leaves nothing"


def test_moments_are_of_fixed_features(refuses):
    with refuses("model is mlp", "head or linear"):
        private_generator(Experiment.load(Options(data="heart", model="mlp", seed=0), progress=False), 1.0)


@pytest.mark.slow
def test_20_000_releases_keep_their_bound_and_none_below_it():
    rows, onehot = material(np.random.default_rng(0), 5, p=2)
    victim = moments(rows[-1:], onehot[-1:])
    worlds = []
    for with_victim in (True, False):
        parts, randomness = (
            [moments(rows[: 4 + with_victim], onehot[: 4 + with_victim])],
            Randomness(f"generator {with_victim}"),
        )
        worlds.append(np.array([release(parts, 1.0, 1e-4, 4, randomness, run)[0] @ victim for run in range(10_000)]))
    _, event = release(parts, 1.0, 1e-4, 4, Randomness(0))
    assert worlds[0].mean() - worlds[1].mean() == pytest.approx(1, abs=6 * event.noise_multiplier * math.sqrt(2e-4))
    assert not audit(*worlds, claims((event,)), 0.99).broken
    half = type(event)(2 * event.noise_multiplier, 1.0, 1)  # planted: what would cost less than half
    assert audit(*worlds, claims((half,)), 0.99).broken
