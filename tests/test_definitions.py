"""Definition 1: closed forms against integrals, loss distributions around closed forms, and what is refused."""

import math
import sys

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from dopamine_lib.errors import InputError
from dopamine_lib.privacy import definitions as dp
from dopamine_lib.privacy.loss import LossDistribution, epsilon_at

MECHANISMS = [
    dp.Laplace(1.0),
    dp.Laplace(0.4, 1.5),
    dp.Gaussian(1.0),
    dp.Gaussian(3.73, 1.0),
    dp.Gaussian(0.5, 2.0),
    dp.RandomisedResponse(0.75),
    dp.RandomisedResponse.for_epsilon(3.0),
]
NOISES = [mechanism for mechanism in MECHANISMS if hasattr(mechanism, "scale")]
EPSILONS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 9.0)


def by_name(mechanism):
    return repr(mechanism)


def gaussian_by_integration(scale, distance, epsilon):
    """The hockey-stick divergence from its definition, to 40 digits, without formulas for the normal distribution."""
    with mpmath.workdps(40):
        scale, distance, epsilon = mpmath.mpf(scale), mpmath.mpf(distance), mpmath.mpf(epsilon)

        def excess(y):
            return mpmath.npdf(y, 0, scale) - mpmath.exp(epsilon) * mpmath.npdf(y, distance, scale)

        crossing = distance / 2 - epsilon * scale**2 / distance  # the densities' ratio is e^epsilon here
        pieces = [crossing - 40 * scale, crossing - 8 * scale, crossing - 2 * scale, crossing]
        return float(mpmath.quad(excess, pieces))


@pytest.mark.parametrize("scale, distance", [(1, 1), (3.73, 1), (0.5, 2), (10, 1), (1, 3)])
@pytest.mark.parametrize("epsilon", [0, 0.01, 0.5, 1, 4, 8])
def test_hockey_stick_of_two_gaussians_is_the_analytic_formula(scale, distance, epsilon):
    own = dp.Gaussian(scale, distance).delta(epsilon)
    assert own == pytest.approx(gaussian_by_integration(scale, distance, epsilon), abs=1e-10)


@pytest.mark.parametrize("scale, distance, epsilon", [(1, 1, 6), (3.73, 1, 1), (0.5, 1, 20)])
def test_a_small_delta_of_the_gaussian_keeps_its_digits(scale, distance, epsilon):
    own = dp.Gaussian(scale, distance).delta(epsilon)
    reference = gaussian_by_integration(scale, distance, epsilon)
    assert 0 < reference < 1e-4 and own == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("mechanism", NOISES, ids=by_name)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_hockey_stick_is_the_integral_of_the_excess_density(mechanism, epsilon):
    def excess(y):
        p, q = mechanism.densities(y)
        return max(p - math.exp(epsilon) * q, 0.0)

    # both excesses are positive up to one output and zero beyond: for Laplace where its loss falls to epsilon
    kinks = sorted({0.0, mechanism.sensitivity, mechanism.sensitivity / 2 - epsilon * mechanism.scale / 2})
    if isinstance(mechanism, dp.Gaussian):
        kinks = [mechanism.sensitivity / 2 - epsilon * mechanism.scale**2 / mechanism.sensitivity]
    ends = [kinks[0] - 40 * mechanism.scale, *kinks]
    ends.append(ends[-1] + 40 * mechanism.scale)
    integral = sum(quad(excess, a, b, epsabs=1e-13, limit=200)[0] for a, b in zip(ends, ends[1:], strict=False))
    assert mechanism.delta(epsilon) == pytest.approx(integral, abs=1e-10)


@pytest.mark.parametrize("truth", [0.501, 0.75, 0.99])
def test_hockey_stick_of_randomised_response_is_that_of_its_table(truth):
    response = dp.RandomisedResponse(truth)
    p, q = response.densities(response.outputs())
    for epsilon in EPSILONS:
        assert response.delta(epsilon) == pytest.approx(dp.hockey_stick(p, q, epsilon), abs=1e-14)
        assert response.delta(epsilon) == pytest.approx(dp.hockey_stick(q, p, epsilon), abs=1e-14)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=by_name)
