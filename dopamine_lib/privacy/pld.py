"""The privacy loss distribution (PLD) of many sampled Gaussian steps: an upper bound on epsilon, tight at every delta.

A step is dominated by a pair P, Q of distributions on the real line (Zhu, Dong, Wang 2022). The loss ln(P/Q) of many
steps is a sum of independent ones. It is composed on a grid in three moves, each on the safe side:

    cells  The line is cut into cells. A cell's mass moves to the two grid points around its losses, in the only shares
           that keep its probability under P and under Q. The cell could be made from the two points by merging them,
           so delta only grows, by the square of the grid's step (Doroshenko et al. 2022, "connect the dots").
    tilt   Masses are weighted by e^(lambda loss), lambda from Chernoff's bound at delta, before the fast Fourier
           transform. Its rounding is then relative to delta. Without the tilt it is relative to 1, and at
           delta = 1e-12 the PLD of Google's dp-accounting and Opacus's PRV fall below the exact epsilon.
    ends   What lies outside all cells, or beyond the grid's end (Chernoff's bound), is charged to delta in full.

The answer is rounded up by one step of the grid, far more than the rounding of floating-point numbers amounts to. Both
directions count: a patient added and a patient removed. Work and memory are the same for every input.
"""

import functools
import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.signal import lfilter
from scipy.special import ndtr, ndtri
from scipy.stats import binom

#: Cells of the line, and points of the grid: 0.1 s and 40 MB for each direction.
CELLS, POINTS = 2**17, 2**17
#: The part of delta for what lies outside all cells, and again for what lies beyond the grid.
OUTSIDE = 1e-6
#: The largest epsilon that is worked out: beyond, losses have too few digits.
MAX_EPSILON = 1e6
#: The least delta per step: below, the normal distribution's quantile is out of reach.
MIN_DELTA = 1e-290


@functools.lru_cache(maxsize=4096)
def pld_epsilon(history: tuple[tuple, ...], delta: float, images: int = 1) -> float | None:
    """An upper bound on epsilon at ``delta`` of (sigma, q, steps) composed, within about 1e-4 of the least.

    history  of each event (sigma, q, steps), or (sigma, q, steps, draws) where a step draws patients several times
    images   k, how many the person has whom neighbours add or remove; each is sampled independently at rate q, in every
             draw, so that k counts draws times as much
    Infinity beyond ``MAX_EPSILON``; None where delta is too small for floats, below ``MIN_DELTA`` per step.

    The pair is the mixture P of N(j, sigma^2), j = 0 … k from Binomial(k, q), against Q = N(0, sigma^2). The clipped
    gradients of j sampled images add up to a vector of length j C at most, and mixtures of such vectors are dominated
    by this one of scalars (Ganesh 2024, "mixture of Gaussians"; for draws: ``mixture``). Other patients' samples are
    the same for both neighbours: given them this holds, and mixing over them adds nothing (joint convexity).

    >>> fscdp = ((1.15, 100 / 2930, 3001),)
    >>> round(pld_epsilon(fscdp, delta=1e-4), 2), round(pld_epsilon(fscdp, delta=1e-12), 3)
    (8.98, 16.544)
    """
    steps = sum(times for _, _, times, *_ in history)
    if delta / steps < MIN_DELTA:
        return None
    reach = float(-ndtri(OUTSIDE * delta / (2 * steps)))
    removed = [(*_cells(sigma, q, images * math.prod(draws), reach), times) for sigma, q, times, *draws in history]
    if any(loss[-1] > MAX_EPSILON for loss, *_ in removed):
        return math.inf
    # total variation distances add up at most; in the cell where the loss changes its sign, all of P counts
    apart = (times * np.where(loss[:-1] >= 0, p - q, p)[loss[1:] > 0].sum() for loss, p, q, times in removed)
    if sum(apart) <= delta * (1 - OUTSIDE):
        return 0.0
    added = [(-loss[::-1], q[::-1], p[::-1], times) for loss, p, q, times in removed]
    return max(_one_direction(removed, delta), _one_direction(added, delta))


