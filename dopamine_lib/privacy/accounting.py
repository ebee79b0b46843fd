"""What a training run has spent: epsilon by three accountants, its inverse, and the ledger.

What happened is a ``DpEvent``: ``SampledGaussian`` here, ``SampledSkellam`` in ``integer_noise``. Accountants interpret
composed events. Opacus does the mathematics of the Gaussian: Renyi-DP with Poisson sampling (Mironov, Talwar, Zhang
2019) and the privacy random variable (PRV) accountant (Gopi, Lee, Wutschitz 2021). Neighbours differ by adding or
removing one patient's image.
"""

import functools
import math
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import brentq

from dopamine_lib.errors import InputError, check_delta, check_epsilon, check_within

#: The Renyi orders of the paper's tool: 1.1, 1.2 … 10.9 and 12 … 63.
ORDERS = tuple([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
#: Those of them at which the moment is a finite sum, and quick.
WHOLE = tuple(order for order in ORDERS if order == int(order))
#: rdp_classic: Mironov 2017, proposition 3; rdp: Balle et al. 2020, theorem 21; prv: numerical, an upper bound.
ACCOUNTANTS = ("rdp_classic", "rdp", "prv")
#: Of steps that are accounted, and of noise multipliers that are looked for.
MOST_STEPS = 10**7
LEAST_NOISE = 0.2


class BudgetSpent(Exception):
    """The next step would pass the privacy budget (Algorithm 1, lines 18 to 20)."""


def check_steps(steps: int) -> None:
    """Raise InputError unless ``steps`` is a whole number from 0 to 10 million."""
    check_within("number of steps", steps, 0, MOST_STEPS, "count the noisy steps", low_open=False)
    if steps != int(steps):
        raise InputError(f"number of steps is {steps}, but must be whole: count the noisy steps")


class DpEvent(Protocol):
    """A mechanism composed ``steps`` times, as the accountants see it.

    orders  the Renyi orders at which ``rdp`` is known
    prv     (sigma, q, steps) for the PRV accountant; None for a mechanism that it cannot interpret
    """

    steps: int
    orders: tuple[float, ...]
    prv: tuple[float, float, int] | None

    def rdp(self, orders: tuple[float, ...]) -> np.ndarray:
        """Renyi-DP of all steps together at each of ``orders``."""

    def delta_left(self, delta: float) -> float:
        """The part of ``delta`` left for the conversion to epsilon, once failures of this mechanism are paid for."""

    def with_sampler(self, epsilon: float, delta: float, left: float) -> float:
        """Epsilon at ``delta`` with the noise as drawn; ``epsilon`` is that of exact noise at ``left``."""


@dataclass(frozen=True)
class SampledGaussian:
    """The Poisson-subsampled Gaussian mechanism, composed ``steps`` times: a ``DpEvent``.

    noise_multiplier  sigma: the noise's standard deviation in units of the clipping norm C
    sample_rate       q: every patient takes part in a step independently with this probability
    Raises InputError for sigma <= 0, q outside (0, 1], or a negative or fractional number of steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    orders = ORDERS

    def __post_init__(self):
        check_within("noise multiplier", self.noise_multiplier, 0, 1e6, "without noise there is no bound")
        check_within("sample rate", self.sample_rate, 0, 1, "it is a probability, batch / patients")
        check_steps(self.steps)

    @property
    def prv(self) -> tuple[float, float, int]:
        """What Opacus's PRV accountant calls this event."""
        return self.noise_multiplier, self.sample_rate, self.steps

    def rdp(self, orders: tuple[float, ...]) -> np.ndarray:
        """Renyi-DP of all steps at each of ``orders``: it adds up over steps (Mironov 2017, proposition 1)."""
        return self.steps * _rdp_per_step(self.noise_multiplier, self.sample_rate, orders)

    def delta_left(self, delta: float) -> float:
        """All of it: nothing else can fail."""
        return delta

    def with_sampler(self, epsilon: float, delta: float, left: float) -> float:
        """The same: Gaussian noise is taken to be exact, and a statement says so."""
        return epsilon


@functools.lru_cache(maxsize=4096)
def _rdp_per_step(noise_multiplier: float, sample_rate: float, orders: tuple = ORDERS) -> np.ndarray:
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(orders)))


