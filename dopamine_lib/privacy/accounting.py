"""What a training run has spent: epsilon by four accountants.

What happened is a ``DpEvent``: ``SampledGaussian`` here, ``SampledSkellam`` in ``integer_noise``; accountants interpret
several of them composed. Opacus does the mathematics of the Gaussian: Renyi-DP under Poisson sampling (Mironov, Talwar,
Zhang 2019) and, in ``prv``, the privacy random variable; ``pld`` is the kit's own. Every answer is an upper bound, or
None where an accountant has none. Neighbours differ by adding or removing one patient, of whom a step takes one image
at most.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import gammaln, logsumexp

from dopamine_lib.errors import InputError, check_delta, check_whole, check_within
from dopamine_lib.privacy.gaussian import MIN_SCALE, analytic_epsilon
from dopamine_lib.privacy.mixture import mixture_rdp
from dopamine_lib.privacy.pld import pld_epsilon
from dopamine_lib.privacy.prv import DELTA_ERROR, prv_epsilon

#: The Renyi orders of the paper's tool: 1.1, 1.2 … 10.9 and 12 … 63.
ORDERS = tuple([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
#: Larger ones, for the improved conversion: without them no epsilon below 0.1 comes out, however much the noise.
LARGE_ORDERS = tuple(round(64 * 2 ** (i / 4)) for i in range(41))
#: The whole ones, at which the moment is a finite sum and quick to compute.
WHOLE = tuple(order for order in ORDERS + LARGE_ORDERS if order == int(order))
#: rdp_classic: Mironov 2017, proposition 3; rdp: Balle et al. 2020, theorem 21; prv and pld: numerical.
ACCOUNTANTS = ("rdp_classic", "rdp", "prv", "pld")
#: One of one's own: from the (sigma, q, steps) of all that is composed, and delta, to epsilon, or None for no bound.
Accountant = Callable[[Sequence[tuple[float, float, int]], float], float | None]
#: The most steps that can be accounted for.
MAX_STEPS = 10**7
#: The most draws in a step: beyond, the mixture has too many parts.
MAX_DRAWS = 1000
#: The part of delta reserved for the distance between Gaussian noise as it is drawn and the ideal.
FAILURE_PART = 1e-9


class DpEvent(Protocol):
    """A mechanism composed ``steps`` times, as the accountants see it.

    orders        the Renyi orders at which ``rdp`` is known
    large_orders  more of them, for the improved conversion alone
    prv           (sigma, q, steps, draws) for the numerical accountants; None where they cannot interpret a mechanism
    """

    steps: int
    orders: tuple[float, ...]
    large_orders: tuple[float, ...]
    prv: tuple[float, float, int, int] | None

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
    draws             E: how many times over a step draws patients; who is drawn j times, as Binomial(E, q) says, moves
                      its sum by at most j C (``mixture``)
    failure           per step, at most the total variation distance between what is released and the ideal mechanism
    Raises InputError for sigma <= 0, q outside (0, 1], a failure outside [0, 1), or a negative or fractional number of
    steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    failure: float = 0.0
    draws: int = 1

    orders, large_orders = ORDERS, LARGE_ORDERS

    def __post_init__(self):
        check_within("noise multiplier", self.noise_multiplier, 0, 1e6, "without noise there is no bound")
        check_within("sample rate", self.sample_rate, 0, 1, "it is a probability, batch / patients")
        check_whole("number of steps", self.steps, 0, MAX_STEPS, "count the noisy steps")
        check_whole("number of draws", self.draws, 1, MAX_DRAWS, "count the local steps of a round")
        if not 0 <= self.failure < 1:
            raise InputError(f"failure is {self.failure}, but must lie in [0, 1): it is a probability")

    @property
    def prv(self) -> tuple[float, float, int, int]:
        """What the numerical accountants know this event by."""
        return self.noise_multiplier, self.sample_rate, self.steps, self.draws

    def rdp(self, orders: tuple[float, ...]) -> np.ndarray:
        """Renyi-DP of all steps at each of ``orders``: it adds up over steps (Mironov 2017, proposition 1)."""
        return self.steps * _rdp_per_step(self.noise_multiplier, self.sample_rate, orders, self.draws)

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
def _rdp_per_step(noise_multiplier: float, sample_rate: float, orders: tuple = ORDERS, draws: int = 1) -> np.ndarray:
    if draws > 1:
        return np.array([mixture_rdp(noise_multiplier, sample_rate, draws, order) for order in orders])
    from opacus.accountants.analysis.rdp import compute_rdp

    small = [order for order in orders if order < LARGE_ORDERS[0]]
    large = [large_order_rdp(noise_multiplier, sample_rate, order) for order in orders[len(small) :]]
    return np.append(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=small), large)


def large_order_rdp(noise_multiplier: float, sample_rate: float, order: int) -> float:
    """Renyi-DP of one step at a whole order a >= 2, for q < 1 a sum of a + 1 terms (all at once, unlike Opacus's).

    ln(sum over l of C(a, l) (1 - q)^(a - l) q^l e^(l (l - 1) / 2 sigma^2)) / (a - 1): Mironov, Talwar, Zhang 2019,
    section 3.3.
    """
    if sample_rate == 1:
        return order / (2 * noise_multiplier**2)
    here, log_choose = _log_choose(order)
    log_weight = (order - here) * math.log1p(-sample_rate) + here * math.log(sample_rate)
    return max(0.0, logsumexp(log_choose + log_weight + here * (here - 1) / (2 * noise_multiplier**2)) / (order - 1))


@functools.lru_cache(maxsize=64)
def _log_choose(order: int) -> tuple[np.ndarray, np.ndarray]:
    here = np.arange(order + 1.0)
    return here, gammaln(order + 1) - gammaln(here + 1) - gammaln(order - here + 1)


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
    accountant: str | Accountant = "rdp_classic",
    orders: tuple[float, ...] = (),
) -> float | None:
    """Epsilon at ``delta`` of one event, or of several composed; infinity where delta is too small for any.

    accountant  one of ``ACCOUNTANTS``; the result is None where "prv" or "pld" has no bound: for an event that it
                cannot interpret, a delta that rounding would drown, or too much work. A function is not checked
    orders      of Renyi-DP, by default all that the events have in common: every order gives a bound and the least is
                taken, so fewer orders give a valid but looser one
    Raises InputError for delta outside (0, 1) or an unknown accountant. FSCDP's 10.83 of Figure 1:

    >>> round(epsilon(SampledGaussian(noise_multiplier=1.15, sample_rate=100 / 2930, steps=3001), delta=1e-4), 2)
    10.83
    """
    if callable(accountant):
        return _spent(events, delta, functools.partial(_by_function, function=accountant))
    if accountant not in ACCOUNTANTS:
        raise InputError(f"accountant '{accountant}' is unknown; choose one of {', '.join(ACCOUNTANTS)}")
    if accountant in ("rdp_classic", "rdp"):
        return _spent(events, delta, functools.partial(_by_rdp, improved=accountant == "rdp", orders=orders))
    return _spent(events, delta, {"prv": _by_prv, "pld": _by_pld}[accountant])


def epsilons(events: DpEvent | Iterable[DpEvent], delta: float) -> dict[str, float | None]:
    """Epsilon by each accountant; None where one has no bound, an infinite one included."""
    events = tuple(events) if isinstance(events, Iterable) else (events,)
    found = {accountant: epsilon(events, delta, accountant) for accountant in ACCOUNTANTS}
    return {key: None if value is not None and math.isinf(value) else value for key, value in found.items()}


def group_epsilon(events: DpEvent | Iterable[DpEvent], images: int, delta: float) -> float | None:
    """Tight epsilon at ``delta`` for a person with several images, each sampled independently at an event's rate.

    By ``pld.pld_epsilon``, where the pair that dominates is derived; None where an event is not Gaussian. Raises
    InputError for a number of images outside 1, 2, … 100. FSCDP's, for one image and for two:

    >>> fscdp = SampledGaussian(noise_multiplier=1.15, sample_rate=100 / 2930, steps=3001)
    >>> [round(group_epsilon(fscdp, images, delta=1e-4), 2) for images in (1, 2)]
    [8.98, 22.31]
    """
    check_whole("number of images", images, 1, 100, "count those of one person")
    return _spent(events, delta, functools.partial(_by_pld, images=images))


def _spent(
    events: DpEvent | Iterable[DpEvent], delta: float, bound: Callable[[tuple[DpEvent, ...], float], float | None]
) -> float | None:
    """``bound`` at what is left of ``delta`` once failures are paid for, with what the noise as it is drawn adds."""
    check_delta(delta)
    events = tuple(events) if isinstance(events, Iterable) else (events,)
    events = tuple(event for event in events if event.steps > 0)
    if not events:
        return 0.0
    left = functools.reduce(lambda left, event: event.delta_left(left), events, delta)
    spent = bound(events, left) if left > 0 else math.inf
    if spent is None:
        return None
    return functools.reduce(lambda spent, event: event.with_sampler(spent, delta, left), events, spent)


def _by_rdp(events: tuple[DpEvent, ...], delta: float, improved: bool, orders: tuple[float, ...] = ()) -> float:
    known = [event.orders + (event.large_orders if improved else ()) for event in events]
    common = set.intersection(*map(set, known))
    orders = tuple(order for order in orders or known[0] if order in common)
    return float(rdp_epsilon(sum(event.rdp(orders) for event in events), orders, delta, improved))


def _by_prv(events: tuple[DpEvent, ...], delta: float) -> float | None:
    history = _gaussians(events)
    if history is None or _everybody(history) or _several_draws(history):
        return _by_pld(events, delta)  # where the PRV has no such pair, or no need of an approximation
    history = tuple(event[:3] for event in history)
    steps, error = sum(times for *_, times in history), DELTA_ERROR * delta
    single = [SampledGaussian(sigma, q, 1) for sigma, q, _ in history]
    reach = max(
        _by_rdp(events, error / 4, improved=True),
        *(_by_rdp((one,), error / (8 * steps), improved=True) for one in single),
    )
    return prv_epsilon(history, delta, rough=_by_rdp(events, delta, improved=True), reach=reach)


def _by_pld(events: tuple[DpEvent, ...], delta: float, images: int = 1) -> float | None:
    history = _gaussians(events)
    if history is None:
        return None
    if _everybody(history):  # exact: all steps are one release, to which a person's images add up
        sigma = history[0][0] / images
        return analytic_epsilon(sigma, delta) if sigma >= MIN_SCALE else math.inf
    return pld_epsilon(history, delta, images)


def _by_function(events: tuple[DpEvent, ...], delta: float, function: Accountant) -> float | None:
    history = _gaussians(events)
    if history is None or _several_draws(history):  # its (sigma, q, steps) cannot say so
        return None
    return function(tuple(event[:3] for event in history), delta)


def _several_draws(history: tuple[tuple[float, float, int, int], ...]) -> bool:
    return any(draws > 1 for *_, draws in history)


def _gaussians(events: tuple[DpEvent, ...]) -> tuple[tuple[float, float, int, int], ...] | None:
    """(sigma, q, steps, draws), equal ones added up and those at q = 1 made one; None where an event has none."""
    if any(event.prv is None for event in events):
        return None
    steps, precision = {}, 0.0
    for sigma, q, times, draws in (event.prv for event in events):
        if q == 1:  # Dong, Roth, Su 2022, corollary 3.3
            precision += times * (draws / sigma) ** 2
        else:
            steps[sigma, q, draws] = steps.get((sigma, q, draws), 0) + times
    once = ((1 / math.sqrt(precision), 1.0, 1, 1),) if precision else ()
    return once + tuple((sigma, q, times, draws) for (sigma, q, draws), times in steps.items())


def _everybody(history: tuple[tuple[float, float, int, int], ...]) -> bool:
    return len(history) == 1 and history[0][1:] == (1.0, 1, 1)
