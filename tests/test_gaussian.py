"""The Gaussian mechanism against 50 digits of mpmath, Definition 2's failure, Lemma 1's shares, composition."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dopamine_lib.privacy import accounting
from dopamine_lib.privacy.accounting import ORDERS, SampledGaussian, rdp_epsilon
from dopamine_lib.privacy.composition import advanced, amplified, basic, optimal, rdp_curve
from dopamine_lib.privacy.dpsgd import noise_share
from dopamine_lib.privacy.gaussian import (
    analytic_epsilon,
    analytic_sigma,
    classic_sigma,
    gaussian_delta,
    remaining_sigma,
    share_for,
)

EPSILONS = st.floats(-3, 2).map(lambda power: 10**power)
DELTAS = st.floats(-12, math.log10(0.3)).map(lambda power: 10**power)


def reference_delta(sigma, epsilon, sensitivity=1):
    """Theorem 8 as it stands, with 50 digits."""
    with mpmath.workdps(50):
        mu, epsilon = mpmath.mpf(sensitivity) / mpmath.mpf(sigma), mpmath.mpf(epsilon)
        return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


def reference_sigma(epsilon, delta):
    """The root of theorem 8 with 50 digits, searched without looking at the library's answer."""
    with mpmath.workdps(50):
        target = mpmath.log(mpmath.mpf(delta))

        def excess(log_sigma):
            return mpmath.log(reference_delta(mpmath.exp(log_sigma), epsilon)) - target

        low, high = mpmath.mpf(-6), mpmath.mpf(12)
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return mpmath.exp(mpmath.findroot(excess, (low, high), solver="secant", tol=mpmath.mpf(10) ** -60))


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0])
def test_sigma_against_fifty_digits_on_a_grid(epsilon):
    for delta in (1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 0.3):
        assert abs(analytic_sigma(epsilon, delta) / reference_sigma(epsilon, delta) - 1) < 1e-9


@settings(max_examples=25, deadline=None)
@given(EPSILONS, DELTAS)
def test_sigma_against_fifty_digits_anywhere(epsilon, delta):
    assert abs(analytic_sigma(epsilon, delta) / reference_sigma(epsilon, delta) - 1) < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 1.5), st.floats(-6, 2.5))
def test_delta_against_fifty_digits(log_mu, log_epsilon):
    sigma, epsilon = 1 / 10**log_mu, 10**log_epsilon
    expected = reference_delta(sigma, epsilon)
    if expected > mpmath.mpf(10) ** -290:
        assert abs(gaussian_delta(sigma, epsilon) / expected - 1) < 1e-10
    else:
        assert 0 <= gaussian_delta(sigma, epsilon) < 1e-280


@settings(max_examples=200, deadline=None)
@given(EPSILONS, DELTAS, st.floats(1e-3, 1e3))
def test_the_two_directions_are_inverse_and_spend_exactly_delta(epsilon, delta, sensitivity):
    sigma = analytic_sigma(epsilon, delta, sensitivity)
    assert gaussian_delta(sigma, epsilon, sensitivity) == pytest.approx(delta, rel=1e-8)
    assert gaussian_delta(sigma, epsilon, sensitivity) <= delta * (1 + 1e-12)
    assert analytic_epsilon(sigma, delta, sensitivity) == pytest.approx(epsilon, rel=1e-8)
    assert sigma == pytest.approx(sensitivity * analytic_sigma(epsilon, delta), rel=1e-11)


@settings(max_examples=200, deadline=None)
@given(EPSILONS, DELTAS, st.floats(1.001, 10))
def test_monotone(epsilon, delta, factor):
    sigma = analytic_sigma(epsilon, delta)
    assert analytic_sigma(epsilon * factor, delta) < sigma
    assert analytic_sigma(epsilon, delta / factor) > sigma
    assert gaussian_delta(sigma * factor, epsilon) < gaussian_delta(sigma, epsilon)
    assert analytic_epsilon(sigma * factor, delta) < analytic_epsilon(sigma, delta)


def test_epsilon_is_zero_where_delta_alone_pays():
    assert analytic_epsilon(1000.0, 0.1) == 0
    assert gaussian_delta(1000.0, 0.0) < 0.1


def test_delta_where_the_formula_overflows_or_underflows():
    assert gaussian_delta(0.02, 800.0) == pytest.approx(1.0)
    assert gaussian_delta(100.0, 100.0) == 0.0
    assert gaussian_delta(1e-3, 0.0) == pytest.approx(1.0)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1), DELTAS)
def test_definition_2_is_enough_where_it_is_proven(epsilon, delta):
    assert gaussian_delta(classic_sigma(epsilon, delta), epsilon) < delta
    assert classic_sigma(epsilon, delta) > analytic_sigma(epsilon, delta)


@pytest.mark.parametrize("epsilon, delta", [(8, 1e-2), (8, 1e-3), (8, 1e-4), (10.83, 1e-4), (12, 1e-12), (20, 1e-6)])
def test_definition_2_adds_too_little_noise_beyond(epsilon, delta):
    """Register, row 8: past its crossing point the formula spends more delta than it declares."""
    assert gaussian_delta(classic_sigma(epsilon, delta), epsilon) > delta
    assert classic_sigma(epsilon, delta) < analytic_sigma(epsilon, delta)