def test_delta_takes_arrays_falls_and_starts_at_the_total_variation(mechanism):
    grid = np.linspace(0, 10, 101)
    curve = mechanism.delta(grid)
    assert curve.shape == (101,) and np.all(np.diff(curve) <= 1e-15) and np.all(curve >= 0)
    assert curve[10] == mechanism.delta(1.0) and isinstance(mechanism.delta(1.0), float)
    y = mechanism.outputs(40_001)
    p, q = mechanism.densities(y)
    width = y[1] - y[0] if isinstance(mechanism, dp.Laplace | dp.Gaussian) else 1
    assert curve[0] == pytest.approx(np.abs(p - q).sum() * width / 2, abs=1e-3)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=by_name)
def test_the_loss_is_the_logarithm_of_the_densities_ratio(mechanism):
    y = mechanism.outputs(101)
    p, q = mechanism.densities(y)
    assert np.allclose(mechanism.loss(y), np.log(p / q), atol=1e-9)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=by_name)
def test_the_distribution_of_the_loss_gives_the_hockey_stick(mechanism):
    """delta = the integral over losses above epsilon of e^(epsilon - loss) Pr[L > loss]."""
    top = min(mechanism.loss_range[1], 60)
    for epsilon in EPSILONS:

        def tail(loss, epsilon=epsilon):
            return math.exp(epsilon - loss) * (1 - mechanism.loss_cdf(loss))

        integral = quad(tail, epsilon, max(top, epsilon))
        assert mechanism.delta(epsilon) == pytest.approx(integral[0], abs=1e-7)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=by_name)
def test_the_loss_of_samples_has_the_stated_distribution(mechanism):
    rng = np.random.default_rng(0)
    losses = mechanism.loss(mechanism.release(np.zeros(20_000, dtype=int), rng))
    for at in np.linspace(*mechanism.loss_range, 13)[1:-1]:
        assert np.mean(losses <= at) == pytest.approx(mechanism.loss_cdf(at), abs=0.015)


@pytest.mark.parametrize("scale, accepted", [(1.0, True), (0.9, False), (1.1, False)])
@pytest.mark.parametrize("kind, family", [(dp.Laplace, "laplace"), (dp.Gaussian, "norm")])
def test_released_noise_has_the_right_scale(kind, family, scale, accepted):
    draws = kind(2.5).release(np.full(20_000, 7.0), np.random.default_rng(1)) - 7.0
    assert (stats.kstest(draws / (2.5 * scale), family).pvalue > 0.01) == accepted


def test_randomised_response_tells_the_truth_as_often_as_it_says():
    told = dp.RandomisedResponse(0.8).release(np.ones((100, 200), dtype=int), np.random.default_rng(2))
    assert told.shape == (100, 200) and set(np.unique(told)) == {0, 1}
    assert stats.binomtest(int(told.sum()), told.size, 0.8).pvalue > 0.01


# --- the loss on a grid


@pytest.mark.parametrize("step", [1e-3, 0.0173])
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=by_name)
def test_loss_distributions_sandwich_the_closed_form(mechanism, step):
    grid = np.linspace(0, 12, 97)
    exact = mechanism.delta(grid)
    above = LossDistribution.of(mechanism, step=step).delta(grid)
    below = LossDistribution.of(mechanism, step=step, pessimistic=False).delta(grid)
    assert np.all(below <= exact + 1e-13) and np.all(exact <= above + 1e-13)
    assert np.all(above - below <= 2 * step)


@settings(max_examples=40, deadline=None)
@given(shift=st.floats(0.05, 4), epsilon=st.floats(0, 8), step=st.floats(0.002, 0.2))
def test_loss_distributions_sandwich_any_gaussian_and_laplace(shift, epsilon, step):
    for mechanism in (dp.Gaussian(1 / shift), dp.Laplace(1 / shift)):
        above = LossDistribution.of(mechanism, step=step).delta(epsilon)
        below = LossDistribution.of(mechanism, step=step, pessimistic=False).delta(epsilon)
        assert below - 1e-13 <= mechanism.delta(epsilon) <= above + 1e-13


