"""Gaussian noise on a public grid: its distance from the ideal, its size, and that nothing is ever refused."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dopamine_lib.encryption.codec import LAYOUTS
from dopamine_lib.federation.plan import Plan
from dopamine_lib.federation.settings import CHOICES, SETTINGS
from dopamine_lib.privacy import rounded_gaussian
from dopamine_lib.privacy.accounting import SampledGaussian, epsilon
from dopamine_lib.privacy.float_sums import FLOAT_SLACK
from dopamine_lib.privacy.normal import Normals
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian, most_in_a_sum

Q, SIGMA, STEPS, PACKED = 100 / 2930, 1.15, 3001, 2**15 - 1


def head(**changes):
    """The noise of the head in FSCDP, at the paper's parameters."""
    arguments = dict(hospitals=10, d=2565, total_range=PACKED, sample_rate=Q, patients=52) | changes
    return RoundedGaussian(SIGMA, 0.5, **arguments)


def total_pmf(xs, v, r):
    """P(total = r) of the integers round(x + N(0, v)), x in ``xs``, added up."""
    total = np.ones(1)
    for x in xs:
        ends = np.append(r - 0.5, r[-1] + 0.5)
        total = np.convolve(total, np.diff(stats.norm.cdf(ends, x, math.sqrt(v))))
    return total, len(xs) * r[0]


def ideal_pmf(xs, v, r):
    """P(round(sum of xs + N(0, H v) + U) = r) with U the sum of H - 1 uniforms, by Gauss and Legendre's quadrature."""
    at, weights = np.polynomial.legendre.leggauss(30)
    shifts, mass = np.zeros(1), np.ones(1)
    for _ in xs[1:]:
        shifts, mass = (shifts[:, None] + at / 2).ravel(), (mass[:, None] * weights / 2).ravel()
    ends = np.append(r - 0.5, r[-1] + 0.5)
    return mass @ np.diff(stats.norm.cdf(ends, sum(xs) + shifts[:, None], math.sqrt(len(xs) * v)), axis=1)


