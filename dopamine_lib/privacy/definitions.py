"""Definition 1 (Eq. 1), made computable: three mechanisms, and everything their outputs tell of two neighbours.

Laplace, Gaussian and randomised response are given by their output distributions P on D and Q on D', two inputs a
sensitivity apart; all three are symmetric, so P and Q may be exchanged. This module is for reading and for small exact
computations. It neither calibrates the Gaussian (``gaussian``) nor accounts for training (``accounting``), and its
floating-point noise is unfit for releases: its lowest bits give the input away (Mironov 2012).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr, ndtr

from dopamine_lib.errors import InputError, check_delta, check_epsilon, check_whole, check_within

#: Who counts as a neighbour: the kit's default, and the one that costs twice as much in a sum (register, row 16).
ADJACENCIES = ("add-remove", "replace")
MAX_EPSILON = 500.0


def check_epsilons(epsilon: ArrayLike, *, zero: bool = False) -> None:
    """Raise InputError unless every epsilon lies in (0, 500], or in [0, 500] where ``zero`` is allowed."""
    for value in (np.min(epsilon), np.max(epsilon)):  # both are NaN if any is
        check_epsilon(value, zero=zero, high=MAX_EPSILON)


def hockey_stick(p: ArrayLike, q: ArrayLike, epsilon: float) -> float:
    """The least delta of Eq. 1 for two probability tables (m,): the sum of max(0, p - e^epsilon q).

    The event Y of all outputs with p > e^epsilon q attains it. This is one direction; exchange p and q for the other.
    Raises InputError for an epsilon outside [0, 500] and for tables that are not probabilities.

    >>> hockey_stick([0.75, 0.25], [0.25, 0.75], epsilon=0.0)
    0.5
    """
    check_epsilons(epsilon, zero=True)
    p, q = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    for name, table in (("p", p), ("q", q)):
        if not (table.shape == p.shape and np.all(table >= 0) and math.isclose(table.sum(), 1, abs_tol=1e-9)):
            raise InputError(
                f"{name} is {table}, but must hold as many probabilities as p, which add up to 1: normalise it"
            )
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


@dataclass(frozen=True)
class _Additive:
    """Noise on a number that neighbours change by at most ``sensitivity``: P is centred at 0, Q at the sensitivity."""

    scale: float
    sensitivity: float = 1.0

    def __post_init__(self):
        check_within("noise scale", self.scale, 0, 1e12, "without noise there is no bound")
        check_within("sensitivity", self.sensitivity, 0, 1e12, "an answer that no patient changes needs no noise")

    @property
    def shift(self) -> float:
        """The distance between P and Q in units of the noise."""
        return self.sensitivity / self.scale

    def densities(self, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Densities of P and of Q at the outputs y (m,), each (m,)."""
        y = np.asarray(y, dtype=float)
        return self._density(y), self._density(y - self.sensitivity)

    def outputs(self, points: int = 401) -> np.ndarray:
        """Outputs (points,), ascending, that cover all but a negligible part of P and Q."""
        reach = 7 * self.scale
        return np.linspace(-reach, self.sensitivity + reach, points)


class Laplace(_Additive):
    """The Laplace mechanism: noise of density exp(-|y| / scale) / (2 scale); pure DP (Dwork et al. 2006).

    scale, sensitivity  in the units of the answer. Raises InputError unless both are positive and finite.
    """

    @classmethod
    def for_epsilon(cls, epsilon: float, sensitivity: float = 1.0) -> "Laplace":
        """The mechanism that spends exactly ``epsilon``, with delta = 0: scale = sensitivity / epsilon.

        >>> Laplace.for_epsilon(0.5).scale
        2.0
        """
        check_epsilons(epsilon)
        return cls(sensitivity / epsilon, sensitivity)

    def _density(self, y):
        return np.exp(-np.abs(y) / self.scale) / (2 * self.scale)

    def release(self, values: ArrayLike, rng: np.random.Generator) -> np.ndarray:
        """The values, of any shape, each with its own noise."""
        return values + rng.laplace(0.0, self.scale, np.shape(values))

    def delta(self, epsilon: ArrayLike) -> float | np.ndarray:
        """The hockey-stick divergence of P from Q, at one epsilon >= 0 or an array: 1 - exp((epsilon - shift) / 2)."""
        check_epsilons(epsilon, zero=True)
        return np.maximum(-np.expm1((np.asarray(epsilon) - self.shift) / 2), 0.0)[()]

    def loss(self, y: ArrayLike) -> np.ndarray:
        """The privacy loss ln(P(y) / Q(y)) at the outputs y: within plus or minus the shift."""
        return (np.abs(np.asarray(y) - self.sensitivity) - np.abs(y)) / self.scale

    def loss_cdf(self, loss: ArrayLike) -> float | np.ndarray:
        """Pr[privacy loss <= loss] for outputs drawn from P; half of the mass sits at the largest loss."""
        inside = np.exp((np.minimum(loss, self.shift) - self.shift) / 2) / 2
        return np.where(loss < -self.shift, 0.0, np.where(loss >= self.shift, 1.0, inside))[()]

    @property
    def loss_range(self) -> tuple[float, float]:
        """Least and largest privacy loss."""
        return -self.shift, self.shift


