"""The Gaussian mechanism: Definition 2, the delta it really spends, the analytic calibration, Lemma 1's shares.

All this is for one release of a function with L2 sensitivity D. What many releases spend together is in ``composition``
and ``accounting``; the noise itself is drawn in ``randomness``.
"""

import math

from scipy.optimize import brentq
from scipy.special import erfcx, ndtri

from dopamine_lib.errors import check_delta, check_epsilon, check_whole, check_within

#: Bounds of every scale: far beyond any use, and well inside floating point.
MIN_SCALE, MAX_SCALE = 1e-6, 1e9

_LOG_SQRT_2PI = math.log(2 * math.pi) / 2


def _check_scale(name: str, value: float, remedy: str) -> None:
    check_within(name, value, MIN_SCALE, MAX_SCALE, remedy, low_open=False)


def _check_sensitivity(sensitivity: float) -> None:
    _check_scale("sensitivity", sensitivity, "bound what one patient can change, e.g. by clipping")


def classic_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Standard deviation sqrt(2 ln(1.25 / delta)) D / epsilon of Definition 2.

    Proven for epsilon <= 1 only (Dwork and Roth 2014, theorem A.1). The formula is evaluated beyond, because the
    paper uses it there: then it may add too little noise. To protect anything, use ``analytic_sigma``.
    Raises InputError for epsilon outside (0, 1000], delta outside (0, 1) or sensitivity outside [1e-6, 1e9].

    >>> round(classic_sigma(1.0, 1e-5), 3), round(analytic_sigma(1.0, 1e-5), 3)
    (4.845, 3.731)
    """
    check_epsilon(epsilon)
    check_delta(delta)
    _check_sensitivity(sensitivity)
    return math.sqrt(2 * math.log(1.25 / delta)) * sensitivity / epsilon


def gaussian_delta(sigma: float, epsilon: float, sensitivity: float = 1.0) -> float:
    """The least delta for which noise of standard deviation ``sigma`` is (epsilon, delta)-private.

    Phi(D/2s - eps s/D) - e^eps Phi(-D/2s - eps s/D), for epsilon >= 0: Balle and Wang 2018, theorem 8. It is an
    equality, so nothing is wasted. Raises InputError for sigma or sensitivity out of bounds, or epsilon < 0.

    >>> gaussian_delta(sigma=analytic_sigma(1.0, 1e-5), epsilon=1.0) <= 1e-5
    True
    """
    _check_scale("sigma", sigma, "without noise there is no bound")
    check_epsilon(epsilon, zero=True)
    _check_sensitivity(sensitivity)
    return math.exp(_log_delta(epsilon, sensitivity / sigma))


def analytic_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The least standard deviation that is (epsilon, delta)-private: Balle and Wang 2018, algorithm 1.

    Valid for every epsilon in (0, 1000]. Raises InputError as ``classic_sigma``.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    _check_sensitivity(sensitivity)
    target = math.log(delta)

    def excess(log_mu):
        return _log_delta(epsilon, math.exp(log_mu)) - target

    # delta grows with mu = D / sigma: it is below 0.4 mu, and nearly 1 at the upper end
    low, high = math.log(delta), math.log(100 + 2 * epsilon - 2 * math.log1p(-delta))
    log_mu = brentq(excess, low, high, xtol=1e-15, rtol=1e-15)
    return sensitivity * math.exp(-log_mu) * (1 + 1e-12)  # rounding must not err towards too little noise


def analytic_epsilon(sigma: float, delta: float, sensitivity: float = 1.0) -> float:
    """The least epsilon >= 0 at which noise of standard deviation ``sigma`` spends at most ``delta``.

    The inverse of ``analytic_sigma`` in epsilon; 0 where delta alone pays for the release. Also exact for T
    releases without subsampling, as one with sigma / sqrt(T) (Dong, Roth, Su 2022, corollary 3.3).
    """
    _check_scale("sigma", sigma, "without noise there is no bound")
    check_delta(delta)
    _check_sensitivity(sensitivity)
    mu, target = sensitivity / sigma, math.log(delta)
    if _log_delta(0.0, mu) <= target:
        return 0.0
    # at this epsilon, even the first of theorem 8's two terms is below delta
    high = mu * (mu / 2 - float(ndtri(delta)) + 1)
    return brentq(lambda epsilon: _log_delta(epsilon, mu) - target, 0.0, high, xtol=1e-15, rtol=1e-14)


def _log_delta(epsilon: float, mu: float) -> float:
    """ln delta of N(0, 1) against N(mu, 1), without cancellation where delta or mu is tiny; -inf where delta is 0.

    With x = eps/mu - mu/2 theorem 8 reads phi(x) (M(x) - M(x + mu)), where M(x) = (1 - Phi(x)) / phi(x) is Mills'
    ratio: both terms share a factor, and no e^eps is left to overflow.
    """
    x = epsilon / mu - mu / 2
    log_density = -x * x / 2 - _LOG_SQRT_2PI
    if x < -1:  # delta is near 1, and M(x) would overflow: subtract what is missing from 1
        return math.log1p(-math.exp(log_density) * (_mills(-x) + _mills(x + mu)))
    if mu > 1e-3:
        difference = _mills(x) - _mills(x + mu)
    else:  # the difference would cancel: integrate M' = x M - 1 by two Gauss points, exact to mu^5
        points = [x + mu * (0.5 + side / math.sqrt(12)) for side in (-1, 1)]
        difference = mu * sum(1 - t * _mills(t) for t in points if t < 1e6) / 2
    return math.log(difference) + log_density if difference > 0 else -math.inf


def _mills(x: float) -> float:
    """(1 - Phi(x)) / phi(x) for x >= -1, without overflow."""
    return math.sqrt(math.pi / 2) * float(erfcx(x / math.sqrt(2)))


def _check_hospitals(hospitals: int, count: int, name: str, least: int, remedy: str) -> None:
    check_whole("number of hospitals", hospitals, 1, 10**6, "count those that share the noise")
    check_whole(name, count, least, hospitals - 1 + least, remedy)


def remaining_sigma(sigma: float, hospitals: int, absent: int) -> float:
    """What is left of ``sigma`` on the sum when ``absent`` of K hospitals collude or drop out: sigma sqrt((K - a) / K).

    Each of K hospitals adds a share of sigma / sqrt(K) (Lemma 1 with its variance over K). A colluding hospital
    subtracts its own share; one that drops out never added it. Raises InputError unless 0 <= absent <= K - 1.

    >>> remaining_sigma(1.15, hospitals=10, absent=0), round(remaining_sigma(1.15, hospitals=10, absent=1), 3)
    (1.15, 1.091)
    """
    _check_scale("sigma", sigma, "without noise there is no bound")
    _check_hospitals(hospitals, absent, "number of absent hospitals", 0, "at least one honest hospital must add noise")
    return sigma * math.sqrt((hospitals - absent) / hospitals)


def share_for(sigma: float, hospitals: int, least_honest: int | None = None) -> float:
    """Standard deviation that each of K hospitals must add so that m = ``least_honest`` shares make ``sigma``.

    It is sigma / sqrt(m); None stands for all K: Lemma 1. With fewer, the sum of all K carries sigma sqrt(K / m): the
    price of safety. Raises InputError unless 1 <= least_honest <= K.

    >>> share_for(3.0, hospitals=9), share_for(3.0, hospitals=9, least_honest=4)
    (1.0, 1.5)
    """
    _check_scale("sigma", sigma, "without noise there is no bound")
    least_honest = hospitals if least_honest is None else least_honest
    _check_hospitals(hospitals, least_honest, "least number of honest hospitals", 1, "at most all of them")
    return sigma / math.sqrt(least_honest)
