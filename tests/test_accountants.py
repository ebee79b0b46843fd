"""The contract of all accountants, at the edges too: an upper bound on the exact epsilon, or None; never below 0."""

import itertools
import json
import math
import subprocess
import sys

import pytest

from dopamine_lib.__main__ import main
from dopamine_lib.federation.options import Options, make_plan
from dopamine_lib.privacy import prv
from dopamine_lib.privacy.accounting import (
    ACCOUNTANTS,
    SampledGaussian,
    epsilon,
    epsilons,
)
from dopamine_lib.privacy.budget import Ledger, noise_multiplier_for
from dopamine_lib.privacy.gaussian import analytic_epsilon
from dopamine_lib.privacy.integer_noise import IntegerNoise

#: sigma, q, steps, delta: the corners of what can be asked for, and what raised, exploded or fell below 0 once.
GRID = [
    *itertools.product((0.3, 1.0, 10.0, 100.0), (1e-4, 0.02, 0.5), (1, 1000, 10**5), (1e-2, 1e-5, 1e-15)),
    *itertools.product((0.3, 2.0, 100.0), (1.0,), (1, 100, 10**5), (1e-2, 1e-6, 1e-15)),
    (1.1, 1.0, 3001, 1e-4),  # 4.2 GB
    (0.25, 50 / 2931, 5862, 1e-4),  # 8.8 GB, without an end
    (0.1, 0.01, 1000, 1e-5),
    (1e-3, 0.01, 10, 1e-5),
    (1e-5, 0.5, 10, 1e-5),
    (1e6, 0.01, 1000, 1e-5),
    (1e6, 1.0, 1, 1e-6),
    (1.0, 0.01, 10**7, 1e-5),
    (1.0, 1e-7, 10**6, 1e-9),
    (1.0, 1e-300, 1, 1e-5),
    (1.0, 0.01, 1000, 1e-50),
    (1.0, 0.01, 1000, 1e-300),
    (1.0, 0.01, 1000, 0.99),
]
#: Of these the quick tests take some, among them all that once exploded.
FEW = GRID[:135:17] + GRID[135:]


def oracle(sigma: float, q: float, steps: int, delta: float) -> tuple[float, float] | None:
    """Bounds on the exact epsilon from below and from above; None where nothing independent knows it.

    For q = 1 the analytic Gaussian curve; else Google's privacy loss distributions, rounded down and up, where the
    rounding of their Fourier transform is far below delta and their grid stays small.
    """
    if q == 1:
        return (analytic_epsilon(sigma / math.sqrt(steps), delta),) * 2
    rough = epsilon(SampledGaussian(sigma, q, steps), delta, "rdp")
    if delta < 1e-6 or not 0.3 <= sigma <= 100 or steps > 10**5 or rough > 300:
        return None
    from dp_accounting.pld import privacy_loss_distribution

    reach = math.log1p(q * math.expm1(min((12 * sigma + 0.5) / sigma**2, 500)))  # of one step's loss
    spread = q * math.sqrt(steps * math.expm1(min(sigma**-2, 500)))  # about the standard deviation of the whole loss
    ends, step = [], max(reach / 1e5, min(1e-3, max(rough / 1e3, spread / 1e5)))  # finer ones took 5 GB
    for pessimistic in (False, True):
        once = privacy_loss_distribution.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=step, pessimistic_estimate=pessimistic
        )
        ends.append(once.self_compose(steps).get_epsilon_for_delta(delta))
    return ends[0], ends[1]


def keeps_the_contract(sigma: float, q: float, steps: int, delta: float) -> None:
    event = SampledGaussian(sigma, q, steps)
    spent, known = epsilons(event, delta), oracle(sigma, q, steps, delta)
    assert all(value is None or 0 <= value < math.inf for value in spent.values()), spent
    assert spent["rdp_classic"] >= spent["rdp"]  # both always have a bound
    if spent["pld"] is not None:  # tight, so no more than another upper bound but for its grid
        assert spent["pld"] <= 1.001 * spent["rdp"] + 2e-4
    if known is not None:
        for accountant, value in spent.items():
            assert value is None or value >= known[0] * (1 - 1e-9), (accountant, value, known)
        assert spent["pld"] <= 1.001 * known[1] + 2e-4


@pytest.mark.parametrize("sigma, q, steps, delta", FEW)
def test_every_answer_is_an_upper_bound_or_none(sigma, q, steps, delta):
    keeps_the_contract(sigma, q, steps, delta)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_answer_on_the_whole_grid_within_a_gigabyte():
    """In a process of its own, whose memory is its own."""
    code = (
        "import resource, sys; sys.path.insert(0, 'tests'); import opacus, dp_accounting.pld\n"
        "from test_accountants import GRID, epsilons, keeps_the_contract, SampledGaussian\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for sigma, q, steps, delta in GRID: epsilons(SampledGaussian(sigma, q, steps), delta)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "for point in GRID: keeps_the_contract(*point)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) < 2**20, "in kilobytes"


