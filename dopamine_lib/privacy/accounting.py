"""What a training run has spent: epsilon by three accountants, its inverse, and the ledger.

What happened is a ``DpEvent``: ``SampledGaussian`` here, ``SampledSkellam`` in ``integer_noise``; accountants interpret
several of them composed. Opacus does the mathematics of the Gaussian: Renyi-DP under Poisson sampling (Mironov, Talwar,
Zhang 2019) and the privacy random variable (PRV) accountant (Gopi, Lee, Wutschitz 2021). Neighbours differ by adding
or removing one patient, of whom a step takes one image at most.
"""

import functools
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import brentq

from dopamine_lib.errors import InputError, check_delta, check_epsilon, check_whole, check_within

#: The Renyi orders of the paper's tool: 1.1, 1.2 … 10.9 and 12 … 63.
ORDERS = tuple([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
#: The whole ones, at which the moment is a finite sum and quick to compute.
WHOLE = tuple(order for order in ORDERS if order == int(order))
#: rdp_classic: Mironov 2017, proposition 3; rdp: Balle et al. 2020, theorem 21; prv: numerical, an upper bound.
ACCOUNTANTS = ("rdp_classic", "rdp", "prv")
#: The most steps that can be accounted for, and the least noise multiplier that is searched for.
MAX_STEPS = 10**7
MIN_NOISE_MULTIPLIER = 0.2
#: The part of delta reserved for the distance between Gaussian noise as it is drawn and the ideal.
FAILURE_PART = 1e-9


class BudgetSpent(Exception):
    """The next step would exceed the privacy budget (Algorithm 1, lines 18 to 20)."""


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
        """The part of ``delta`` left for the conversion to epsilon, once this mechanism's failures are paid for."""

    def with_sampler(self, epsilon: float, delta: float, left: float) -> float:
        """Epsilon at ``delta`` of the noise as it is drawn; ``epsilon`` is that of exact noise at ``left``."""


@dataclass(frozen=True)
class SampledGaussian:
    """The Poisson-subsampled Gaussian mechanism, composed ``steps`` times: a ``DpEvent``.

    noise_multiplier  sigma: the noise's standard deviation in units of the clipping norm C
    sample_rate       q: every patient takes part in a step independently with this probability
    failure           per step, at most the total variation distance between what is released and the ideal mechanism
    Raises InputError for sigma <= 0, q outside (0, 1], a failure outside [0, 1), or a negative or fractional number of
    steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    failure: float = 0.0

    orders = ORDERS

    def __post_init__(self):
        check_within("noise multiplier", self.noise_multiplier, 0, 1e6, "without noise there is no bound")
        check_within("sample rate", self.sample_rate, 0, 1, "it is a probability, batch / patients")
        check_whole("number of steps", self.steps, 0, MAX_STEPS, "count the noisy steps")
        if not 0 <= self.failure < 1:
            raise InputError(f"failure is {self.failure}, but must lie in [0, 1): it is a probability")

    @property
    def prv(self) -> tuple[float, float, int]:
        """What Opacus's PRV accountant calls this event."""
        return self.noise_multiplier, self.sample_rate, self.steps

    def rdp(self, orders: tuple[float, ...]) -> np.ndarray:
        """Renyi-DP of all steps at each of ``orders``: it adds up over steps (Mironov 2017, proposition 1)."""
        return self.steps * _rdp_per_step(self.noise_multiplier, self.sample_rate, orders)

    def delta_left(self, delta: float) -> float:
        """All of it, or with failures all but ``FAILURE_PART``."""
        return delta * (1 - FAILURE_PART) if self.failure else delta

    def with_sampler(self, epsilon: float, delta: float, left: float) -> float:
        """``epsilon`` itself, or infinity where failures cost more than their part of delta.

        Where both neighbours' outputs are within eta of the ideal's in total variation, (epsilon, left) of the ideal
        is (epsilon, left + (1 + e^epsilon) eta) of them. (1 + e^epsilon < e^(1 + epsilon), so other mechanisms of the
        composition may add up to 0.3 to epsilon.)
        """
        affordable = FAILURE_PART * left / (self.steps * self.failure) if self.steps * self.failure else math.inf
        return epsilon if epsilon + 1 <= math.log(affordable) else math.inf


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
    ln(1 - 1/a), Balle et al. 2020, theorem 21. Add up steps before the conversion; orders whose Renyi-DP is NaN are
    skipped. Raises InputError for delta outside (0, 1).
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
    """Epsilon at ``delta`` of one event, or of several composed; infinity where delta is too small for any.

    accountant  one of ``ACCOUNTANTS``; the result is None for "prv" where an event has no PRV
    orders      of Renyi-DP, by default all that the events have in common: every order gives a bound and the least is
                taken, so fewer orders give a valid but looser one
    Raises InputError for delta outside (0, 1) or an unknown accountant. FSCDP's 10.83 of Figure 1:

    >>> round(epsilon(SampledGaussian(noise_multiplier=1.15, sample_rate=100 / 2930, steps=3001), delta=1e-4), 2)
    10.83
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
    left = functools.reduce(lambda left, event: event.delta_left(left), events, delta)
    if left <= 0:
        return math.inf
    if accountant == "prv":
        spent = _prv_epsilon(tuple(event.prv for event in events), left)
    else:
        known = set.intersection(*(set(event.orders) for event in events))
        orders = tuple(order for order in orders or events[0].orders if order in known)
        spent = float(rdp_epsilon(sum(event.rdp(orders) for event in events), orders, left, accountant == "rdp"))
    return functools.reduce(lambda spent, event: event.with_sampler(spent, delta, left), events, spent)


def epsilons(events: DpEvent | Iterable[DpEvent], delta: float) -> dict[str, float | None]:
    """Epsilon by each of the three accountants; None by "prv" where an event has no PRV."""
    return {accountant: epsilon(events, delta, accountant) for accountant in ACCOUNTANTS}


def noise_multiplier_for(
    target: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "prv",
    before: tuple[SampledGaussian, ...] = (),
) -> float:
    """The least sigma, to a relative 1e-3 and rounded up, whose epsilon is at most ``target``.

    before  what is spent besides
    Raises InputError for a target that is not positive or that no sigma in [0.2, 1000] meets.

    >>> round(noise_multiplier_for(3.0, sample_rate=100 / 2930, steps=3001, delta=1e-4, accountant="rdp"), 2)
    2.61
    """
    check_epsilon(target)

    def spent(sigma, accountant=accountant, orders=ORDERS):
        return epsilon((*before, SampledGaussian(sigma, sample_rate, steps)), delta, accountant, orders)

    quick = "rdp" if accountant == "prv" else accountant
    high = _least_noise(lambda sigma: spent(sigma, quick, WHOLE), target, MIN_NOISE_MULTIPLIER, 1.0)
    # of the other orders only those next to the best whole one improve on that, a little; PRV improves a little more
    best = min(WHOLE, key=lambda order: spent(high, quick, (order,)))
    near = tuple(order for order in ORDERS if abs(order - best) < 1)
    return _least_noise(lambda sigma: spent(sigma, orders=near), target, max(MIN_NOISE_MULTIPLIER, high / 2), high)


def _least_noise(spent: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The least sigma with ``spent(sigma)`` at most ``target``, to a relative 1e-3 and rounded up.

    low, high  where to search first
    """
    while spent(high) > target:
        low, high = high, 2 * high
        if high > 1000:
            raise InputError(
                f"epsilon {target} needs a noise multiplier beyond 1000: take fewer steps, or a larger epsilon or delta"
            )
    while spent(low) <= target:
        if low <= MIN_NOISE_MULTIPLIER:
            return low
        low, high = max(MIN_NOISE_MULTIPLIER, low / 2), low
    ends = math.log(low), math.log(high)
    # nearly a straight line on logarithmic axes, so a few steps suffice
    sigma = math.exp(brentq(lambda x: math.log(max(spent(math.exp(x)), 1e-12) / target), *ends, xtol=2e-4))
    while spent(sigma) > target:
        sigma *= 1.0002
    return min(sigma, high)


class Ledger:
    """The steps charged so far at one (sigma, q); it refuses the step that would exceed the budget.

    budget   epsilon that must not be exceeded, by ``accountant``; infinity to keep count only
    planned  the most steps that will be charged; a budget that covers them all needs no search for its end
    bound    epsilon as a function of (steps, accountant) where more is spent than these steps; theirs alone by default
    Charge a step, and save the ledger, before its noise is used: then the ledger never lags behind.
    """

    def __init__(
        self,
        noise_multiplier: float,
        sample_rate: float,
        delta: float,
        budget: float = math.inf,
        accountant: str = "rdp_classic",
        planned: int | None = None,
        bound: Callable[[int, str], float | None] | None = None,
    ):
        check_delta(delta)
        self.noise_multiplier, self.sample_rate, self.delta = noise_multiplier, sample_rate, delta
        self.budget, self.accountant, self.charged = budget, accountant, 0
        self._bound = bound or (
            lambda steps, accountant: epsilon(SampledGaussian(noise_multiplier, sample_rate, steps), delta, accountant)
        )
        self._affordable = self._steps_within_budget(planned)

    def spent(self, accountant: str = "rdp_classic") -> float | None:
        """Epsilon of the steps charged so far."""
        return self._bound(self.charged, accountant)

    def charge(self, steps: int = 1) -> None:
        """Charge the next ``steps``. Raises BudgetSpent, charging nothing, if they would exceed the budget."""
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
        """The most steps within the budget, by bisection: epsilon grows with every step."""
        if math.isinf(self.budget):
            return math.inf
        check_epsilon(self.budget)

        def spent(steps: int) -> float:
            return self._bound(steps, self.accountant)

        if planned is not None and spent(planned) <= self.budget:
            return planned
        if spent(0) > self.budget:
            return 0
        low, high = 0, 1024
        while spent(high) <= self.budget and high < MAX_STEPS:
            low, high = high, min(2 * high, MAX_STEPS)
        return low + bisect_right(range(low + 1, high), self.budget, key=spent)