@pytest.mark.parametrize("function", [classic_sigma, analytic_sigma])
@pytest.mark.parametrize(
    "arguments, said",
    [
        ((0, 1e-5), ("epsilon is 0",)),
        ((-1, 1e-5), ("epsilon is -1",)),
        ((math.nan, 1e-5), ("epsilon is nan",)),
        ((math.inf, 1e-5), ("epsilon is inf",)),
        ((1, 0), ("delta is 0", "(0, 1)", "1e-6")),
        ((1, 1), ("delta is 1", "(0, 1)")),
        ((1, math.nan), ("delta is nan",)),
        ((1, 1e-5, 0), ("sensitivity is 0", "clipping")),
        ((1, 1e-5, math.inf), ("sensitivity is inf", "clipping")),
        ((1, 1e-5, math.nan), ("sensitivity is nan",)),
    ],
)
def test_bad_input_is_refused(refuses, function, arguments, said):
    with refuses(*said):
        function(*arguments)


def test_bad_sigma_and_epsilon_are_refused(refuses):
    for sigma in (0, -1, math.nan, math.inf):
        with refuses("sigma is", "no bound"):
            gaussian_delta(sigma, 1.0)
        with refuses("sigma is"):
            analytic_epsilon(sigma, 1e-5)
    with refuses("epsilon is -0.1", "[0, "):
        gaussian_delta(1.0, -0.1)


def test_shares_add_up_and_what_absence_leaves():
    """Register, rows 1 and 9: the variance is over K, and every absence takes a share."""
    assert 10 * share_for(1.15, 10) ** 2 == pytest.approx(1.15**2)
    assert 2.0 * share_for(1.15, 10) == pytest.approx(noise_share(1.15, 2.0, 10))
    assert remaining_sigma(1.15, 10, 0) == 1.15
    assert remaining_sigma(1.15, 10, 1) == pytest.approx(1.15 * math.sqrt(0.9))
    assert remaining_sigma(1.15, 10, 9) == pytest.approx(share_for(1.15, 10))
    for least in range(1, 11):  # with the share for m honest hospitals, m of them make sigma
        everybody = math.sqrt(10) * share_for(1.15, 10, least)
        assert remaining_sigma(everybody, 10, 10 - least) == pytest.approx(1.15)


def test_a_simulation_of_shares():
    """Accepts the right share, rejects line 13's variance over sqrt(K): they are 40 standard errors apart."""
    rng, d = np.random.default_rng(0), 100_000
    shares = rng.normal(0, share_for(1.15, 10), (10, d))
    for absent in (0, 1, 5, 9):
        left = shares[absent:].sum(axis=0).std()
        assert abs(left / remaining_sigma(1.15, 10, absent) - 1) < 5 / math.sqrt(2 * d)
    line_13 = rng.normal(0, 1.15 / 10**0.25, (10, d)).sum(axis=0).std()
    assert abs(line_13 / 1.15 - 1) > 40 / math.sqrt(2 * d)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: remaining_sigma(1.15, 10, 10), ("absent hospitals is 10", "[0, 9]", "honest")),
        (lambda: remaining_sigma(1.15, 10, -1), ("absent hospitals is -1",)),
        (lambda: remaining_sigma(1.15, 10, 1.5), ("is 1.5", "whole")),
        (lambda: remaining_sigma(1.15, 0, 0), ("number of hospitals is 0",)),
        (lambda: remaining_sigma(0, 10, 0), ("sigma is 0",)),
        (lambda: share_for(1.15, 10, 0), ("honest hospitals is 0", "[1, 10]")),
        (lambda: share_for(1.15, 10, 11), ("honest hospitals is 11",)),
        (lambda: share_for(1.15, math.nan), ("number of hospitals is nan",)),
        (lambda: basic(1, 1e-5, 2.5), ("number of releases is 2.5", "whole")),
        (lambda: basic(0, 1e-5, 2), ("epsilon is 0",)),
        (lambda: advanced(1, 1e-5, 2, 0), ("slack is 0",)),
        (lambda: optimal(1, 1.0, 2, 1e-5), ("delta is 1.0", "[0, 1)")),
        (lambda: amplified(1, 1e-5, 1.5), ("sample rate is 1.5", "(0, 1]")),
        (lambda: rdp_curve(0.1, 0.1), ("noise multiplier is 0.1", "[0.2, 1000]")),
        (lambda: rdp_epsilon(rdp_curve(1.0, 0.1), ORDERS, 0), ("delta is 0",)),
    ],
)
def test_bad_input_of_shares_and_composition_is_refused(refuses, call, said):
    with refuses(*said):
        call()


