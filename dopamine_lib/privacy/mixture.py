"""Renyi-DP of a mixture of Gaussians: what a patient spends that a release may hold several times over.

A patient who is drawn j times, with probability w_j, moves a sum by at most j C. Given everybody else's draws the sum
is then a mixture over vectors of such lengths, plus noise of sigma C in every coordinate. It is dominated by the same
mixture of scalars (Choquette-Choo, Ganesh, Steinke, Thakurta 2023, corollary 4.7): P, the mixture of N(j, sigma^2) with
the weights w_j, beside Q = N(0, sigma^2). For local steps j is Binomial(E, q); for E = 1 this is the sampled Gaussian.
"""

import numpy as np
from scipy.special import logsumexp
from scipy.stats import binom

#: The most points of the grid; an order that needs more has no number.
MAX_POINTS = 2**15

#: How far the rounding of a logarithm near 0 may be off.
ROUNDING = 1e-13


def mixture_rdp(sigma: float, sample_rate: float, draws: int, order: float) -> float:
    """Renyi divergence of ``order`` a > 1 between P and Q, in the worse of the two directions; NaN for too much work.

    ln(integral of P^a Q^(1 - a)) / (a - 1), by the trapezoidal rule on a grid of step h = min(sigma, sigma^2) / 4. The
    integrand is analytic up to the zeros of P, a distance of pi sigma^2 from the real line, and falls like a Gaussian:
    so the error is below e^(-2 pi pi sigma^2 / h), 10^-34 of it (Trefethen, Weideman 2014, theorem 5.1).

    >>> round(mixture_rdp(sigma=2.0, sample_rate=0.1, draws=1, order=8), 6)  # large_order_rdp's sum
    0.013725
    """
    h = min(sigma, sigma**2) / 4
    reach = 12 * sigma + 40 * h  # e^-72 lies beyond
    low, high = -order * draws - reach, (order + 1) * draws + reach
    if (high - low) / h > MAX_POINTS:
        return np.nan
    x = np.arange(low, high, h)
    j = np.arange(draws + 1)
    log_weights = binom.logpmf(j, draws, sample_rate)
    loss = logsumexp(log_weights + j * (2 * x[:, None] - j) / (2 * sigma**2), axis=1)  # ln(P / Q)
    log_q = -((x / sigma) ** 2) / 2 - np.log(sigma * np.sqrt(2 * np.pi)) + np.log(h)
    moments = logsumexp(np.stack([log_q + order * loss, log_q + (1 - order) * loss]), axis=1)
    return max(0.0, float(moments.max()) + ROUNDING) / (order - 1)
