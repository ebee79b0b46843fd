"""Discrete noise: what it spends, how far one patient moves it, and what a hospital sends."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from skellam_check import chi_square, exact_pmf

from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.privacy import integer_noise
from dopamine_lib.privacy.accounting import ACCOUNTANTS, SampledGaussian, epsilon, epsilons
from dopamine_lib.privacy.float_sums import FLOAT_SLACK
from dopamine_lib.privacy.integer_noise import IntegerNoise
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import BOX
from dopamine_lib.privacy.skellam import Sampler

Q, SIGMA, STEPS = 100 / 2930, 1.15, 3001
PACKED, WIDE, RING = 2**15 - 1, 2**23 - 1, 2**31 - 1


def head(**changes):
    """Discrete noise for the head in FSCDP, at the paper's parameters."""
    arguments = dict(total_range=PACKED, sample_rate=Q, steps=STEPS) | changes
    return IntegerNoise(SIGMA, 0.5, 10, 2565, **arguments)


def spent(noise, steps, delta, accountant="rdp_classic", colluding=0):
    return epsilon(noise.event(steps, colluding), delta, accountant)


def encode(noise, clipped_sum, stream):
    """A hospital's message, with randomness from the beginning of a stream."""
    return noise.combine(clipped_sum, noise.draw(stream)[0])


def test_sums_of_floats_pay_with_noise_for_their_rounding():
    noise = head(total_range=RING)
    due = (SIGMA * 0.5 * noise.scale * (1 + FLOAT_SLACK)) ** 2 / 10
    assert noise.share_variance == pytest.approx(due, rel=1e-12)
    assert noise.l2_sensitivity == pytest.approx(0.5 * noise.scale * (1 + FLOAT_SLACK), rel=1e-5)


def test_with_fine_units_the_bound_equals_that_of_gaussian_noise():
    """Golden: 10.832 by the classic conversion; the best order is a whole one, so whole orders cost nothing."""
    noise = head(total_range=RING)
    assert noise.inflation == pytest.approx(1, abs=1e-5)
    gaussian = epsilon(SampledGaussian(SIGMA, Q, STEPS), 1e-4)
    assert gaussian == pytest.approx(10.832, abs=1e-3)
    assert gaussian < spent(noise, STEPS, 1e-4) < gaussian + 0.025
    effective = epsilon(SampledGaussian(SIGMA / noise.inflation, Q, STEPS), 1e-4)
    assert effective < spent(noise, STEPS, 1e-4) < effective + 1e-3
    for accountant in ACCOUNTANTS:
        gaussian = epsilon(SampledGaussian(SIGMA, Q, STEPS), 1e-4, accountant)
        assert gaussian < spent(noise, STEPS, 1e-4, accountant) < gaussian + 2e-3


@pytest.mark.parametrize(
    "d, clip, total_range, rounding, inflation, cost",
    [
        (2565, 0.5, PACKED, "random", 1.0066, 10.96),
        (2565, 0.5, PACKED, "nearest", 1.0771, 12.47),
        (2565, 0.5, WIDE, "random", 1.0000, 10.83),
        (725_061, 2.0, PACKED, "random", 1.2048, 16.18),
        (725_061, 2.0, PACKED, "nearest", 2.3153, math.inf),
        (725_061, 2.0, WIDE, "random", 1.0000, 10.83),
        (725_061, 2.0, WIDE, "nearest", 1.0051, 10.93),
        (725_061, 2.0, RING, "random", 1.0000, 10.83),
    ],
)
def test_what_integers_cost(d, clip, total_range, rounding, inflation, cost):
    """FSCDP at delta 1e-4, where continuous noise spends 10.83: head and SqueezeNet, by the bits of a total."""
    noise = IntegerNoise(SIGMA, clip, 10, d, total_range=total_range, sample_rate=Q, steps=STEPS, rounding=rounding)
    assert noise.inflation == pytest.approx(inflation, abs=1e-4)
    assert spent(noise, STEPS, 1e-4) == pytest.approx(cost, abs=6e-3)


def test_epsilon_grows_with_steps_colluders_and_smaller_delta():
    noise = head()
    assert spent(noise, 0, 1e-4) == 0
    grows = [spent(noise, steps, 1e-4) for steps in (1, 100, 1000, STEPS)]
    assert grows == sorted(grows) and grows[0] > 0
    views = [spent(noise, STEPS, 1e-4, colluding=n) for n in (0, 1, 5)]
    assert views == sorted(views) and views[1] == pytest.approx(12.1, abs=0.1)
    assert spent(noise, STEPS, 1e-6) > grows[-1]
    assert spent(noise, STEPS, 1e-9) == math.inf  # less than the overflow and the roundings need
    nearest = head(rounding="nearest")  # this pays for its overflows, but leaves too little for the sampler's error
    hardly = nearest.overflow_probability() * (1 + 1e-6)
    assert nearest.event(STEPS).delta_left(hardly) > 0 and spent(nearest, STEPS, hardly) == math.inf


