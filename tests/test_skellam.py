"""Skellam noise: its probabilities, how it is drawn, and its privacy in one dimension against exact losses."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from skellam_check import chi_square, exact_pmf

from dopamine_lib.privacy import skellam
from dopamine_lib.privacy.gaussian import gaussian_delta
from dopamine_lib.privacy.loss import LossDistribution, epsilon_at
from dopamine_lib.privacy.randomness import Randomness, Stream
from dopamine_lib.privacy.skellam import LOG_ERROR, ORDERS, Sampler, gaussian_gap, log_pmf, sampled_rdp

VARIANCES = (3000, 3e5, 4e6, 5e10)  # cells of 1, 1, 4 and 512 integers


@pytest.mark.parametrize("variance", VARIANCES[:3])
def test_log_probabilities_are_skellam_s(variance):
    x, p = exact_pmf(variance)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (x @ p, (x * x) @ p) == pytest.approx((0, variance), abs=1e-6, rel=1e-11)
    fourth = (x**4.0) @ p
    assert fourth == pytest.approx(3 * variance**2 + variance, rel=1e-11)  # unlike the Gaussian's
    if variance == 3000:
        near = np.abs(x) < 300
        assert np.log(p[near]) == pytest.approx(stats.skellam.logpmf(x[near], 1500, 1500), abs=1e-10)


@pytest.mark.parametrize("x", [0, 1, 40, 300, 625])
def test_log_probabilities_have_the_stated_accuracy(x):
    import mpmath

    with mpmath.workdps(50):
        exact = mpmath.log(mpmath.besseli(x, 2500, maxterms=10**6)) - 2500
        assert abs(float(exact - mpmath.mpf(float(log_pmf(x, 2500.0))))) < LOG_ERROR / 2
        for term, variance in ((8, 2500.0), (0, 9e9)):  # and the series' next term is far below
            r = math.hypot(x + term, variance)
            assert 0.2 / r**4 < LOG_ERROR / 2


@pytest.mark.parametrize("variance", VARIANCES[:3])
def test_tail_bounds_hold_and_are_tight(variance):
    x, p = exact_pmf(variance)
    for deviations in (1, 3, 6, 9):
        t = math.ceil(deviations * math.sqrt(variance))
        exact = p[np.abs(x) >= t].sum()
        assert exact <= skellam.tail(t, variance) <= 12 * deviations * exact
    assert skellam.tail(0, variance) == skellam.tail(-5, variance) == 1


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("factor, accepted", [(1.0, True), (0.9, False), (1.1, False)])
def test_draws_have_the_right_probabilities_and_variance(variance, factor, accepted):
    """False alarm 1 in 1,000; a variance wrong by a tenth, either way, is rejected."""
    draws = Sampler(variance * factor).draw(Randomness(7).stream("noise", variance), 60_000)
    assert draws.dtype == np.int64
    assert (chi_square(draws, variance) > 1e-3) == accepted


@pytest.mark.parametrize("variance", VARIANCES[2:])
def test_low_bits_are_even(variance):
    """Within a cell all integers are about equally likely: their last two bits, false alarm 1 in 1,000."""
    draws = Sampler(variance).draw(Randomness(8).stream("noise"), 60_000)
    assert stats.chisquare(np.bincount(draws & 3, minlength=4)).pvalue > 1e-3
    assert stats.chisquare(np.bincount((draws >> 1) & 3, minlength=4)).pvalue > 1e-3


@pytest.mark.parametrize("rejecting", [True, False], ids=["rejecting", "planted: keeps all"])
def test_what_is_kept_has_the_right_shape_within_a_cell(rejecting, monkeypatch):
    """With 32 cells, each about a standard deviation wide, much is rejected; false alarm 1 in 1,000."""
    monkeypatch.setattr(skellam, "_MOST_CELLS", 32)
    sampler = Sampler(3e5)
    if not rejecting:
        sampler._sure = 1.0
    draws = sampler.draw(Randomness(9).stream("noise"), 60_000)
    assert (chi_square(draws, 3e5) > 1e-3) == rejecting


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_table_is_exact(variance):
    """Cells have the weight of their likeliest integer, and the excess is rejected."""
    sampler = Sampler(variance)
    weights = np.array([float(b - a) for a, b in zip([0, *sampler._ends], sampler._ends, strict=False)])
    expected = sampler._peak + math.log(sampler._width)
    error = np.log(weights / weights.sum()) - (expected - math.log(np.exp(expected).sum()))
    assert np.abs(error).max() < LOG_ERROR
    assert 1 - sampler._ends[-1] / 2**212 < 2**-50
    starts = sampler._first + sampler._width * np.arange(len(weights))
    for at in (starts, starts + sampler._width - 1):  # nothing in a cell is likelier than its peak, or below _sure
        ratio = np.exp(log_pmf(at, variance) - sampler._peak)
        assert ratio.max() <= 1 and ratio.min() >= sampler._sure
    assert sampler.outside < 1e-30


class Words(Stream):
    """A stream of the given values, for cases that hardly ever occur by chance."""

    def __init__(self, *values):
        self._values = list(values)

    def uniform(self, n):
        taken, self._values = self._values[:n], self._values[n:]
        return torch.tensor(taken, dtype=torch.float64)


@pytest.mark.parametrize("variance", VARIANCES[1:])
def test_where_53_bits_do_not_decide_more_are_drawn(variance):
    sampler = Sampler(variance)
    for j in (100, len(sampler._ends) // 2, len(sampler._ends) - 100):
        u = sampler._tops[j : j + 1]
        most = 1 - 2.0**-53
        ties = np.flatnonzero(sampler._tops == u[0])
        assert sampler._find(u, Words(0.0, 0.0, 0.0))[0] == ties[0]
        assert sampler._find(u, Words(most, most, most))[0] == ties[-1] + 1
    # the outermost cells together have less than 2^-53, and are still distinguished
    bits = sampler._ends[0]
    words = [((bits >> 53 * place) & (2**53 - 1)) * 2.0**-53 for place in (2, 1, 0)]
    assert sampler._find(np.array([0.0]), Words(*words))[0] == 1
    assert sampler._find(np.array([0.0]), Words(0.0, 0.0, 0.0))[0] == 0


def test_draws_outside_every_cell_are_repeated():
    sampler = Sampler(2500)
    most = 1 - 2.0**-53
    assert sampler._find(np.array([most]), Words(most, most, most))[0] == len(sampler._ends)
    assert abs(sampler.draw(Words(most, most, most, most, 0.5), 1)[0]) <= 1


@pytest.mark.parametrize("variance", [2499, 0, -1, math.inf, math.nan, 2.0**61])
def test_variances_without_exact_probabilities_are_refused(refuses, variance):
    with refuses("variance of a share", "change the scale"):
        Sampler(variance)


def renyi(order, log_p, log_q):
    return np.log(np.exp(order * log_p + (1 - order) * log_q).sum()) / (order - 1)


@pytest.mark.parametrize(
    "variance, shift, rate", [(2500, 43, 0.034), (2500, 43, 0.2), (2500, 10, 1.0), (4e4, 300, 0.01)]
)
def test_renyi_dp_bounds_the_exact_one_both_ways_and_closely(variance, shift, rate):
    x = exact_pmf(variance)[0]
    without = log_pmf(x, variance)
    with_patient = np.logaddexp(
        math.log1p(-rate) + without if rate < 1 else -np.inf, math.log(rate) + log_pmf(x - shift, variance)
    )
    curve = sampled_rdp(variance, shift, shift, rate)
    for order in (2, 3, 4, 6):
        removed, added = renyi(order, with_patient, without), renyi(order, without, with_patient)
        assert added <= removed * (1 + 1e-7)  # equal at rate 1
        assert removed <= curve[ORDERS.index(order)] <= removed * 1.2


@given(st.floats(1e-4, 0.9999), st.floats(1.001, 40), st.floats(1e-3, 6))
def test_removing_a_patient_costs_at_least_as_much_as_adding_one(rate, order, log_ratio):
    """The heart of Mironov, Talwar, Zhang 2019, theorem 5, for a point and its mirror image (see the module)."""
    ratio = math.exp(log_ratio)
    here, there = 1 - rate + rate * ratio, 1 - rate + rate / ratio
    removed = here**order + ratio * there**order
    added = here ** (1 - order) + ratio * there ** (1 - order)
    assert removed >= added * (1 - 1e-9)


def loss(variance, shift, rate, removed, pessimistic, step=2e-3):
    """Privacy loss of one sampled step in one dimension, on a grid."""
    reach = 8 * int(math.sqrt(variance))
    x = np.arange(-reach, reach + shift + 1)
    q = np.exp(log_pmf(x, variance))
    p = (1 - rate) * q + rate * np.exp(log_pmf(x - shift, variance))
    p, q = (p, q) if removed else (q, p)
    where = (np.ceil if pessimistic else np.floor)(np.log(p / q) / step).astype(int)
    masses = np.bincount(where - where.min(), weights=p)
    return LossDistribution(masses, int(where.min()), step, max(0.0, 1 - p.sum()) * pessimistic, pessimistic)


def test_epsilon_in_one_dimension_lies_above_the_exact_one_and_near_it():
    """100 steps of sigma 1.16 at q = 0.2, composed by convolution: between two bounds at most a fifth apart."""
    steps, delta, orders = 100, 1e-4, np.array(ORDERS)
    exact = [
        [epsilon_at(loss(2500, 43, 0.2, removed, pessimistic).times(steps), delta) for pessimistic in (False, True)]
        for removed in (True, False)
    ]
    rdp = steps * np.array(sampled_rdp(2500, 43, 43, 0.2))
    bound = (rdp - math.log(delta) / (orders - 1) + np.log1p(-1 / orders) - np.log(orders) / (orders - 1)).min()
    (low, high), (added_low, added_high) = exact
    assert added_high < low < high < low + 0.25
    assert high <= bound <= 1.25 * low
    halved = steps * np.array(sampled_rdp(2500, 43, 43, 0.1))  # planted: half the rate
    wrong = (halved - math.log(delta) / (orders - 1) + np.log1p(-1 / orders) - np.log(orders) / (orders - 1)).min()
    assert wrong < low


def differences(variance):
    """ln P(X = x) - ln P(round(N(0, v)) = x) at whole x up to 12 standard deviations: y (n,), and v times that (n,)."""
    std = math.sqrt(variance)
    x = np.unique(np.linspace(-12 * std, 12 * std, 401).round()).astype(int).tolist()
    with mpmath.workdps(60):
        ends = [[(abs(at) + side) / mpmath.sqrt(2 * variance) for side in (-0.5, 0.5)] for at in x]
        normal = [float(mpmath.log((mpmath.erfc(low) - mpmath.erfc(high)) / 2)) for low, high in ends]
    return np.array(x) / std, variance * (log_pmf(x, variance) - normal)


def test_skellam_noise_is_as_near_to_rounded_gaussian_noise_as_is_said():
    """At every x, and on average: the lemmas of ``gaussian_gap``, at the least variance."""
    y, apart = differences(10**6)
    assert (np.abs(apart) <= y**4 / 24 + 0.3 * y**2 + 0.2).all()
    assert 0.9 * 910 < np.abs(apart).max() < 910
    density = np.exp(-(y**2) / 2) / np.exp(-(y**2) / 2).sum()
    assert 0.03 < density @ apart**2 < 1.1 and abs(density @ apart) < 1e-3


@pytest.mark.parametrize("moved", [300, 1000, 3000])
def test_the_gaussians_bound_holds_for_one_skellam_variable(moved):
    """Delta worked out from all probabilities: with the gap no larger than the Gaussian's, without it the same."""
    variance = 1e6
    x = np.arange(-12_000, 12_001 + moved)
    without, with_patient = log_pmf(x, variance), log_pmf(x - moved, variance)
    t = gaussian_gap(1, variance)
    for epsilon in (0.0, 0.3, 1.0, 3.0):
        same, less = (np.maximum(np.exp(with_patient) - np.exp(epsilon + 2 * gap + without), 0).sum() for gap in (0, t))
        ideal = gaussian_delta(math.sqrt(variance), epsilon, moved)
        assert less <= math.exp(t) * ideal + 1e-12 and same == pytest.approx(ideal, rel=1e-3, abs=1e-12)