@pytest.mark.parametrize("releases", [2, 3, 10])
def test_composed_gaussians_sandwich_one_gaussian_further_apart(releases):
    """n releases of N(0, s^2) tell as much as one at a distance sqrt(n) times as large."""
    once, grid = dp.Gaussian(2.0), np.linspace(0, 8, 33)
    exact = dp.Gaussian(2.0, math.sqrt(releases)).delta(grid)
    above = LossDistribution.of(once).times(releases).delta(grid)
    below = LossDistribution.of(once, pessimistic=False).times(releases).delta(grid)
    assert np.all(below <= exact + 1e-12) and np.all(exact <= above + 1e-12)
    assert np.all(above - below <= 2 * releases * 1e-3)


@pytest.mark.parametrize("releases", [2, 5, 8])
def test_composed_responses_sandwich_the_table_of_all_answers(releases):
    response = dp.RandomisedResponse(0.7)
    p, q = tables = response.densities(response.outputs())
    for _ in range(releases - 1):
        p, q = np.kron(p, tables[0]), np.kron(q, tables[1])
    above = LossDistribution.of(response).times(releases)
    below = LossDistribution.of(response, pessimistic=False).times(releases)
    for epsilon in EPSILONS:
        exact = dp.hockey_stick(p, q, epsilon)
        assert below.delta(epsilon) - 1e-12 <= exact <= above.delta(epsilon) + 1e-12
        assert above.delta(epsilon) - below.delta(epsilon) <= 2 * releases * 1e-3


def test_unlike_mechanisms_compose_in_any_order():
    one, other = LossDistribution.of(dp.Laplace(2.0)), LossDistribution.of(dp.Gaussian(2.0))
    there, back = one.compose(other), other.compose(one)
    assert there.delta(0.7) == pytest.approx(back.delta(0.7), abs=1e-14)
    assert there.masses.sum() + there.infinite == pytest.approx(1)
    assert there.delta(0.7) > max(dp.Laplace(2.0).delta(0.7), dp.Gaussian(2.0).delta(0.7))


def test_grids_that_do_not_fit_are_refused(refuses):
    fine = LossDistribution.of(dp.Gaussian(1.0))
    with refuses("0.001", "0.01", "alike"):
        fine.compose(LossDistribution.of(dp.Gaussian(1.0), step=0.01))
    with refuses("rounding"):
        fine.compose(LossDistribution.of(dp.Gaussian(1.0), pessimistic=False))
    with refuses("points", "widen"):
        LossDistribution.of(dp.Gaussian(1.0), step=1e-7)
    with refuses("points", "widen"):
        fine.times(1000)
    with refuses("whole"):
        fine.times(1.5)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=by_name)
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.1])
def test_epsilon_at_is_the_inverse_of_delta(mechanism, delta):
    epsilon = epsilon_at(mechanism, delta)
    assert mechanism.delta(epsilon) <= delta
    assert epsilon == 0 or mechanism.delta(max(epsilon - 1e-6, 0)) > delta


def test_pure_and_approximate():
    assert epsilon_at(dp.Laplace.for_epsilon(1.3), 0.0) == pytest.approx(1.3, abs=1e-8)
    assert epsilon_at(dp.RandomisedResponse.for_epsilon(1.3), 0.0) == pytest.approx(1.3, abs=1e-8)
    assert dp.Gaussian(1.0).delta(30.0) > 0  # at no epsilon is the Gaussian pure
    assert epsilon_at(dp.Gaussian(1.0), 0.0) == math.inf
    assert epsilon_at(dp.Gaussian(0.01), 1e-9) == math.inf  # beyond what is searched


# --- what follows from the definition


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 3))
def test_post_processing_never_gains(seed, epsilon):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(6, 0.5), 2)
    kernel = rng.dirichlet(np.full(4, 0.3), 6)  # a row is the distribution that one output is mapped to
    assert dp.hockey_stick(p @ kernel, q @ kernel, epsilon) <= dp.hockey_stick(p, q, epsilon) + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(-50, 20), st.floats(0.5, 60), st.data())
