"""Skellam noise: integers whose sums stay in the family, with their tails, their Renyi-DP, and an exact sampler.

A Skellam variable is the difference of two Poisson variables; here both have rate v / 2, so its mean is 0 and its
variance v. Shares of variance v / K add up to variance v exactly, which rounded Gaussians do not. P(X = x) is
e^-v I_x(v), with Bessel's I (Skellam 1946); for v >= 2,500 four terms of Debye's expansion are exact to rounding.
"""

import bisect
import functools
import itertools
import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, logsumexp

from dopamine_lib.errors import check_within
from dopamine_lib.privacy.randomness import Stream

MIN_VARIANCE, MAX_VARIANCE = 2500, 2.0**60
#: The whole orders at which ``sampled_rdp`` is worked out.
ORDERS = (*range(2, 65), 96, 128, 256)
#: Bound on the error of ``log_pmf`` within 12.5 standard deviations.
LOG_ERROR = 1e-13

#: Probability beyond 12 standard deviations, at most, of Skellam and of Gaussian variables.
BEYOND = 2e-31
#: Probability that many draws' log-probabilities together are further off than is said.
UNLIKELY = math.exp(-200)

_REACH = 12.0  # standard deviations that the sampler covers
_MOST_CELLS = 1 << 14
_GUIDE = 1 << 16
_WORD = 53  # bits in one value of Stream.uniform
_WORDS = 4  # enough of them for an exact comparison
_CHUNK = 1 << 15  # draws at a time: they stay in the cache from one pass to the next


def log_pmf(x: ArrayLike, variance: float) -> np.ndarray:
    """ln P(X = x) for integers x (…), to ``LOG_ERROR``: Debye's expansion of I_x(v) (DLMF 10.41.3).

    With r = sqrt(x^2 + v^2) and p = x / r: r - v - x asinh(x / v) - ln(2 pi r) / 2 + ln(1 + U_1 + U_2 + U_3).

    >>> round(float(np.exp(log_pmf(np.arange(-600, 601), variance=2500)).sum()), 12)
    1.0
    """
    x = np.abs(np.asarray(x, np.float64))
    r = np.hypot(x, variance)
    p = np.square(x / r)
    series = 1 + (3 - 5 * p) / (24 * r) + (81 - p * (462 - 385 * p)) / (1152 * r**2)
    series += (30375 - p * (369603 - p * (765765 - 425425 * p))) / (414720 * r**3)
    # r - v would cancel
    return x * x / (r + variance) - x * np.arcsinh(x / variance) - np.log(2 * math.pi * r) / 2 + np.log(series)


def tail(t: float, variance: float) -> float:
    """Chernoff's upper bound on P(|X| >= t): 2 exp(sqrt(t^2 + v^2) - v - t asinh(t / v))."""
    exponent = t * t / (math.hypot(t, variance) + variance) - t * math.asinh(t / variance)
    return min(1.0, 2 * math.exp(exponent)) if t > 0 else 1.0


def gaussian_gap(draws: int, variance: float) -> float:
    """t: ln P(X) - ln P(round(N(0, v))), summed over ``draws``, is within +-t but for probability ``UNLIKELY``.

    Let L be the difference at x = y sqrt(v), for v >= 10^6 and |y| <= 12. In Debye's expansion the exponent is
    -y^2 / 2 + y^4 / 24 v - ..., an alternating series, and the other factors' logarithm is (1 - 2 y^2) / 8 v, but for
    1 / v^2. The Gaussian's mass is its density at x times the mean of e^(-y u / sqrt(v) - u^2 / 2 v) for u uniform in
    (-1/2, 1/2), whose logarithm lies in [-1 / 24 v, y^2 / 24 v] (Jensen; sinh(a) / a <= e^(a^2 / 6)). So

        |L| <= (y^4 / 24 + 0.3 y^2 + 0.2) / v,    at most 910 / v, and its square has the mean 1.1 / v^2 at most,

    whichever of the two draws: moments of y are the normal ones, 1, 3, 15, 105, but for 1 / v. The mean of L is
    below 1 / v^2, since that of e^-L is 1. The rest is Bernstein's inequality. Infinity for a smaller v.

    >>> f"{gaussian_gap(3001 * 2565, 3.7e10):.0e}", gaussian_gap(1, 1e5)
    ('5e-06', inf)
    """
    if variance < 1e6:
        return math.inf
    rare = -math.log(UNLIKELY)
    return (math.sqrt(2 * rare * 1.1 * draws) + 2 / 3 * rare * 910) / variance + draws / variance**2