@functools.lru_cache(maxsize=4096)
def _prv_epsilon(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        # a mechanism that samples everybody (q = 1) takes the logarithm of 0; the search's first bound is coarse
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta))


def rdp_epsilon(rdp: np.ndarray, orders: tuple[float, ...], delta: float, improved: bool = False) -> np.ndarray:
    """The least epsilon >= 0 over all orders for Renyi-DP ``rdp`` (…, orders); returns (…).

    Classic: rdp - ln(delta) / (a - 1), Mironov 2017, proposition 3. Improved: less ln(a) / (a - 1) and plus
    ln(1 - 1/a), Balle et al. 2020, theorem 21. Steps add up before the conversion, and an order whose Renyi-DP is NaN
    is passed over. Raises InputError for delta outside (0, 1).
    """
    check_delta(delta)
    a = np.array(orders)
    if improved:
        bound = rdp - (np.log(delta) + np.log(a)) / (a - 1) + np.log((a - 1) / a)
    else:
        bound = rdp - math.log(delta) / (a - 1)
    return np.maximum(np.fmin.reduce(bound, axis=-1, initial=math.inf), 0)


def epsilon(
    events: DpEvent | Iterable[DpEvent],
    delta: float,
    accountant: str = "rdp_classic",
    orders: tuple[float, ...] = (),
) -> float | None:
    """Epsilon at ``delta`` of one event, or of several composed; infinity where no epsilon is finite.

    accountant  one of ``ACCOUNTANTS``; None is returned for "prv" where an event has no PRV
    orders      of Renyi-DP, by default all that every event knows: each gives a bound and the least is taken, so fewer
                give a valid, looser one
    Raises InputError for delta outside (0, 1) or an unknown accountant.
    """
    check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise InputError(f"accountant '{accountant}' is unknown; choose one of {', '.join(ACCOUNTANTS)}")
    events = tuple(events) if isinstance(events, Iterable) else (events,)
    if accountant == "prv" and any(event.prv is None for event in events):
        return None
    events = tuple(event for event in events if event.steps > 0)
    if not events:
        return 0.0
    if accountant == "prv":
        return _prv_epsilon(tuple(event.prv for event in events), delta)
    left = functools.reduce(lambda left, event: event.delta_left(left), events, delta)
    if left <= 0:
        return math.inf
    known = set.intersection(*(set(event.orders) for event in events))
    orders = tuple(order for order in orders or events[0].orders if order in known)
    spent = float(rdp_epsilon(sum(event.rdp(orders) for event in events), orders, left, accountant == "rdp"))
    return functools.reduce(lambda spent, event: event.with_sampler(spent, delta, left), events, spent)


def epsilons(events: DpEvent | Iterable[DpEvent], delta: float) -> dict[str, float | None]:
    """Epsilon by each of the three accountants; None by "prv" where an event has no PRV."""
    return {accountant: epsilon(events, delta, accountant) for accountant in ACCOUNTANTS}


def noise_multiplier_for(
    target: float, sample_rate: float, steps: int, delta: float, accountant="prv", before: tuple = ()
) -> float:
    """The least sigma, to a relative 1e-3 and rounded up, whose epsilon is at most ``target``.

    before  SampledGaussians that are spent as well
    Raises InputError for a target that is not positive or that no sigma in [0.2, 1000] meets.
    """
    check_epsilon(target)

    def spent(sigma, accountant=accountant, orders=ORDERS):
        return epsilon((*before, SampledGaussian(sigma, sample_rate, steps)), delta, accountant, orders)

    quick = "rdp" if accountant == "prv" else accountant
    high = _least_noise(lambda sigma: spent(sigma, quick, WHOLE), target, LEAST_NOISE, 1.0)
    # the orders between improve on that a little, and only those beside the best whole one; PRV a little more
    best = min(WHOLE, key=lambda order: spent(high, quick, (order,)))
    near = tuple(order for order in ORDERS if abs(order - best) < 1)
    return _least_noise(lambda sigma: spent(sigma, orders=near), target, max(LEAST_NOISE, high / 2), high)