def test_no_patient_moves_a_clamped_sum_by_more_than_the_sensitivity(ages, low, width, data):
    high, who = low + width, data.draw(st.integers(0, len(ages) - 1))
    whole = dp.clamp(ages, low, high).sum()
    without = dp.clamp(ages[:who] + ages[who + 1 :], low, high).sum()
    replaced = dp.clamp([*ages[:who], data.draw(st.floats(-1e3, 1e3)), *ages[who + 1 :]], low, high).sum()
    assert abs(whole - without) <= dp.sensitivity("sum", low, high) + 1e-9
    assert abs(whole - replaced) <= dp.sensitivity("sum", low, high, adjacency="replace") + 1e-9


def test_sensitivities_are_reached():
    # register, row 16
    assert dp.sensitivity("count") == dp.sensitivity("count", adjacency="replace") == 1
    assert dp.sensitivity("sum", -1, 1) == 1 and dp.sensitivity("sum", -1, 1, adjacency="replace") == 2
    assert dp.sensitivity("sum", 0, 4) == dp.sensitivity("sum", 0, 4, adjacency="replace") == 4
    assert dp.sensitivity("mean", -3, 2, n=100) == pytest.approx(0.03)
    assert dp.clamp([math.inf, -5, 3], 0, 4).tolist() == [4, 0, 3]


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 3), st.floats(0.05, 5), st.integers(1, 6))
@example(0.12051997990639912, 4.5625, 3)  # one image's delta underflows to 0, three images' just does not
def test_group_privacy_holds_for_the_gaussian_and_is_the_chain_of_definitions(shift, epsilon, size):
    delta = dp.Gaussian(1 / shift).delta(epsilon)
    group_epsilon, group_delta = dp.group_privacy(epsilon, delta, size)
    assert group_epsilon == pytest.approx(size * epsilon)
    chain = delta * sum(math.exp(i * epsilon) for i in range(size))
    assert group_delta == pytest.approx(min(1, chain), rel=1e-9)
    smallest = sys.float_info.min  # below it floats lose their digits
    assert dp.Gaussian(1 / shift, size).delta(group_epsilon) <= group_delta * (1 + 1e-9) + smallest


def test_group_privacy_is_tight_for_laplace_and_never_overflows():
    assert epsilon_at(dp.Laplace(2.0, 3.0), 0.0) == pytest.approx(dp.group_privacy(0.5, 0.0, 3)[0], abs=1e-8)
    assert dp.group_privacy(1.0, 0.0, 10**6) == (1e6, 0.0)
    assert dp.group_privacy(1.0, 1e-300, 10**6) == (1e6, 1.0)


def test_basic_composition_holds_and_is_reached_by_pure_mechanisms():
    assert dp.basic_composition((0.5, 1e-6), (1.0, 0.0), (1.5, 1e-5)) == (3.0, pytest.approx(1.1e-5))
    p, q = dp.RandomisedResponse.for_epsilon(0.5).densities([0, 1])
    assert dp.hockey_stick(np.kron(p, p), np.kron(q, q), 1.0) == pytest.approx(0, abs=1e-12)
    assert dp.hockey_stick(np.kron(p, p), np.kron(q, q), 0.99) > 1e-4


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_central_and_local_counts_are_unbiased_with_the_stated_error(epsilon, share):
    rng, n, trials = np.random.default_rng(3), 500, 4000
    bits = (np.arange(n) < share * n).astype(int)
    for count, error in (
        (lambda bits, e, rng: dp.Laplace.for_epsilon(e).release(np.sum(bits), rng), dp.central_error(epsilon)),
        (dp.local_count, dp.local_error(epsilon, n)),
    ):
        estimates = np.array([count(bits, epsilon, rng) for _ in range(trials)])
        assert abs(estimates.mean() - share * n) < 4 * error / math.sqrt(trials)
        assert estimates.std() == pytest.approx(error, rel=0.08)  # rejects 0.9 and 1.1 times the stated error