def rdp(order: int, variance: float, l1: float, l2: float) -> float:
    """Renyi-DP at a whole order a >= 2 of adding Skellam noise to integers of these sensitivities.

    a D2^2 / 2v + min(((2a - 1) D2^2 + 6 D1) / 4v^2, 3 D1 / 2v): Agarwal, Kairouz, Liu 2021, corollary 3.6. The first
    term is the Gaussian's; the second is what discreteness costs.

    >>> round(rdp(order=2, variance=1e6, l1=100.0, l2=100.0), 6)  # as the Gaussian's, to 1e-8
    0.01
    """
    extra = min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return order * l2**2 / (2 * variance) + extra


@functools.lru_cache(maxsize=64)
def sampled_rdp(variance: float, l1: float, l2: float, sample_rate: float) -> tuple[float, ...]:
    """Renyi-DP at each of ``ORDERS`` of one step of Skellam noise on a Poisson sample at rate q.

    variance, l1, l2  of the noise, and the sensitivities, in units
    ln(sum over l of C(a, l) (1 - q)^(a - l) q^l e^((l - 1) rdp(l))) / (a - 1), where l = 0 and 1 have e^0. It expands
    the divergence of "with the patient" from "without" and bounds every term, for any mechanism. The opposite
    divergence is no larger, because x -> D - x swaps noise at 0 and at D (Mironov, Talwar, Zhang 2019, theorem 5,
    whose proof pairs mirrored points); without such a mirror the terms from l = 3 on need a factor 3 (Zhu and Wang
    2019, theorem 5).
    """
    if sample_rate == 1:
        return tuple(rdp(order, variance, l1, l2) for order in ORDERS)
    orders = range(2, max(ORDERS) + 1)
    whole = np.array([0.0, 0.0] + [(order - 1) * rdp(order, variance, l1, l2) for order in orders])
    curve = []
    for order in ORDERS:
        here = np.arange(order + 1)  # l: as if l of the order's factors had the patient
        log_choose = gammaln(order + 1) - gammaln(here + 1) - gammaln(order - here + 1)
        log_weight = (order - here) * math.log1p(-sample_rate) + here * math.log(sample_rate)
        curve.append(float(logsumexp(log_choose + log_weight + whole[: order + 1])) / (order - 1))
    return tuple(curve)


def uniform(stream: Stream, n: int) -> np.ndarray:
    """n values of ``Stream.uniform``, float64 (n,), drawn piece by piece: several times faster for a large model."""
    out = np.empty(n)
    for at in range(0, n, _CHUNK):
        part = out[at : at + _CHUNK]
        part[:] = stream.uniform(len(part)).numpy()
    return out