def loss_distribution(
    noise_multiplier: float, sample_rate: float, steps: int, ends: tuple[float, float] = (-8.0, 24.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (n,) of sampled Gaussian steps composed, a patient removed, and their probabilities (n,), to look at.

    It has one grid for all steps and no tilt, so it is good to about 1e-12, and losses beyond ``ends`` wrap around.

    >>> losses, masses = loss_distribution(1.15, 100 / 2930, 3001)
    >>> round(float(masses @ np.maximum(0, 1 - np.exp(8.98 - losses))), 6)  # delta at the epsilon of ``pld_epsilon``
    0.0001
    """
    step = (ends[1] - ends[0]) / POINTS
    first = round(ends[0] / step)
    points, masses = _onto_grid(*_cells(noise_multiplier, sample_rate, 1, 8.0), step)
    spectrum = np.fft.rfft(np.bincount(points % POINTS, weights=masses, minlength=POINTS)) ** steps
    composed = np.roll(np.fft.irfft(spectrum, POINTS), -(first % POINTS))
    return (first + np.arange(POINTS)) * step, np.maximum(composed, 0)


@functools.lru_cache(maxsize=16)
def _cells(sigma: float, sample_rate: float, images: int, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The losses at the cells' ends (CELLS + 1,), and each cell's probability under P and under Q (CELLS,).

    reach  standard deviations covered beyond the outermost means
    """
    ends = np.linspace(-sigma * reach, images + sigma * reach, CELLS + 1)

    def probability(mean):  # from the nearer tail, where differences keep their digits
        y = (ends - mean) / sigma
        return np.where(ends[1:] <= mean, np.diff(ndtr(y)), -np.diff(ndtr(-y)))

    weights = binom.pmf(np.arange(images + 1), images, sample_rate).tolist()
    parts = [(j, weight) for j, weight in enumerate(weights) if weight > 0]
    loss = functools.reduce(np.logaddexp, [math.log(w) + j * (2 * ends - j) / (2 * sigma**2) for j, w in parts])
    return loss, sum(weight * probability(j) for j, weight in parts), probability(0)


def _chernoff(steps: list[tuple[np.ndarray, np.ndarray, int]], delta: float) -> tuple[float, float]:
    """(lambda, epsilon) of the least epsilon with ln E[e^(lambda loss)] - lambda epsilon <= ln delta.

    It is the classic conversion of Renyi-DP at order lambda + 1, over all orders.
    """

    def bound(log_order):
        order = math.exp(log_order)
        return (sum(n * _log_sum(order * loss, p) for loss, p, n in steps) - math.log(delta)) / order

    found = minimize_scalar(bound, bounds=(-10, 25), method="bounded", options={"xatol": 1e-2})
    return math.exp(found.x), found.fun


def _one_direction(steps: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]], delta: float) -> float:
    """Epsilon of steps given by their cells, (losses at ends, P, Q, times): ``epsilon`` for one of two neighbours."""
    rough = [(loss[32::64], p.reshape(-1, 64).sum(axis=1), times) for loss, p, _, times in steps]
    tilt, centre = _chernoff(rough, delta)
    end_tilt, end = _chernoff(rough, OUTSIDE * delta)
    spread = math.sqrt(sum(times * _tilted_variance(loss, p, tilt) for loss, p, times in rough))
    start = centre - 8 * spread if centre > 20 * spread else min(0.0, centre - 8 * spread)
    if not end < MAX_EPSILON:
        return math.inf
    step = (end - start) / (POINTS - 2)
    first = math.floor(start / step)
    beyond, log_scale, spectrum = (first + POINTS) * step, -tilt * centre, 1.0
    log_beyond = -end_tilt * beyond
    for loss, p, q, times in steps:
        points, masses = _onto_grid(loss, p, q, step)
        log_moment = _log_sum(tilt * step * points, masses)
        tilted = masses * np.exp(tilt * step * points - log_moment)
        spectrum = spectrum * np.fft.rfft(np.bincount(points % POINTS, weights=tilted, minlength=POINTS)) ** times
        log_scale += times * log_moment
        log_beyond += times * _log_sum(end_tilt * step * points, masses)
    # in units of e^log_scale, Chernoff's bound at the centre; totals below the start wrap around, and count as larger
    total = np.maximum(np.roll(np.fft.irfft(spectrum, POINTS), -(first % POINTS)), 0)
    losses = (first + np.arange(POINTS)) * step
    known = tilt * (centre - losses) < 600  # further below, weights would overflow
    losses, above_p = losses[known], (total[known] * np.exp(tilt * (centre - losses[known])))[::-1]
    above_q = lfilter([1], [1, -math.exp(-step)], above_p)[::-1]  # of e^(loss here - loss), which sums up Q
    above_p = np.cumsum(above_p)[::-1]
    target = (delta * (1 - OUTSIDE) - math.exp(log_beyond)) * math.exp(-log_scale)
    at = np.count_nonzero(above_p - above_q > target)  # delta falls with epsilon
    if at == len(losses):
        return math.inf
    answer = losses[at]
    if at and above_p[at] > target:  # between two points delta is a straight line in e^epsilon
        answer = min(max(answer + math.log((above_p[at] - target) / above_q[at]), losses[at - 1]), answer)
    return max(0.0, float(answer + step))


def _log_sum(exponents: np.ndarray, weights: np.ndarray) -> float:
    most = exponents.max()
    return most + math.log(weights @ np.exp(exponents - most))


def _tilted_variance(loss: np.ndarray, p: np.ndarray, tilt: float) -> float:
    weights = p * np.exp(tilt * (loss - loss.max()))
    weights /= weights.sum()
    return float(weights @ np.square(loss - weights @ loss))


def _onto_grid(loss: np.ndarray, p: np.ndarray, q: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Grid points as multiples of ``step``, int64 (2 CELLS,), and their masses under P, that dominate the cells."""
    below = np.floor(loss[:-1] / step)
    above = np.maximum(np.ceil(loss[1:] / step), below + 1)
    with np.errstate(over="ignore", invalid="ignore"):  # where Q underflows, all goes up
        up = (p - q * np.exp(below * step)) / -np.expm1((below - above) * step)
    up = np.where(q > 1e-290, np.clip(up, 0, p), p)
    points = np.clip(np.concatenate([below, above]), -(2.0**62), 2.0**62)  # what would not fit is far off the grid
    return points.astype(np.int64), np.concatenate([p - up, up])
