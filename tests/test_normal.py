"""Normal noise that is rounded exactly: its error is bounded, and its rounding has the right probabilities."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dopamine_lib.privacy import normal
from dopamine_lib.privacy.normal import ERROR, Normals
from dopamine_lib.privacy.randomness import Randomness

ALL = 2**53 - 1
#: Words near the ends of u's range, and near multiples of a quarter turn for v.
NASTY_U = [0, 1, 2, 3, 2**13, 2**14 + 1, 2**15, 2**20, ALL, ALL - 1, ALL - 2**20, ALL - 2**31, ALL - 2**33, ALL >> 1]
NASTY_V = [0, 1, ALL, *(turn * 2**50 + off for turn in range(1, 8) for off in (-1, 0, 1))]


class Words:
    """A stream that begins with chosen words; the others are random."""

    def __init__(self, *chosen):
        self.chosen, self.rest = list(chosen), Randomness(0).stream("words")

    def words(self, n):
        own, self.chosen = self.chosen[:n], self.chosen[n:]
        return torch.cat([torch.tensor(own, dtype=torch.int64), self.rest.words(n + 1)])[:n]


def worst_error(normals, indices):
    """The largest distance of the float64 values from what more bits make of them, relative to std."""
    worst = 0.0
    for index in indices:
        low, high = normals._interval(index, 0.0)
        worst = max(worst, *(abs(float(end - normals.values[index])) for end in (low, high)))
    return worst / normals.std


@pytest.mark.parametrize("name", ["log1p", "cos", "sin"])
def test_the_elementary_functions_are_far_more_exact_than_is_assumed(name):
    """At most 4 units in the last place are allowed for; PyTorch's vectors and their ends stay below 1."""
    u = Randomness(1).stream("u").uniform(1501)
    nasty = torch.tensor([word * 2.0**-53 for word in (NASTY_U if name == "log1p" else NASTY_V)], dtype=torch.float64)
    x = torch.cat([u, nasty]) * (-1.0 if name == "log1p" else 2 * torch.pi)
    for value, found in zip(x.tolist(), getattr(torch, name)(x).tolist(), strict=True):
        with mpmath.workprec(200):
            exact = getattr(mpmath, name)(mpmath.mpf(value))
            assert abs(found - exact) <= 1.01 * math.ulp(float(exact))


def test_the_values_are_as_exact_as_promised_wherever_u_and_v_lie(monkeypatch):
    pairs = [(u, v) for u in NASTY_U for v in NASTY_V]
    words = [u for u, _ in pairs] + [v for _, v in pairs]
    assert worst_error(Normals(Words(*words), 2 * len(pairs), 64.0), range(2 * len(pairs))) < ERROR
    # just within the radii whose pairs get no more bits: the worst of all
    edge = [2**15 + 1, ALL - 2**32 - 2**28]
    plain = Normals(Words(*edge, 2**40, 2**41), 4, 64.0)
    assert not plain._bits and ERROR / 20 < worst_error(plain, range(4)) < ERROR
    assert worst_error(Normals(Randomness(2).stream("n"), 1000, 3.0), range(1000)) < ERROR / 1000
    monkeypatch.setattr(normal, "RADII", (0.0, math.inf))  # planted: no more bits for anybody
    assert worst_error(Normals(Words(*words), 2 * len(pairs), 64.0), range(2 * len(pairs))) > ERROR


@settings(max_examples=50, deadline=None)
@given(st.integers(0, ALL), st.integers(0, ALL), st.floats(0.5, 2**20), st.floats(-(2.0**30), 2.0**30))
def test_a_variable_is_one_real_number_however_many_bits_are_drawn(u, v, std, x):
    """Asked again, with 64 more bits each time, it stays within what it was, and it rounds to the same integer."""
    drawn = Normals(Words(u, v), 2, std)
    for index in (0, 1):
        low, high = drawn._interval(index, 0.0)
        nearest = drawn.nearest(index, x)
        again = drawn._interval(index, 0.0)
        assert low <= again[0] <= again[1] <= high and drawn.nearest(index, x) == nearest
        with mpmath.workprec(400):
            assert nearest - 0.5 <= x + again[1] and x + again[0] <= nearest + 0.5


def test_neighbouring_floats_on_either_side_of_a_half_integer_are_rounded_apart():
    """Next to 0 floats lie closer than next to 0.5: added in float64 before more bits are drawn, both would be one."""
    drawn = Normals(Randomness(4).stream("n"), 20_000, 64.0)
    short = 0.5 - (drawn.values - np.floor(drawn.values))
    found = np.flatnonzero((short > 0) & (short < 2**-8))
    assert len(found) > 40
    for index in map(int, found):
        with mpmath.workprec(300):
            variable = sum(drawn._interval(index)) / 2
            exact = mpmath.floor(variable) + mpmath.mpf(0.5) - variable
        below = float(exact)
        below = below if below < exact else math.nextafter(below, 0)
        above = math.nextafter(below, 1)
        assert drawn.nearest(index, above) == drawn.nearest(index, below) + 1


def test_what_lies_next_to_a_half_integer_is_decided_by_more_bits():
    drawn = Normals(Randomness(3).stream("n"), 200, 64.0)
    for index in range(200):
        x = 0.5 - drawn.values[index] % 1  # to within float64, x + the variable is a half-integer
        nearest = drawn.nearest(index, x)
        with mpmath.workprec(300):
            low, high = drawn._interval(index, x)
            assert nearest - 0.5 <= low and high <= nearest + 0.5
            assert abs(abs(float((low + high) / 2 - nearest)) - 0.5) < 1e-11


@pytest.mark.parametrize("std, x", [(0.6, 0.3), (1.7, -0.5), (4.0, 0.25)])
def test_rounded_variables_have_the_probabilities_of_rounded_normal_variables(std, x):
    """Chi-square, false alarm 1 in 10^6, for float64 values and for values that are all computed bit by bit."""
    fast = Normals(Randomness(4).stream(str(std)), 200_000, std)
    slow = Normals(Randomness(5).stream(str(std)), 3000, std)
    assert chi_square(np.rint(fast.values + x), std, x) > 1e-6
    assert chi_square(np.array([slow.nearest(i, x) for i in range(3000)]), std, x) > 1e-6
    assert chi_square(np.rint(fast.values + x + std / 40), std, x) < 1e-6  # planted: a fortieth of std too far


def chi_square(drawn, std, x):
    """The p-value of integers as rounded draws from N(x, std^2)."""
    k = np.arange(-math.ceil(3.2 * std), math.ceil(3.2 * std) + 1)
    p = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], k[:-1] + 0.5, [np.inf]]), x, std))
    counts = np.bincount((np.clip(drawn, k[0], k[-1]) - k[0]).astype(int), minlength=len(k))
    return stats.chisquare(counts, len(drawn) * p).pvalue


@pytest.mark.parametrize("n", [1, 2, 4001])
def test_at_least_the_number_asked_for_is_drawn(n):
    assert n <= len(Normals(Randomness(0).stream("x"), n, 1.0).values) <= n + 1


@pytest.mark.parametrize("scale, accepted", [(1.0, True), (0.9, False), (1.1, False)])
def test_the_values_have_the_right_scale(scale, accepted):
    draws = Normals(Randomness(1).stream("noise"), 20_000, scale).values
    assert (stats.kstest(draws, "norm").pvalue > 0.01) == accepted


def test_noise_is_the_same_on_any_number_of_threads():
    drawn, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            drawn.append(Normals(Randomness(0).stream("noise"), 200_001, 1.5).values)
    finally:
        torch.set_num_threads(before)
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == drawn[2]).all()