@pytest.mark.parametrize("v", [0.3, 0.6, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("xs", [(0.25, 0.25), (0.5, 0.0), (0.1, 0.7, -0.4)])
def test_a_total_is_as_close_to_the_ideal_as_the_module_says(xs, v):
    """Computed for small v, where it can be seen: both the probabilities and the total variation distance."""
    r = np.arange(-25, 26)
    sent, start = total_pmf(xs, v, r)
    ideal = ideal_pmf(xs, v, start + np.arange(len(sent)))
    hospitals, small = len(xs), math.exp(-(math.pi**2) * v)
    distance = np.abs(sent - ideal)
    assert distance.max() <= 12 * hospitals * small
    assert distance.sum() / 2 <= 100 * v * hospitals**2 * small
    # the bound is not an idle one: with two hospitals the exponent is the right one
    if hospitals == 2 and xs[0] == xs[1]:
        assert distance.max() > 0.05 * small
    # planted: without the uniforms, as if only the total had been rounded, it is far away
    once = np.diff(stats.norm.cdf(start + np.arange(len(sent) + 1) - 0.5, sum(xs), math.sqrt(hospitals * v)))
    assert np.abs(sent - once).max() > (12 * hospitals * small if v > 0.9 else 0)


def test_failure_is_what_the_module_derives_and_negligible_where_it_is_used():
    assert head().failure == 0.0  # below 10^-17,000, for d = 2565
    coarse = head(hospitals=150)
    v = coarse.share_variance
    assert 16 <= v < 64 and 0 < coarse.failure < 1e-60
    assert coarse.failure == pytest.approx(2565 * 100 * v * 150**2 * math.exp(-(math.pi**2) * v), rel=1e-6)
    assert epsilon(coarse.event(STEPS), 1e-4) == pytest.approx(epsilon(head().event(STEPS), 1e-4), abs=1e-6)
    assert head(hospitals=1, total_range=2**31).failure == 0.0


@pytest.mark.parametrize("colluding", [0, 1, 9])
@pytest.mark.parametrize("accountant", ["rdp_classic", "rdp", "prv"])
def test_it_spends_what_ideal_noise_spends(colluding, accountant):
    """Golden: 10.832 by the classic conversion against an outsider."""
    spent = epsilon(head().event(300, colluding), 1e-4, accountant)
    ideal = SampledGaussian(SIGMA * math.sqrt((10 - colluding) / 10), Q, 300)
    assert spent == epsilon(ideal, 1e-4, accountant)
    assert epsilon(head().event(STEPS), 1e-4) == pytest.approx(10.832, abs=1e-3)


@pytest.mark.parametrize("factor, accepted", [(1.0, True), (0.97, False), (1.03, False)])
@pytest.mark.parametrize("least", [10, 7])
def test_the_shares_of_the_least_survivors_make_up_sigma(factor, accepted, least):
    """False alarm 1 in 10^6, with the slack of floats and the variance of rounding in it."""
    noise, randomness, zeros = head(least=least), Randomness(5), np.zeros(2565)
    rows = [[noise.combine(zeros, noise.draw(randomness.stream(k, t))[0]) for k in range(least)] for t in range(20)]
    draws = noise.decode(np.sum(rows, axis=1).ravel()) / (SIGMA * 0.5 * (1 + FLOAT_SLACK) * factor)
    of_rounding = least / 12 / (least * noise.share_variance)
    p = stats.chi2.cdf(np.square(draws).sum() / (1 + of_rounding), draws.size)
    assert (5e-7 < p < 1 - 5e-7) == accepted
    assert stats.kstest(draws * factor, "norm").pvalue > 1e-6


def test_sums_of_floats_pay_with_noise_for_their_rounding_however_many_are_added():
    """52 patients at most are in the paper's sums, a curator's have 131, and FPDP's on MNIST 12,000."""
    assert most_in_a_sum(Q, 293) == 52
    assert stats.binom.sf(most_in_a_sum(Q, 6000), 6000, Q) < 1e-16
    for patients in (52, 131, 12_000):
        noise = head(patients=patients)
        assert noise.std / noise.scale == pytest.approx(SIGMA * 0.5 * (1 + FLOAT_SLACK) / math.sqrt(10), rel=1e-12)


@pytest.mark.parametrize("patients", [2, 52])
def test_what_is_sent_is_in_the_box_and_never_refused(patients):
    """A refusal would depend on the patients: infinities and NaN are sent as something else, like any value too far."""
    noise = head(patients=patients)
    far = np.resize([50.0, -50.0, math.nan, math.inf, -math.inf, 1e300, 0.01], 2565)
    sent = noise.combine(torch.from_numpy(far), noise.draw(Randomness(0).stream("far"))[0]) / noise.scale
    assert np.abs(sent).max() < noise.box + 6 * noise.std / noise.scale
    assert sent[0] > 0.9 * noise.box > -0.9 * noise.box > sent[1] and abs(sent[6]) < 6 * noise.std / noise.scale
    assert noise.box >= 0.5 * min(patients, rounded_gaussian.BOX)
    # whatever the sums, all boxes and 39 standard deviations of all noise fit the range
    assert 10 * noise.box * noise.scale + 39 * noise.std * math.sqrt(10) < PACKED


def test_a_message_is_rounded_once_exactly_where_float64_cannot_tell(monkeypatch):
    """Halves are decided by more bits: with every value taken for unsure, messages are the same."""
    noise, x = head(d=300), np.random.default_rng(0).normal(size=300)
    fast = noise.combine(x, noise.draw(Randomness(1).stream("m"))[0])
    monkeypatch.setattr(noise, "_sure", 0.0)
    assert (noise.combine(x, noise.draw(Randomness(1).stream("m"))[0]) == fast).all()
    asked, drawn = [], noise.draw(Randomness(1).stream("m"))[0]
    monkeypatch.setattr(Normals, "nearest", lambda self, index, value: asked.append(value) or 0)
    noise._sure = 0.5 - 1e-9
    half = (np.floor(x * noise.scale + drawn[0].values[:300]) + 0.5 - drawn[0].values[:300]) / noise.scale
    noise.combine(np.clip(half, -noise.box, noise.box), drawn)
    assert len(asked) == 300


def test_a_block_of_steps_has_independent_draws_and_repeats_when_seeded():
    noise, zeros = head(), np.zeros(2565)
    first, second = (
        [noise.combine(zeros, drawn) for drawn in noise.draw(Randomness(4).stream("block"), 4)] for _ in range(2)
    )
    assert all((one == other).all() for one, other in zip(first, second, strict=True))
    assert abs(np.corrcoef(first[0], first[1])[0, 1]) < 0.1 and (first[0] != first[1]).mean() > 0.9


@pytest.mark.parametrize("hospitals, layout", [(2, "packed"), (10, "packed"), (50, "packed"), (200, "wide")])
@pytest.mark.parametrize("aggregation", ["plain", "bfv", "masks"])
def test_the_narrowest_layout_that_holds_the_noise_is_taken(hospitals, layout, aggregation):
    """Messages under BFV keep their size, and the grid does not depend on how they are added."""
    plan = Plan(SETTINGS["FSCDP"], CHOICES["head"]["FSCDP"], (100,) * hospitals, 2565, aggregation=aggregation)
    assert plan.noise.total_range == LAYOUTS[layout].total_range
    assert plan.layout == ("ring32" if aggregation == "masks" else layout)
    assert plan.codec is plan.noise and plan.decoded(0, np.ones(1, np.int64))[0] == pytest.approx(
        1 / plan.mean_noise.scale
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(least=11), "least"),
        (dict(patients=0), "patients in a sum"),
        (dict(sample_rate=0), "sample rate"),
        (dict(total_range=500), "take a wider layout or fewer hospitals"),
        (dict(hospitals=400), "take a wider layout or fewer hospitals"),
    ],
)
def test_parameters_out_of_range_are_refused(refuses, changes, said):
    with refuses(said):
        head(**changes)


def test_another_shape_or_too_many_colluders_are_refused(refuses):
    with refuses("shape (3,)"):
        head().combine(np.zeros(3), head().draw(Randomness(0).stream("x"))[0])
    with refuses("10"):
        head().event(1, colluding=10)