def test_composition_of_known_values():
    assert basic(0.1, 1e-6, 100) == pytest.approx((10, 1e-4))
    # Dwork and Roth 2014, theorem 3.20, by hand
    assert advanced(0.1, 0.0, 100, 1e-5)[0] == pytest.approx(
        math.sqrt(200 * math.log(1e5)) * 0.1 + 10 * (math.e**0.1 - 1)
    )
    assert optimal(0.3, 0.0, 1, 1e-12)[0] == pytest.approx(0.3, rel=1e-6)
    assert optimal(1e-3, 0.0, 3, 0.1)[0] == 0  # the slack alone pays
    assert advanced(800, 0.0, 1, 1e-5)[0] == math.inf  # a bound that says nothing, not an overflow


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 2), st.integers(1, 300), st.floats(-9, -1))
def test_optimal_is_never_worse_than_basic_or_advanced(epsilon, times, power):
    slack = 10**power
    best, delta = optimal(epsilon, 1e-9, times, slack)
    assert best <= basic(epsilon, 1e-9, times)[0] * (1 + 1e-9)
    assert best <= advanced(epsilon, 1e-9, times, slack)[0] * (1 + 1e-9)
    assert delta <= advanced(epsilon, 1e-9, times, slack)[1] * (1 + 1e-9)


def test_optimal_against_brute_force():
    """Theorem 3.3 by listing all outcomes of k randomised responses."""
    epsilon, k, slack = 0.7, 6, 1e-3
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    best = optimal(epsilon, 0.0, k, slack)[0]
    spent = 0.0
    for answers in itertools.product((0, 1), repeat=k):
        p = math.prod(truth if answer else 1 - truth for answer in answers)
        q = math.prod(1 - truth if answer else truth for answer in answers)
        spent += max(0.0, p - math.exp(best) * q)
    assert spent == pytest.approx(slack, rel=1e-6)


@pytest.mark.parametrize("sigma", [2.0, 20.0])
def test_every_rule_bounds_gaussian_releases(sigma):
    """The truth is one release with sigma / sqrt(T); no rule may fall below it, the improved RDP by hardly more."""
    delta = 1e-5
    for times in (1, 10, 100):
        exact = analytic_epsilon(sigma / math.sqrt(times), delta)
        each = analytic_epsilon(sigma, delta / (2 * times)), delta / (2 * times), times
        rdp = times * rdp_curve(sigma, 1.0)
        bounds = [basic(*each)[0], advanced(*each, delta / 2)[0], optimal(*each, delta / 2)[0]]
        bounds += [rdp_epsilon(rdp, ORDERS, delta, improved) for improved in (False, True)]
        assert min(bounds) >= exact and bounds[-1] < 1.25 * exact


def test_a_sample_amplifies():
    assert amplified(1.0, 1e-5, 1.0) == pytest.approx((1.0, 1e-5))
    assert amplified(1e-3, 1e-5, 0.1) == pytest.approx((1e-4, 1e-6), rel=1e-3)
    assert amplified(900.0, 1e-5, 0.1)[0] == pytest.approx(900 + math.log(0.1))


@settings(max_examples=50, deadline=None)
@given(st.floats(0.5, 5), st.floats(0.01, 1), st.floats(0.1, 4))
def test_amplification_against_the_exact_delta_of_a_sampled_gaussian(sigma, q, epsilon):
    """The mixture (1 - q) N(0) + q N(1) against N(0): its exact delta is what the theorem says, never more."""
    after, delta = amplified(epsilon, gaussian_delta(sigma, epsilon), q)
    z = np.linspace(-12 * sigma, 1 + 12 * sigma, 40_001)
    without = np.exp(-(z**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    mixture = without * (1 - q + q * np.exp((2 * z - 1) / (2 * sigma**2)))
    exact = np.sum(np.maximum(mixture - math.exp(after) * without, 0)) * (z[1] - z[0])
    assert exact == pytest.approx(delta, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("sigma, q", [(0.364, 100 / 2930), (1.0, 50 / 2931), (1.15, 0.03), (2.0, 50 / 293), (4, 1)])
def test_the_fast_curve_is_the_accountants(sigma, q):
    """One integral for all orders against Opacus's closed forms."""
    rdp = rdp_curve(sigma, q)
    assert rdp == pytest.approx(accounting._rdp_per_step(sigma, q), rel=1e-6)
    event = SampledGaussian(sigma, q, 1000)
    for improved, accountant in ((False, "rdp_classic"), (True, "rdp")):
        expected = accounting.epsilon(event, 1e-4, accountant)
        assert rdp_epsilon(1000 * rdp, ORDERS, 1e-4, improved) == pytest.approx(expected, rel=1e-9)


def test_without_secure_aggregation_the_grid_of_orders_decides():
    """232 at the stated orders; a grid from 1.5 on says about twice as much, and both are valid."""
    curve = 3001 * rdp_curve(1.15 / math.sqrt(10), 100 / 2930)
    orders = np.array(accounting.ORDERS)
    bounds = curve - math.log(1e-4) / (orders - 1)
    assert bounds.min() == pytest.approx(232.0, abs=0.1) and orders[bounds.argmin()] == pytest.approx(1.2)
    assert bounds[orders >= 1.5].min() == pytest.approx(2.1 * 232, rel=0.02)
