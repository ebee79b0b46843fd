"""What many releases spend together, from basic composition to Renyi-DP, and what a random sample buys.

For reading and for pictures: every function is one theorem. What the kit charges a training run is in ``accounting``;
a test holds it equal to ``rdp_curve`` here.
"""

import functools
import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln

from dopamine_lib.errors import check_delta, check_epsilon, check_whole, check_within
from dopamine_lib.privacy.accounting import ORDERS, SampledGaussian


def _check(epsilon: float, delta: float, times: int) -> None:
    check_epsilon(epsilon)
    check_delta(delta, zero=True)
    check_whole("number of releases", times, 1, 10**7, "count them")


def basic(epsilon: float, delta: float, times: int) -> tuple[float, float]:
    """(epsilon, delta) of ``times`` releases, each (epsilon, delta)-private: both add up.

    Dwork and Roth 2014, theorem 3.16. Raises InputError for epsilon outside (0, 1000], delta outside [0, 1), or times
    not 1, 2, ….

    >>> basic(0.5, 0.0, times=4)
    (2.0, 0.0)
    """
    _check(epsilon, delta, times)
    return times * epsilon, min(1.0, times * delta)


def advanced(epsilon: float, delta: float, times: int, slack: float) -> tuple[float, float]:
    """(epsilon, delta) of ``times`` releases, where ``slack`` more delta buys an epsilon growing like sqrt(times).

    sqrt(2 k ln(1/slack)) eps + k eps (e^eps - 1) at k delta + slack: Dwork, Rothblum, Vadhan 2010, theorem III.3;
    Dwork and Roth 2014, theorem 3.20. Raises InputError as ``basic``, and for a slack outside (0, 1).
    """
    _check(epsilon, delta, times)
    check_within("slack", slack, 0, 1, "take a part of the delta you can spend", high_open=True)
    total = math.sqrt(2 * times * math.log(1 / slack)) * epsilon
    with np.errstate(over="ignore"):
        total += times * epsilon * float(np.expm1(epsilon))
    return total, min(1.0, times * delta + slack)


def optimal(epsilon: float, delta: float, times: int, slack: float) -> tuple[float, float]:
    """(epsilon, delta) of ``times`` releases: the best bound that holds for every (epsilon, delta)-private mechanism.

    Kairouz, Oh, Viswanath 2015, theorem 3.3: the worst mechanism is randomised response, and the privacy loss of k
    of them is epsilon (2 i - k) with i from a binomial. Raises InputError as ``advanced``.
    """
    _check(epsilon, delta, times)
    check_within("slack", slack, 0, 1, "take a part of the delta you can spend", high_open=True)
    ones = np.arange(times + 1)
    log_choose = gammaln(times + 1) - gammaln(ones + 1) - gammaln(times - ones + 1)
    log_p = log_choose + ones * epsilon - times * np.logaddexp(0, epsilon)
    loss = (2 * ones - times) * epsilon

    def spent(total):
        above = loss > total
        return float(np.sum(np.exp(log_p[above]) * -np.expm1(total - loss[above])))

    least = 0.0
    if spent(0.0) > slack:
        root = brentq(lambda total: spent(total) - slack, 0.0, times * epsilon, xtol=1e-300, rtol=1e-11, maxiter=1000)
        least = min(root * (1 + 1e-10), times * epsilon)  # rounded up
    return least, -math.expm1(times * math.log1p(-delta) + math.log1p(-slack))


def amplified(epsilon: float, delta: float, sample_rate: float) -> tuple[float, float]:
    """(epsilon, delta) of a release on a Poisson sample, if it is (epsilon, delta)-private on all patients.

    ln(1 + q (e^eps - 1)) and q delta, for neighbours by adding or removing one: Balle, Barthe, Gaboardi 2018,
    theorem 8. It holds only while nobody learns who was sampled. Raises InputError for q outside (0, 1].

    >>> round(amplified(1.0, 0.0, sample_rate=0.01)[0], 3)
    0.017
    """
    _check(epsilon, delta, 1)
    check_within("sample rate", sample_rate, 0, 1, "it is a probability, batch / patients")
    if epsilon > 700:  # e^eps would overflow, and 1 no longer counts beside q e^eps
        return epsilon + math.log(sample_rate), sample_rate * delta
    return math.log1p(sample_rate * math.expm1(epsilon)), sample_rate * delta


@functools.lru_cache(maxsize=512)
def rdp_curve(noise_multiplier: float, sample_rate: float) -> np.ndarray:
    """Renyi-DP of one Poisson-sampled Gaussian step at each of ``accounting.ORDERS``; read-only, cached.

    ln E[(1 - q + q e^((2z - 1) / 2 sigma^2))^a] / (a - 1) with z from N(0, sigma^2) (Mironov, Talwar, Zhang 2019,
    section 3.3), by the trapezoidal rule for all orders at once: milliseconds, where closed forms for each order take
    tenths of a second. Raises InputError for q outside (0, 1] or sigma outside [0.2, 1000].
    """
    SampledGaussian(noise_multiplier, sample_rate, 1)
    check_within("noise multiplier", noise_multiplier, 0.2, 1000, "the integral is cut for these", low_open=False)
    sigma, orders = noise_multiplier, np.array(ORDERS)[:, None]
    step = min(sigma, sigma**2) / 4
    z = np.arange(-12 * sigma, orders.max() + 12 * sigma, step)
    stays = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    log_ratio = np.logaddexp(stays, math.log(sample_rate) + (2 * z - 1) / (2 * sigma**2))
    log_moment = _log_sum(orders * log_ratio - z**2 / (2 * sigma**2)) + math.log(
        step / (sigma * math.sqrt(2 * math.pi))
    )
    rdp = np.maximum(log_moment, 0) / (orders[:, 0] - 1)
    rdp.flags.writeable = False
    return rdp


def _log_sum(terms: np.ndarray) -> np.ndarray:
    """ln of the sum of e^terms along the last axis; overwrites ``terms``."""
    most = terms.max(axis=1)
    terms -= most[:, None]
    return most + np.log(np.exp(terms, out=terms).sum(axis=1))
