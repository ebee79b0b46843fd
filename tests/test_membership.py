"""Membership inference: scores and curves against other people's code, intervals that hold, bounds that are tight."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtr, ndtri
from sklearn.metrics import roc_auc_score, roc_curve

from dopamine_lib.auditing.membership import (
    ENOUGH_SHADOWS,
    Roc,
    confidence,
    likelihood_scores,
    loss_scores,
    most_true_positives,
)
from dopamine_lib.privacy.definitions import Gaussian, RandomisedResponse


def test_confidence_is_the_log_odds_of_the_true_grade():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 4, (3, 50, 5)), rng.integers(0, 5, 50)
    p = torch.softmax(torch.tensor(logits), -1).numpy()[:, np.arange(50), labels]
    phi = confidence(logits, labels)
    assert phi.shape == (3, 50) and np.allclose(phi, np.log(p / (1 - p)))
    loss = F.cross_entropy(torch.tensor(logits[0]), torch.tensor(labels), reduction="none")
    assert np.allclose(loss_scores(phi[0]), -loss.numpy())
    assert confidence([[1000.0, 0.0], [1000.0, 0.0]], [0, 1]).tolist() == [1000, -1000], "no overflow, no rounding"


def made_up(targets=20, patients=600, shift=1.0, hard=3.0, shadows=32, seed=0):
    """phi where membership adds ``shift`` to noise of 1, and patients differ by ``hard``: (phi, members, shadows)."""
    rng = np.random.default_rng(seed)
    level, members = rng.normal(0, hard, patients), rng.random((targets, patients)) < 0.5
    phi = level + shift * members + rng.normal(size=members.shape)
    return phi, members, level + rng.normal(size=(shadows, patients))


def test_the_likelihood_ratio_sees_what_the_loss_does_not():
    """Where patients differ in difficulty the loss says who is easy; LiRA subtracts that. 12,000 scores."""
    phi, members, shadows = made_up()
    loss, ratio = Roc(loss_scores(phi), members), Roc(likelihood_scores(phi, shadows), members)
    reached = ndtr(ndtri(0.01) + 1 / math.sqrt(1 + 1 / 32))  # the mean of 32 shadows has noise of its own
    assert ratio.rate(0.01) == pytest.approx(reached, abs=0.015)
    assert loss.rate(0.01) < 0.03 < 0.06 < ratio.rate(0.01)


def test_many_shadows_give_every_patient_a_spread_of_its_own():
    rng = np.random.default_rng(1)
    spread = np.array([0.1, 10.0])
    few, many = (spread * rng.normal(size=(count, 2)) for count in (ENOUGH_SHADOWS - 1, 2000))
    assert likelihood_scores([spread], many)[0] == pytest.approx([1, 1], abs=0.15)
    part = np.where(rng.random(few.shape) < 0.5, np.nan, few)  # a model trained on a patient does not count for it
    asked = likelihood_scores([[3.0, 3.0]], part)
    common = math.sqrt(np.mean(np.nanvar(part, axis=0, ddof=1)))
    assert asked[0] == pytest.approx([(3 - np.nanmean(part[:, i])) / common for i in (0, 1)])
    one = likelihood_scores([spread], few)[0] * math.sqrt(np.mean(few.var(axis=0, ddof=1)))
    assert one == pytest.approx(spread - few.mean(axis=0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=4, max_size=40),
    st.integers(1, 4),
)
def test_the_curve_is_scikit_learns(drawn, targets):
    """With ties, and with weights as the bootstrap has them."""
    scores, members, weights = (np.array([row[i] for row in drawn] * targets).reshape(targets, -1) for i in range(3))
    if not 0 < weights[members].sum() or not 0 < weights[~members].sum():
        return
    false, true = Roc(scores, members).curve(weights)
    terms = members.ravel(), scores.ravel()
    other_false, other_true, _ = roc_curve(*terms, sample_weight=weights.ravel(), drop_intermediate=False)
    points = set(zip(false.round(12), true.round(12), strict=True))
    assert points == set(zip(other_false.round(12), other_true.round(12), strict=True))
    area = roc_auc_score(*terms, sample_weight=weights.ravel())
    assert Roc(scores, members).auc(weights) == pytest.approx(area)


def test_the_rate_counts_no_more_non_members_than_it_may():
    """10 of 1,000 non-members stand above the first member; with one more the rate of 1 % is exceeded."""
    scores, members = np.r_[np.arange(1000.0), 989.5, 500.5][None], (np.arange(1002) >= 1000)[None]
    assert Roc(scores, members).rate(0.01) == 0.5
    assert Roc(np.append(scores, 990.5)[None], np.append(members, False)[None]).rate(0.01) == 0
    assert Roc(np.zeros((1, 2000)), np.arange(2000)[None] < 500).rate(0.01) == 0, "a constant score gains nothing"


def test_intervals_hold():
    """100 made-up audits whose true area is known. At a miss rate of 6.5 %, a little more than a percentile interval
    promises, more than 15 misses have a probability of 1e-3. Drawing scores one by one, as if they were independent,
    misses far more often."""
    rng, missed, naive = np.random.default_rng(2), 0, 0
    for audit in range(100):
        targets, patients = 6, 150
        members = np.tile(rng.random(patients) < 0.5, (targets, 1))
        own = rng.normal(size=patients)  # a patient's effect is the same in every target: scores are not independent
        scores = 0.5 * members + 0.8 * own + 0.6 * rng.normal(size=members.shape)
        truth = ndtr(0.5 / math.sqrt(2))
        roc = Roc(scores, members)
        _, low, high = roc.bootstrap([], resamples=60, seed=audit)["auc"]
        missed += not low <= truth <= high
        drawn = [roc.auc(rng.multinomial(members.size, np.full(members.size, 1 / members.size))) for _ in range(30)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        naive += not low <= truth <= high
    assert missed <= 15 < naive, (missed, naive)


def test_copies_of_one_target_do_not_narrow_the_interval():
    phi, members, _ = made_up(1, 800, hard=0)
    one = Roc(phi, members).bootstrap([0.05], seed=3)
    many = Roc(np.repeat(phi, 25, axis=0), np.repeat(members, 25, axis=0)).bootstrap([0.05], seed=4)
    for key in (0.05, "auc"):
        width, other = (figures[key][2] - figures[key][1] for figures in (one, many))
        assert 0.6 < other / width < 1.6, "25 copies taken for 25 targets would give 0.2"
        assert one[key][0] == many[key][0]


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 20), st.floats(0, 1), st.floats(0, 1), st.floats(-5, 5))
def test_no_attack_on_gaussian_noise_exceeds_the_bound(epsilon, sensitivity, rate, shift):
    noise = Gaussian(1.0, max(sensitivity, 1e-3))
    delta = noise.delta(epsilon)
    best = ndtr(ndtri(rate) + noise.shift)  # the likelihood-ratio test (Neyman and Pearson)
    assert best <= most_true_positives(rate, epsilon, delta) + 1e-9
    assert ndtr(ndtri(rate) + shift) <= 1  # and the bound is a probability
    assert 0 <= most_true_positives(rate, epsilon, delta) <= 1


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 4.0])
def test_the_bound_is_reached_and_without_delta_exceeded(epsilon):
    """Gaussian noise touches its (epsilon, delta) line, randomised response its corner: a smaller bound is wrong."""
    noise = Gaussian(1.0, 1.0)
    delta = noise.delta(epsilon)
    rate = ndtr(-(epsilon + 0.5))  # where the privacy loss is epsilon
    best = ndtr(ndtri(rate) + 1)
    assert best == pytest.approx(float(most_true_positives(rate, epsilon, delta)), rel=1e-9)
    assert best > most_true_positives(rate, epsilon, 0.5 * delta) > most_true_positives(rate, epsilon, 0)
    truth = RandomisedResponse.for_epsilon(epsilon).truth
    assert most_true_positives(1 - truth, epsilon, 0) == pytest.approx(truth)
    assert most_true_positives([0.0, 1.0], epsilon, 0).tolist() == [0.0, 1.0]


def test_a_gaussian_shift_is_found():
    """100,000 scores per side: the rate's standard error is 0.0005."""
    rng = np.random.default_rng(5)
    members = np.arange(200_000)[None] % 2 == 0
    roc = Roc(rng.normal(size=members.shape) + members, members)
    for rate in (0.001, 0.01):
        true = ndtr(ndtri(rate) + 1)
        assert roc.rate(rate) == pytest.approx(true, abs=6 * math.sqrt(true / 1e5) + 6 * math.sqrt(rate / 1e5) * 5)
    assert roc.auc() == pytest.approx(stats.norm.cdf(1 / math.sqrt(2)), abs=0.006)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Roc(np.zeros(4), np.ones(4, bool)), ("scores are (4,)", "one row per target")),
        (lambda: Roc(np.zeros((2, 3)), np.ones((3, 2), bool)), ("(2, 3)", "(3, 2)")),
        (lambda: Roc([[1.0, math.nan]], [[True, False]]), ("NaN",)),
        (lambda: Roc(np.zeros((1, 3)), np.ones((1, 3), bool)), ("0 of 3 are non-members",)),
        (lambda: Roc(np.zeros((1, 1000)), np.arange(1000)[None] < 100).rate(0.01), ("9.0 of 900", "more targets")),
        (lambda: Roc(np.zeros((1, 100)), np.arange(100)[None] < 9).bootstrap([0.01]), ("0.9 of 91",)),
        (lambda: Roc(np.zeros((1, 4)), np.arange(4)[None] < 2).rate(0.0), ("false-positive rate is 0.0",)),
        (lambda: likelihood_scores(np.zeros((2, 3)), np.zeros((1, 3))), ("1 models without", "train more")),
        (lambda: likelihood_scores(np.zeros((1, 2)), [[1, 1], [2, math.nan], [3, math.nan]]), ("1 models without",)),
        (lambda: likelihood_scores(np.zeros((2, 3)), np.zeros((5, 4))), ("same patients",)),
        (lambda: most_true_positives(0.1, -1, 0), ("epsilon is -1",)),
        (lambda: most_true_positives(0.1, 1, 2), ("delta is 2",)),
    ],
)
def test_bad_input_is_refused(refuses, call, said):
    with refuses(*said):
        call()