def _least_noise(spent, target: float, low: float, high: float) -> float:
    """The least sigma whose ``spent(sigma)`` is at most ``target``, to a relative 1e-3 and rounded up.

    low, high  where to look first
    """
    while spent(high) > target:
        low, high = high, 2 * high
        if high > 1000:
            raise InputError(
                f"epsilon {target} needs a noise multiplier beyond 1000: take fewer steps, or a larger epsilon or delta"
            )
    while spent(low) <= target:
        if low <= LEAST_NOISE:
            return low
        low, high = max(LEAST_NOISE, low / 2), low
    ends = math.log(low), math.log(high)
    # nearly a straight line on logarithmic axes, so a few steps find it
    sigma = math.exp(brentq(lambda x: math.log(max(spent(math.exp(x)), 1e-12) / target), *ends, xtol=2e-4))
    while spent(sigma) > target:
        sigma *= 1.0002
    return min(sigma, high)


class Ledger:
    """Steps charged so far at one (sigma, q), and the refusal of the step that would pass the budget.

    budget   epsilon that must not be passed, by ``accountant``; infinity to only keep count
    planned  steps that will be asked for at most; a budget that covers them needs no search for its end
    bound    epsilon of (steps, accountant) where more happens than these steps; theirs alone by default
    ``charge`` comes before the noise is used and is written to disk there, so the ledger is never behind it.
    """

    def __init__(
        self,
        noise_multiplier,
        sample_rate,
        delta,
        budget=math.inf,
        accountant="rdp_classic",
        planned: int | None = None,
        bound=None,
    ):
        check_delta(delta)
        self.noise_multiplier, self.sample_rate, self.delta = noise_multiplier, sample_rate, delta
        self.budget, self.accountant, self.charged = budget, accountant, 0
        self._bound = bound or (
            lambda steps, accountant: epsilon(SampledGaussian(noise_multiplier, sample_rate, steps), delta, accountant)
        )
        self._affordable = self._steps_within_budget(planned)

    def spent(self, accountant: str = "rdp_classic") -> float:
        """Epsilon of the steps charged so far."""
        return self._bound(self.charged, accountant)

    def charge(self, steps: int = 1) -> None:
        """Charge the next ``steps``. Raises BudgetSpent, charging nothing, if they would pass the budget."""
        if self.charged + steps > self._affordable:
            raise BudgetSpent(
                f"{steps} more steps would spend epsilon {self._bound(self.charged + steps, self.accountant):.3f}, "
                f"past the budget of {self.budget}: end here, or begin again with a larger one"
            )
        self.charged += steps

    @property
    def left(self) -> float:
        """Steps that the budget still allows."""
        return self._affordable - self.charged

    def _steps_within_budget(self, planned: int | None) -> float:
        """The largest number of steps within the budget, by bisection: epsilon grows with every step."""
        if math.isinf(self.budget):
            return math.inf
        check_epsilon(self.budget)

        def fits(steps):
            return self._bound(steps, self.accountant) <= self.budget

        if planned is not None and fits(planned):
            return planned
        if not fits(0):
            return 0
        low, high = 0, 1024
        while fits(high) and high < MOST_STEPS:
            low, high = high, min(2 * high, MOST_STEPS)
        between = range(low + 1, high)
        return low + bisect_right(between, self.budget, key=lambda steps: self._bound(steps, self.accountant))