class Gaussian(_Additive):
    """Gaussian noise of standard deviation ``scale``: approximate DP only, delta > 0 at every epsilon.

    scale, sensitivity  in the units of the answer. Raises InputError unless both are positive and finite.
    """

    def _density(self, y):
        return np.exp(-0.5 * (y / self.scale) ** 2) / (self.scale * math.sqrt(2 * math.pi))

    def release(self, values: ArrayLike, rng: np.random.Generator) -> np.ndarray:
        """The values, of any shape, each with its own noise."""
        return values + rng.normal(0.0, self.scale, np.shape(values))

    def delta(self, epsilon: ArrayLike) -> float | np.ndarray:
        """The hockey-stick divergence of P from Q, at one epsilon >= 0 or an array (Balle and Wang 2018, theorem 8)."""
        check_epsilons(epsilon, zero=True)
        far, near = np.asarray(epsilon) / self.shift, self.shift / 2
        return np.maximum(ndtr(near - far) - np.exp(epsilon + log_ndtr(-near - far)), 0.0)[()]

    def loss(self, y: ArrayLike) -> np.ndarray:
        """The privacy loss ln(P(y) / Q(y)) at the outputs y: a straight line, unbounded."""
        return self.shift * (self.shift / 2 - np.asarray(y) / self.scale)

    def loss_cdf(self, loss: ArrayLike) -> float | np.ndarray:
        """Pr[privacy loss <= loss] for outputs drawn from P: the loss is N(shift^2 / 2, shift^2)."""
        return ndtr((np.asarray(loss) - self.shift**2 / 2) / self.shift)[()]

    @property
    def loss_range(self) -> tuple[float, float]:
        """A range of losses outside of which the probability is under 1e-18 on either side."""
        return self.shift**2 / 2 - 9 * self.shift, self.shift**2 / 2 + 9 * self.shift