@pytest.mark.parametrize("name, classic, pld", [("CDP", 9.13, 7.48), ("FPDP", 19.08, 16.45), ("FSCDP", 10.83, 8.98)])
@pytest.mark.parametrize("model, d", [("head", 2565), ("squeezenet", 725_061)])
def test_discrete_noise_spends_what_gaussian_noise_spends(name, classic, pld, model, d, monkeypatch):
    """Golden, in every setting; Skellam's own Renyi-DP at whole orders, the fault put back, is looser."""
    setting = SETTINGS[name]
    plan = Plan(setting, CHOICES[model][name], (293,) * 10 if setting.federated else (2930,), d, discrete=True)
    event = plan.noise.event(setting.steps)
    assert event.twin and event.gap < 1e-4
    assert epsilon(event, 1e-4) == pytest.approx(classic, abs=6e-3)
    assert epsilon(event, 1e-4, "pld") == pytest.approx(pld, abs=6e-3)
    monkeypatch.setattr(integer_noise, "MOST_APART", -1.0)
    assert epsilon(event, 1e-4, "pld") is None
    assert epsilon(event, 1e-4) - classic == pytest.approx({"CDP": 0.07, "FPDP": 0.43, "FSCDP": 0}[name], abs=6e-3)


def test_discrete_and_gaussian_noise_compose_at_the_orders_both_know():
    """A Gaussian release before the training costs as much as before Gaussian training."""
    discrete, first = head(total_range=RING).event(STEPS), SampledGaussian(20.0, 1.0, 1)
    together = epsilon((first, discrete), 1e-4)
    assert together == pytest.approx(epsilon((discrete, first), 1e-4), rel=1e-12)
    gaussian = (first, SampledGaussian(SIGMA, Q, STEPS))
    assert epsilon(discrete, 1e-4) < together < epsilon(gaussian, 1e-4) + 0.1
    assert epsilons((first, discrete), 1e-4)["prv"] < epsilon(gaussian, 1e-4, "prv") + 2e-3
    assert epsilons((first, head().event(STEPS)), 1e-4)["prv"] is None  # of coarse units
    assert epsilon(discrete, 1e-4) < epsilon((discrete, discrete), 1e-4) < 2 * epsilon(discrete, 1e-4)


def test_fewer_survivors_are_paid_for_by_larger_shares():
    """If seven of ten survive, seven shares make sigma: the bound stays, but for the coarser units."""
    noise = head(least=7)
    assert noise.share_variance * 7 == pytest.approx((SIGMA * noise.scale * 0.5 * (1 + FLOAT_SLACK)) ** 2)
    assert noise.scale < head().scale
    assert spent(head(), STEPS, 1e-4) < spent(noise, STEPS, 1e-4) < spent(head(), STEPS, 1e-4) + 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 3), st.sampled_from(["spread", "one", "few"]))
def test_no_patient_moves_the_integers_further_than_the_sensitivity(seed, where, kind):
    """The same roundings with and without a patient, clamped or not: how far apart are the two messages?"""
    rng = np.random.default_rng(seed)
    for rounding in integer_noise.ROUNDINGS:
        noise = IntegerNoise(
            SIGMA, 0.5, 4, 400, total_range=PACKED, sample_rate=Q, steps=10, rounding=rounding, scale=800.0
        )
        gradient = rng.normal(size=400) * {"spread": 1, "one": np.arange(400) == 3, "few": np.arange(400) < 20}[kind]
        gradient *= 0.5 / np.linalg.norm(gradient)
        others = rng.normal(size=400) * where
        roundings, zeros = rng.random(400), np.zeros(400, np.int64)
        moved = noise.combine(others + gradient, (roundings, zeros)) - noise.combine(others, (roundings, zeros))
        assert np.linalg.norm(moved) <= noise.l2_sensitivity
        assert np.abs(moved).sum() <= noise.l1_sensitivity


def test_the_sensitivity_of_random_rounding_is_needed_to_the_quarter():
    """Planted: without d / 4 it would be exceeded every time, where every coordinate moves by half a unit."""
    d, moved_by = 90_000, 150.0  # C in units, half a unit per coordinate
    noise = IntegerNoise(SIGMA, 0.5, 4, d, total_range=PACKED, sample_rate=Q, steps=10, scale=2 * moved_by)
    gradient = np.full(d, 0.5 / math.sqrt(d))
    rng, zeros, lengths = np.random.default_rng(0), np.zeros(d, np.int64), []
    for _ in range(10):
        others, roundings = rng.normal(size=d) * 0.2, rng.random(d)
        with_patient, without = (noise.combine(own, (roundings, zeros)) for own in (others + gradient, others))
        lengths.append(np.linalg.norm(with_patient - without))
    assert np.mean(np.square(lengths)) == pytest.approx(moved_by**2 + d / 4, rel=0.02)
    assert max(lengths) < noise.l2_sensitivity < 1.05 * max(lengths)
    assert min(lengths) > 1.2 * moved_by
    assert noise.l2_sensitivity < 0.6 * (moved_by + math.sqrt(d))  # what rounding to nearest would need