@pytest.mark.parametrize(
    "event", [(0.25, 50 / 2931, 5862), (1.1, 0.999, 3001), (0.3, 0.5, 3000), (1.0, 0.01, 10**5), (48.0, 0.017, 5862)]
)
def test_the_work_of_prv_is_bounded_before_it_begins(monkeypatch, event):
    from opacus.accountants.analysis.prv import Domain

    sizes, aligned = [], Domain.create_aligned

    def watched(*terms):
        sizes.append(aligned(*terms).size)
        raise RuntimeError("seen")

    monkeypatch.setattr(Domain, "create_aligned", watched)
    prv.prv_epsilon.cache_clear()
    assert epsilon(SampledGaussian(*event), 1e-5, "prv") is None
    prv.prv_epsilon.cache_clear()
    assert all(size <= 1.01 * prv.MAX_POINTS for size in sizes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Opacus's own, at the edges of its domain
@pytest.mark.parametrize("history", [[(1.15, 100 / 2930, 3001)], [(2.0, 0.17, 1525), (40.0, 1.0, 1)]])
def test_prv_is_opacus_with_a_reach_of_its_own(history):
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = history
    ours = epsilon([SampledGaussian(*part) for part in history], 1e-4, "prv")
    assert ours == pytest.approx(accountant.get_epsilon(1e-4, eps_error=0.01, delta_error=1e-7), abs=1e-4)


def test_unlike_events_compose():
    """A folder's: mean features, two settings, many runs; Google's distributions, composed, are the oracle."""
    from dp_accounting.pld import privacy_loss_distribution

    parts = [(20.0, 1.0, 5), (1.15, 100 / 2930, 3001), (2.0, 50 / 293, 500)]
    events = [SampledGaussian(*part) for part in parts]
    whole = None
    for sigma, q, steps in parts:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=1e-3
        ).self_compose(steps)
        whole = one if whole is None else whole.compose(one)
    exact, spent = whole.get_epsilon_for_delta(1e-4), epsilons(events, 1e-4)
    assert spent["pld"] == pytest.approx(exact, rel=2e-4)
    assert exact * (1 - 2e-4) < spent["pld"] < spent["prv"] < exact + 0.05 < spent["rdp"] < spent["rdp_classic"]
    for accountant in ACCOUNTANTS:
        assert epsilon(events[::-1], 1e-4, accountant) == pytest.approx(spent[accountant], rel=1e-6)
        assert all(epsilon(event, 1e-4, accountant) < spent[accountant] for event in events)
        twice = SampledGaussian(1.15, 100 / 2930, 1500), SampledGaussian(1.15, 100 / 2930, 1501)
        assert epsilon(twice, 1e-4, accountant) == pytest.approx(epsilon(events[1], 1e-4, accountant), rel=1e-9)


@pytest.mark.parametrize("total_range, known", [(2**15 - 1, ("rdp_classic", "rdp")), (2**23, ACCOUNTANTS)])
def test_skellam_noise_has_both_rdp_bounds_and_with_many_units_the_others(total_range, known):
    noise = IntegerNoise(1.15, 1.0, 10, 100, total_range=total_range, sample_rate=100 / 2930, steps=3001)
    for events in (noise.event(3001), (SampledGaussian(40, 1.0, 1), noise.event(3001))):
        spent = epsilons(events, 1e-4)
        assert {key for key, value in spent.items() if value is not None} == set(known)
        assert list(filter(None, spent.values())) == sorted(filter(None, spent.values()), reverse=True)


def test_what_would_end_without_a_bound_is_refused_before_it_is_trained(refuses):
    """Skellam noise may overflow with a probability of 1e-9: a smaller delta was found hopeless after the training."""
    with refuses("delta is 1e-12", "FSCDP's noise has no bound below 1e-", "larger delta"):
        make_plan(Options(noise="integer", delta=1e-12), "FSCDP", (293,) * 10, 2565)
    assert make_plan(Options(noise="integer"), "FSCDP", (293,) * 10, 2565).discrete


def test_an_accountant_without_a_bound_is_no_budget(refuses):
    with refuses("accountant prv has no bound at delta 1e-13", "pld", "larger delta"):
        noise_multiplier_for(3.0, 100 / 2930, 3001, 1e-13, "prv")
    with refuses("accountant prv has no bound at delta 1e-13", "pld"):
        Ledger(1.15, 100 / 2930, 1e-13, budget=3.0, accountant="prv")
    assert Ledger(1.15, 100 / 2930, 1e-13, budget=30.0, accountant="pld", planned=3001).left == 3001


def test_the_command_prints_a_dash_or_null(capsys):
    terms = ["epsilon", "--noise-multiplier", "1.15", "--sample-rate", "0.0341", "--steps", "3001", "--delta", "1e-15"]
    assert main(terms) == 0
    assert " - (PRV)  18." in capsys.readouterr().out
    assert main([*terms, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"]["prv"] is None
