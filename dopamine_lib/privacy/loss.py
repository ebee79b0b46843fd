"""The privacy-loss distribution on a grid: rounded up it bounds delta from above, rounded down from below.

Any mechanism of ``definitions`` has the exact distribution function of its loss; here that is cut into steps so that
releases can be composed by convolution (Koskela, Jälkö, Honkela 2020). It serves for up to a few dozen releases;
thousands of subsampled steps are for ``accounting``.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import bisect

from dopamine_lib.errors import InputError, check_delta, check_whole, check_within
from dopamine_lib.privacy.definitions import MAX_EPSILON, Gaussian, Laplace, RandomisedResponse, check_epsilons

MAX_POINTS = 2**22


@dataclass(frozen=True, eq=False)
class LossDistribution:
    """Probabilities (m,) of the losses (first + i) step, i = 0 … m-1, for outputs drawn from P.

    infinite     probability of an infinite loss: it counts fully towards delta
    pessimistic  whether losses were rounded up, so that ``delta`` is an upper bound; else it is a lower one
    """

    masses: np.ndarray
    first: int
    step: float
    infinite: float
    pessimistic: bool

    @classmethod
    def of(
        cls, mechanism: Laplace | Gaussian | RandomisedResponse, *, step: float = 1e-3, pessimistic: bool = True
    ) -> "LossDistribution":
        """The loss of one release of a mechanism of ``definitions``.

        step  of the grid; the bounds on epsilon are off by at most this much per release
        Raises InputError for a step outside (0, 1] or one that needs more than 2^22 points.

        >>> hundred = LossDistribution.of(RandomisedResponse.for_epsilon(0.1)).times(100)
        >>> round(epsilon_at(hundred, delta=1e-3), 2)  # basic composition says 10
        3.18
        """
        check_within("step", step, 0, 1, "0.001 is fine enough for most pictures")
        low, high = mechanism.loss_range
        first, last = math.floor(low / step) - 1, math.ceil(high / step)  # the least loss lies above the first point
        _check_points(last - first + 1)
        cumulative = mechanism.loss_cdf(np.arange(first, last + 1) * step)
        inner = np.diff(cumulative)  # of the losses in ((i - 1) step, i step]
        above = 1 - cumulative[-1]
        if pessimistic:  # every loss moves to the right end of its interval; above the grid it moves to infinity
            return cls(np.concatenate([cumulative[:1], inner]), first, step, float(above), True)
        # every loss moves to the left end; below the grid it is left out, as if it were minus infinity
        return cls(np.concatenate([inner, [above]]), first, step, 0.0, False)

    def delta(self, epsilon: ArrayLike) -> float | np.ndarray:
        """The hockey-stick divergence E[max(0, 1 - e^(epsilon - loss))] at one epsilon >= 0 or an array."""
        check_epsilons(epsilon, zero=True)
        losses = (self.first + np.arange(len(self.masses))) * self.step
        above = losses > 0
        losses, masses = losses[above], self.masses[above]
        deltas = [-(masses * np.minimum(np.expm1(e - losses), 0)).sum() + self.infinite for e in np.ravel(epsilon)]
        return np.minimum(deltas, 1.0).reshape(np.shape(epsilon))[()]

    def compose(self, other: "LossDistribution") -> "LossDistribution":
        """Both releases, from the same patients with independent noise: losses add up, so probabilities convolve.

        The rounding of the fast Fourier transform, about 1e-15, is the only error not on the safe side. Raises
        InputError for another step or another way of rounding.
        """
        if (self.step, self.pessimistic) != (other.step, other.pessimistic):
            raise InputError(
                f"grids of steps {self.step} and {other.step} or of unlike rounding do not compose: build them alike"
            )
        points = len(self.masses) + len(other.masses) - 1
        _check_points(points)
        size = 1 << (points - 1).bit_length()
        product = np.fft.irfft(np.fft.rfft(self.masses, size) * np.fft.rfft(other.masses, size), size)[:points]
        infinite = self.infinite + other.infinite - self.infinite * other.infinite
        masses = np.maximum(product, 0)
        return LossDistribution(masses, self.first + other.first, self.step, infinite, self.pessimistic)

    def times(self, releases: int) -> "LossDistribution":
        """``releases`` independent releases, by repeated squaring. Raises InputError unless 1, 2, … million."""
        check_whole("number of releases", releases, 1, 10**6, "count the releases")
        _check_points(releases * (len(self.masses) - 1) + 1)
        if releases == 1:
            return self
        half = self.times(releases // 2)
        whole = half.compose(half)
        return whole.compose(self) if releases % 2 else whole


def _check_points(points):
    if points > MAX_POINTS:
        raise InputError(f"the grid needs {points} points, but at most {MAX_POINTS} fit: widen the step")


def epsilon_at(curve: Laplace | Gaussian | RandomisedResponse | LossDistribution, delta: float) -> float:
    """The least epsilon in [0, 500] with ``curve.delta(epsilon) <= delta``, to 1e-9 and rounded up; else infinity.

    curve  a mechanism of ``definitions``, or a LossDistribution, whose deltas below 1e-15 are rounding
    Raises InputError for delta outside [0, 1).

    >>> round(epsilon_at(Laplace(scale=2.0), delta=0.0), 6)
    0.5
    """
    check_delta(delta, zero=True)
    if delta == 0 and isinstance(curve, Gaussian):  # its delta is positive everywhere, but underflows
        return math.inf
    if curve.delta(0.0) <= delta:
        return 0.0
    if curve.delta(MAX_EPSILON) > delta:
        return math.inf
    # a sign instead of the difference, which for delta = 0 is 0 at every larger epsilon too
    return 5e-10 + bisect(lambda epsilon: 1 if curve.delta(epsilon) > delta else -1, 0, MAX_EPSILON, xtol=4e-10)