def test_random_rounding_is_exact_on_average_and_nearest_is_not():
    x, zeros = np.full(200_000, 0.3 / 100), np.zeros(200_000, np.int64)
    means = {}
    for rounding in integer_noise.ROUNDINGS:
        noise = IntegerNoise(
            1.15, 1.0, 2, 200_000, total_range=PACKED, sample_rate=Q, steps=1, rounding=rounding, scale=100.0
        )
        means[rounding] = noise.combine(x, (noise.draw(Randomness(3).stream("r"))[0][0], zeros)).mean()
    assert means["random"] == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 200_000))  # false alarm 6e-5
    assert means["nearest"] == 0


@pytest.mark.parametrize("factor, accepted", [(1.0, True), (0.9, False), (1.1, False)])
def test_the_shares_of_all_hospitals_make_up_sigma(factor, accepted, monkeypatch):
    """The total's noise is Skellam of variance (sigma s C)^2, by chi-square; false alarm 1 in 1,000."""
    noise, randomness = head(), Randomness(5)
    monkeypatch.setattr(noise, "_sampler", Sampler(noise.share_variance * factor))
    zeros = np.zeros(2565)
    total = [sum(encode(noise, zeros, randomness.stream(step, k)) for k in range(10)) for step in range(20)]
    assert (chi_square(np.concatenate(total), noise.share_variance * 10) > 1e-3) == accepted


def test_what_is_decoded_is_the_sum_and_the_noise():
    noise, randomness, rng = head(), Randomness(6), np.random.default_rng(0)
    sums = rng.normal(size=(10, 2565)) * 0.02
    total = sum(encode(noise, own.astype(np.float32), randomness.stream(k)) for k, own in enumerate(sums))
    left = (noise.decode(total) - sums.sum(0)) / (SIGMA * 0.5)
    assert total.dtype == np.int64 and np.abs(total).max() <= PACKED
    assert stats.kstest(left, "norm").pvalue > 1e-3
    assert stats.kstest(left * 1.2, "norm").pvalue < 1e-3  # planted: a fifth too much


def test_a_block_of_steps_has_independent_draws():
    noise, stream = head(), Randomness(4).stream("block")
    roundings, drawn = map(np.stack, zip(*noise.draw(stream, 8), strict=True))
    assert roundings.shape == drawn.shape == (8, 2565) and drawn.dtype == np.int64
    assert 0 <= roundings.min() and roundings.max() < 1
    assert len(np.unique(roundings)) == roundings.size
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.1
    again = list(map(np.stack, zip(*noise.draw(Randomness(4).stream("block"), 8), strict=True)))
    assert (again[0] == roundings).all() and (again[1] == drawn).all()


def test_without_a_seed_no_noise_comes_twice():
    noise = head()
    first, second = (encode(noise, np.zeros(2565), Randomness().stream("FSCDP", 0)) for _ in range(2))
    assert (first != second).mean() > 0.9


def test_values_past_the_box_are_clamped_not_refused():
    """A refusal would tell of the patients: not even a NaN is refused."""
    noise = head()
    far = np.where(np.arange(2565) % 2, 50.0, -50.0)
    far[2:5] = np.nan, -np.inf, np.inf
    sent = noise.combine(far, (np.zeros(2565), np.zeros(2565, np.int64)))
    assert np.abs(sent).max() == noise.box_units == math.floor(BOX * noise.scale * 0.5) and set(sent) == {
        sent[0],
        sent[1],
    }


@pytest.mark.parametrize("least", [10, 7])
def test_overflow_stays_below_its_bound(least):
    noise = head(least=least)
    assert 0.9e-9 < noise.overflow_probability() <= 1e-9
    assert noise.overflow_probability(1) == pytest.approx(noise.overflow_probability() / STEPS)
    with pytest.raises(ValueError, match="take a smaller scale"):
        head(least=least, scale=noise.scale * 1.01)
    variance = noise.share_variance * 10
    room = PACKED - 10 * noise.box_units
    x, p = exact_pmf(variance)
    exact = p[np.abs(x) > room].sum() * 2565 * STEPS
    assert exact <= noise.overflow_probability() <= 100 * exact


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(rounding="up"), "rounding"),
        (dict(least=11), "least"),
        (dict(least=0), "least"),
        (dict(scale=-1.0), "scale"),
        (dict(scale=1e9), "scale"),
        (dict(scale=10.0), "variance of a share"),
        (dict(sample_rate=0), "sample rate"),
        (dict(total_range=100), "variance of a share"),
    ],
)
def test_parameters_out_of_range_are_refused(refuses, changes, said):
    with refuses(said):
        head(**changes)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda noise: spent(noise, 1, 0), "delta"),
        (lambda noise: spent(noise, 1, 1e-4, "gdp"), "accountant"),
        (lambda noise: noise.event(1, colluding=10), "colluding"),
        (lambda noise: noise.event(1.5), "number of steps"),
        (lambda noise: encode(noise, np.zeros(3), Randomness(0).stream()), "shape"),
    ],
)
def test_bad_requests_are_refused(refuses, call, said):
    with refuses(said):
        call(head())
