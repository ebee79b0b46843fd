"""What a budget of epsilon buys: the least noise for planned steps, and a ledger that refuses the step beyond it."""

import math
from bisect import bisect_right
from collections.abc import Callable

from scipy.optimize import brentq

from dopamine_lib.errors import InputError, check_delta, check_epsilon
from dopamine_lib.privacy.accounting import (
    ACCOUNTANTS,
    LARGE_ORDERS,
    MAX_STEPS,
    ORDERS,
    WHOLE,
    Accountant,
    SampledGaussian,
    epsilon,
)

#: The least noise multiplier that is searched for.
MIN_NOISE_MULTIPLIER = 0.2


class BudgetSpent(Exception):
    """The next step would exceed the privacy budget (Algorithm 1, lines 18 to 20)."""


def noise_multiplier_for(
    target: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str | Accountant = "prv",
    before: tuple[SampledGaussian, ...] = (),
    draws: int = 1,
) -> float:
    """The least sigma, to a relative 1e-3 and rounded up, whose epsilon is at most ``target``.

    accountant  one of the kit's, or a function as ``accounting.epsilon`` takes it
    before      what is spent besides
    draws       how many times a step draws patients
    Raises InputError for a target that is not positive, that no sigma in [0.2, 1000] meets, or where the accountant
    has no bound.

    >>> round(noise_multiplier_for(3.0, sample_rate=100 / 2930, steps=3001, delta=1e-4, accountant="rdp"), 2)
    2.61
    """
    check_epsilon(target)

    def spent(sigma, accountant=accountant, orders=()):
        bound = epsilon((*before, SampledGaussian(sigma, sample_rate, steps, draws=draws)), delta, accountant, orders)
        return math.inf if bound is None else bound

    if draws > 1:  # about as much as one sum of the noise that as many steps of their own would need
        apart = math.sqrt(draws) * noise_multiplier_for(target, sample_rate, steps * draws, delta, accountant, before)
        return _least_noise(spent, target, 0.8 * apart, apart)
    if accountant == "prv":  # slow, and next to the PLD's
        low = noise_multiplier_for(target, sample_rate, steps, delta, "pld", before)
        if math.isinf(spent(low)):
            raise InputError(_no_bound(accountant, delta, steps))
        return _least_noise(spent, target, low, 1.01 * low)
    if callable(accountant):
        return _least_noise(spent, target, MIN_NOISE_MULTIPLIER, 1.0)
    quick = "rdp" if accountant == "pld" else accountant
    high = _least_noise(lambda sigma: spent(sigma, quick, WHOLE), target, MIN_NOISE_MULTIPLIER, 1.0)
    # of the other orders only those next to the best whole one improve on that, a little; the PLD improves some more
    best = min(WHOLE, key=lambda order: spent(high, quick, (order,)))
    near = tuple(order for order in ORDERS + LARGE_ORDERS if abs(order - best) < max(1, 0.3 * best))
    return _least_noise(lambda sigma: spent(sigma, orders=near), target, max(MIN_NOISE_MULTIPLIER, high / 2), high)


def _no_bound(accountant: str, delta: float, steps: int) -> str:
    others = ", ".join(other for other in ACCOUNTANTS if other != accountant)
    return (
        f"accountant {accountant} has no bound at delta {delta:g} for {steps} steps of this noise: "
        f"take another ({others}), or a larger delta"
    )


def _least_noise(spent: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The least sigma with ``spent(sigma)`` at most ``target``, to a relative 1e-3 and rounded up.

    low, high  where to search first
    """
    while spent(high) > target:
        low, high = high, 2 * high
        if high > 1000:
            raise InputError(
                f"epsilon {target} needs a noise multiplier beyond 1000: take fewer steps, or a larger epsilon or "
                "delta; accountant pld needs the least noise"
            )
    while spent(low) <= target:
        if low <= MIN_NOISE_MULTIPLIER:
            return low
        low, high = max(MIN_NOISE_MULTIPLIER, low / 2), low
    ends = math.log(low), math.log(high)

    def excess(log_sigma):  # nearly a straight line on logarithmic axes, so a few steps suffice
        return math.log(min(max(spent(math.exp(log_sigma)), 1e-12), 1e12) / target)

    sigma = math.exp(brentq(excess, *ends, xtol=2e-4))
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
            bound = self._bound(self.charged + steps, self.accountant)
            spent = "an epsilon without a bound" if bound is None else f"epsilon {bound:.3f}"
            raise BudgetSpent(
                f"{steps} more steps would spend {spent}, past the budget of {self.budget}: end here, or begin again "
                "with a larger one"
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
            bound = self._bound(steps, self.accountant)
            return math.inf if bound is None else bound

        if planned is not None and spent(planned) <= self.budget:
            return planned
        if math.isinf(spent(1)):
            raise InputError(_no_bound(self.accountant, self.delta, 1))
        if spent(0) > self.budget:
            return 0
        low, high = 0, 1024
        while spent(high) <= self.budget and high < MAX_STEPS:
            low, high = high, min(2 * high, MAX_STEPS)
        return low + bisect_right(range(low + 1, high), self.budget, key=spent)