class Sampler:
    """Draws Skellam variables of one variance from a cryptographic stream.

    The range is cut into at most 16,384 cells of 2^b integers, each weighted with 2^b times the probability of its
    likeliest integer. One uniform number selects the cell, another the place in it, which is kept with the ratio of its
    probability to that of the cell's likeliest; otherwise both are drawn again (von Neumann's rejection). The weights
    are integers of 160 bits, compared with as many random bits as it takes, so no probability is off by more than a
    factor e^(+-LOG_ERROR); all that is missing lies beyond 12 standard deviations: ``outside``, under 1e-30.
    Raises InputError for a variance outside [2500, 2^60].

    >>> from dopamine_lib.privacy.randomness import Randomness
    >>> drawn = Sampler(variance=1e6).draw(Randomness(seed=0).stream("example"), 10_000)
    >>> bool(980 < drawn.std() < 1020)
    True
    """

    def __init__(self, variance: float):
        remedy = "a coarser grid distorts the noise, a finer one exceeds 53 bits: change the scale"
        check_within("variance of a share, in units", variance, MIN_VARIANCE, MAX_VARIANCE, remedy, low_open=False)
        self.variance = variance
        reach = _REACH * math.sqrt(variance)
        self._width = 1 << max(0, math.ceil(math.log2(2 * reach / (_MOST_CELLS - 2))))
        half = math.ceil(reach / self._width)  # cells on either side; 0 begins a cell
        self._first = -half * self._width
        self.outside = tail(half * self._width, variance)
        starts = self._first + self._width * np.arange(2 * half)
        ends = starts + self._width - 1
        self._peak = log_pmf(np.where(starts < 0, ends, starts), variance)
        least = np.exp(log_pmf(np.where(starts < 0, starts, ends), variance) - self._peak).min()
        self._sure = math.floor(least * 1024 * (1 - 1e-9)) / 1024  # below this, kept whatever the probability
        self._make_table(np.exp(self._peak) * self._width)

    def draw(self, stream: Stream, n: int) -> np.ndarray:
        """n independent variables, int64 (n,)."""
        out, kept = np.empty(n, np.int64), np.empty(n, bool)
        for at in range(0, n, _CHUNK):
            part = slice(at, min(at + _CHUNK, n))
            out[part], kept[part] = self._propose(stream, part.stop - at)
        again = np.flatnonzero(~kept)
        while len(again):
            out[again], kept = self._propose(stream, len(again))
            again = again[~kept]
        return out

    def _make_table(self, weights: np.ndarray) -> None:
        """The cells' upper ends as integers of 212 bits, the first 53 bits of these, and a guide to start from."""
        whole = [int(math.ldexp(weight, 160)) for weight in weights]
        unit = (1 << _WORD * _WORDS) // sum(whole)  # what is left over, less than 2^-50 of all, is drawn again
        self._ends = [unit * end for end in itertools.accumulate(whole)]
        self._tops = np.array([end >> _WORD * (_WORDS - 1) for end in self._ends]) * 2.0**-_WORD
        below = np.searchsorted(self._tops, np.arange(_GUIDE + 1) / _GUIDE)
        # -1 where an end lies within the guide's interval: there the cell has to be searched for
        self._guide = np.where(below[:-1] == below[1:], below[:-1], -1).astype(np.int32)

    def _find(self, u: np.ndarray, stream: Stream) -> np.ndarray:
        """The cell of each u, which has the first 53 of 212 bits; the others are drawn where these do not decide."""
        cell = self._guide[(u * _GUIDE).astype(np.int32)].astype(np.int64)
        unsure = np.flatnonzero(cell < 0)
        if len(unsure):
            found = np.searchsorted(self._tops, u[unsure], side="right")
            for tie in np.flatnonzero((found > 0) & (self._tops[found - 1] == u[unsure])):
                words = [u[unsure[tie]], *stream.uniform(_WORDS - 1).tolist()]
                bits = sum(int(word * 2**_WORD) << _WORD * place for place, word in enumerate(reversed(words)))
                found[tie] = bisect.bisect_right(self._ends, bits)
            cell[unsure] = found
        return cell

    def _propose(self, stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n candidates, int64 (n,), and which of them to keep, bool (n,)."""
        cell = self._find(stream.uniform(n).numpy(), stream)
        kept = cell < len(self._ends)
        if self._width == 1:
            return cell + self._first, kept
        place = stream.uniform(n).numpy()
        place *= self._width
        offset = place.astype(np.int64)
        place -= offset  # now uniform in [0, 1) and independent of the offset
        x = cell * self._width
        x += offset
        x += self._first
        look = np.flatnonzero((place >= self._sure) & kept)
        if len(look):
            fresh = self._sure + (1 - self._sure) * stream.uniform(len(look)).numpy()
            kept[look] = fresh < np.exp(log_pmf(x[look], self.variance) - self._peak[cell[look]])
        return x, kept