def test_the_local_error_is_the_textbook_formula_and_grows_with_n():
    assert dp.local_error(1.0, 100) == pytest.approx(10 * math.exp(0.5) / (math.e - 1))
    assert dp.local_error(1.0, 400) == pytest.approx(2 * dp.local_error(1.0, 100))
    assert dp.central_error(1.0) == pytest.approx(math.sqrt(2))


# --- what is refused


@pytest.mark.parametrize("epsilon", [0, -1, math.nan, math.inf, 1e4])
@pytest.mark.parametrize(
    "use",
    [
        dp.Laplace.for_epsilon,
        dp.RandomisedResponse.for_epsilon,
        dp.central_error,
        lambda e: dp.local_error(e, 10),
        lambda e: dp.group_privacy(e, 0.0, 2),
        lambda e: dp.basic_composition((1.0, 0.0), (e, 0.0)),
    ],
)
def test_an_epsilon_out_of_range_is_refused(use, epsilon, refuses):
    with refuses("epsilon", str(epsilon), "(0, 500", "useful bound"):
        use(epsilon)


@pytest.mark.parametrize(
    "mechanism", [*MECHANISMS, LossDistribution.of(dp.Gaussian(1.0))], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("epsilon", [-0.1, math.nan, np.array([0.5, -1.0]), np.array([1.0, math.nan])])
def test_a_curve_refuses_epsilons_below_zero(mechanism, epsilon, refuses):
    with refuses("epsilon", "[0, 500"):
        mechanism.delta(epsilon)


@pytest.mark.parametrize("delta", [-1e-9, 1, 2.0, math.nan])
def test_a_delta_outside_its_range_is_refused(delta, refuses):
    for use in (
        lambda: dp.group_privacy(1.0, delta, 2),
        lambda: dp.basic_composition((1.0, delta)),
        lambda: epsilon_at(dp.Gaussian(1.0), delta),
    ):
        with refuses("delta", str(delta), "[0, 1)", "1 / patients"):
            use()


@pytest.mark.parametrize("kind", [dp.Laplace, dp.Gaussian])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_noise_and_sensitivity_must_be_positive(kind, value, refuses):
    with refuses("noise scale", str(value), "no bound"):
        kind(value)
    with refuses("sensitivity", str(value), "no noise"):
        kind(1.0, value)


@pytest.mark.parametrize("truth", [0.5, 0.3, 1.0, math.nan])
def test_a_coin_that_says_nothing_or_everything_is_refused(truth, refuses):
    with refuses("truth", str(truth), "(0.5, 1)"):
        dp.RandomisedResponse(truth)


@pytest.mark.parametrize("low, high", [(-math.inf, 1), (0, math.inf), (math.nan, 1), (0, math.nan), (1, 1), (2, 1)])
def test_an_unbounded_or_empty_range_is_refused(low, high, refuses):
    for use in (lambda: dp.sensitivity("sum", low, high), lambda: dp.clamp([1.0], low, high)):
        with refuses("range", "clamp"):
            use()


def test_other_input_that_makes_no_sense_is_refused(refuses):
    with refuses("median", "count, sum or mean"):
        dp.sensitivity("median", 0, 1)
    with refuses("swap", "add-remove or replace"):
        dp.sensitivity("sum", 0, 1, adjacency="swap")
    for n in (None, 0, math.nan):
        with refuses("n is", "public"):
            dp.sensitivity("mean", 0, 1, n=n)
    with refuses("nan", "missing"):
        dp.clamp([1.0, math.nan], 0, 4)
    for size in (0, 1.5, math.nan):
        with refuses("group size", str(size), "records"):
            dp.group_privacy(1.0, 0.0, size)
    for n in (0, math.nan):
        with refuses("n is", "asked"):
            dp.local_error(1.0, n)
    for table in ([0.5, 0.6], [-0.1, 1.1], [1.0], [math.nan, 1.0]):
        with pytest.raises(InputError, match="normalise"):
            dp.hockey_stick([0.5, 0.5], table, 1.0)