@dataclass(frozen=True)
class RandomisedResponse:
    """One patient's bit, told truly with probability ``truth`` and inverted otherwise; pure local DP (Warner 1965).

    P is the answer of a patient whose bit is 0, Q that of one whose bit is 1: neighbours replace a bit. Raises
    InputError for a probability outside (1/2, 1).
    """

    truth: float

    def __post_init__(self):
        remedy = "at 1/2 the answer tells nothing, at 1 it hides nothing"
        check_within("probability of the truth", self.truth, 0.5, 1, remedy, high_open=True)

    @classmethod
    def for_epsilon(cls, epsilon: float) -> "RandomisedResponse":
        """The mechanism that spends exactly ``epsilon``: truth = e^epsilon / (1 + e^epsilon)."""
        check_epsilons(epsilon)
        return cls(1 / (1 + math.exp(-epsilon)))

    @property
    def shift(self) -> float:
        """Its epsilon: ln(truth / (1 - truth))."""
        return math.log(self.truth / (1 - self.truth))

    def densities(self, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities under P and under Q of the answers y (m,) in {0, 1}, each (m,)."""
        y = np.asarray(y)
        return np.where(y == 0, self.truth, 1 - self.truth), np.where(y == 1, self.truth, 1 - self.truth)

    def outputs(self, points: int = 2) -> np.ndarray:
        """The two answers."""
        return np.array([0, 1])

    def release(self, bits: ArrayLike, rng: np.random.Generator) -> np.ndarray:
        """The bits, any shape, each inverted with probability 1 - truth."""
        bits = np.asarray(bits, dtype=int)
        return bits ^ (rng.random(bits.shape) >= self.truth)

    def delta(self, epsilon: ArrayLike) -> float | np.ndarray:
        """The hockey-stick divergence of P from Q, at one epsilon >= 0 or an array: truth - e^epsilon (1 - truth)."""
        check_epsilons(epsilon, zero=True)
        return np.maximum(self.truth - np.exp(epsilon) * (1 - self.truth), 0.0)[()]

    def loss(self, y: ArrayLike) -> np.ndarray:
        """The privacy loss ln(P(y) / Q(y)) at the answers y: plus or minus the shift."""
        return np.where(np.asarray(y) == 0, self.shift, -self.shift)

    def loss_cdf(self, loss: ArrayLike) -> float | np.ndarray:
        """Pr[privacy loss <= loss] for answers drawn from P: two steps."""
        return np.where(loss < -self.shift, 0.0, np.where(loss >= self.shift, 1.0, 1 - self.truth))[()]

    @property
    def loss_range(self) -> tuple[float, float]:
        """The two losses."""
        return -self.shift, self.shift


def sensitivity(
    question: str, low: float = 0.0, high: float = 1.0, *, n: float | None = None, adjacency: str = "add-remove"
) -> float:
    """How far one patient can move a count, sum or mean of values clamped to [low, high] (section 2.1).

    question   "count" (of yes or no: 1), "sum", or "mean": the sum divided by the public number ``n``
    adjacency  "add-remove": a patient adds at most max(|low|, |high|); "replace": it moves a sum by high - low
    Raises InputError for a range that is empty or unbounded: then no amount of noise is enough.

    >>> sensitivity("sum", 0, 20), sensitivity("mean", 0, 20, n=100)
    (20.0, 0.2)
    """
    if question not in ("count", "sum", "mean") or adjacency not in ADJACENCIES:
        raise InputError(
            f"no sensitivity is known for {question!r} and {adjacency!r}: ask for count, sum or mean, "
            f"and {' or '.join(ADJACENCIES)}"
        )
    if question == "count":
        return 1.0
    _check_range(low, high)
    largest = max(abs(low), abs(high)) if adjacency == "add-remove" else high - low
    if question == "sum":
        return float(largest)
    check_within("n", n, 1, 1e12, "give the public number that the sum is divided by", low_open=False)
    return float(largest / n)


def clamp(values: ArrayLike, low: float, high: float) -> np.ndarray:
    """The values moved into [low, high], which must be chosen without looking at them. Raises InputError for NaN.

    >>> clamp([-1.0, 5.0, 40.0], 0, 20)
    array([ 0.,  5., 20.])
    """
    _check_range(low, high)
    values = np.asarray(values, dtype=float)
    if np.isnan(values).any():
        raise InputError("a value is nan, but every patient needs one: decide on a value for missing ones first")
    return np.clip(values, low, high)


def _check_range(low, high):
    remedy = "clamp every patient's value to a finite range known without the data"
    check_within("low end of the range", low, -1e12, 1e12, remedy, low_open=False)
    check_within("high end of the range", high, low, 1e12, remedy)


def group_privacy(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """The (epsilon, delta) bound for ``size`` records of one patient, given that for one record.

    Eq. 1 applied ``size`` times in a row: size epsilon, and delta (1 + e^epsilon + … + e^((size - 1) epsilon)), at
    most 1. Tight for pure DP; a mechanism's own curve can be much better. Raises InputError for a size below 1.

    >>> group_privacy(0.5, 0.0, size=3)
    (1.5, 0.0)
    """
    _check_bound(epsilon, delta)
    check_whole("group size", size, 1, 10**9, "count the records of one patient")
    exponent = math.log(delta) + (size - 1) * epsilon if delta > 0 else -math.inf  # of the largest term
    terms = math.expm1(-size * epsilon) / math.expm1(-epsilon)  # the sum in units of that term
    return size * epsilon, 1.0 if exponent >= 0 else min(1.0, math.exp(exponent) * terms)


def basic_composition(*bounds: tuple[float, float]) -> tuple[float, float]:
    """The bound on several releases from the same patients: epsilons add up, and so do deltas.

    >>> basic_composition((0.5, 0.0), (1.0, 0.25))
    (1.5, 0.25)
    """
    for bound in bounds:
        _check_bound(*bound)
    return sum(epsilon for epsilon, _ in bounds), min(1.0, sum(delta for _, delta in bounds))


def _check_bound(epsilon, delta):
    check_epsilons(epsilon)
    check_delta(delta, zero=True)


def local_count(bits: ArrayLike, epsilon: float, rng: np.random.Generator) -> float:
    """How many bits (n,) are 1, from randomised responses: an unbiased estimate that trusts nobody (local DP)."""
    response = RandomisedResponse.for_epsilon(epsilon)
    told = response.release(bits, rng).sum()
    return float((told - np.size(bits) * (1 - response.truth)) / (2 * response.truth - 1))


def central_error(epsilon: float) -> float:
    """Standard error of a trusted curator's count with Laplace noise: sqrt(2) / epsilon, for any number of patients."""
    return math.sqrt(2) * Laplace.for_epsilon(epsilon).scale


def local_error(epsilon: float, n: int) -> float:
    """Standard error of ``local_count`` for n patients with any bits: sqrt(n truth (1 - truth)) / (2 truth - 1)."""
    check_within("n", n, 1, 1e12, "count the patients asked", low_open=False)
    truth = RandomisedResponse.for_epsilon(epsilon).truth
    return math.sqrt(n * truth * (1 - truth)) / (2 * truth - 1)
