"""Discrete noise: a hospital's clipped sum is rounded, noised and sent as integers, and the bound is for these.

Encryption and masks carry integers. If floats are noised first and rounded afterwards, the bound is for numbers that
nobody sent. Here hospital k, whose clipped sum is a_k in R^d, sends at the scale s (units in 1.0)

    z_k = round(clamp(s a_k)) + Skellam noise,        and what is decrypted or unmasked is the sum of the z_k:

    clamp     to a box: a projection onto a convex set, which moves no two points further apart
    round     at random, floor(x + u) with u uniform: unbiased. One patient's contribution, a vector w of length s C at
              most, becomes a random rounding of w, for u is the same with and without the patient. Its squared length
              is at most |w|^2 + d/4 + sqrt(2 ln(1 / failure)) (|w| + sqrt(d)/2), except with probability
              ROUNDING_FAILURE, which is charged to delta: Kairouz, Liu, Steinke 2021, proposition 22. Rounding to
              nearest lengthens it up to |w| + sqrt(d), and for large d that is much more
    noise     of variance (sigma s C)^2 / m per hospital, so that any m shares make up sigma; larger by the slack of
              floating-point sums (``float_sums``). Its Renyi-DP is in ``skellam.rdp``
    sample    Poisson at rate q: ``skellam.sampled_rdp``. Given all other patients' samples and all u, a step is
              Skellam noise at 0 or, with probability q, at a vector D; mixing over what was given adds nothing (joint
              convexity)
    twin      Skellam noise of a large variance is next to Gaussian noise that is rounded. In a whole run their
              log-probabilities differ by t at most (``SampledSkellam.gap``), so (epsilon, delta) of the Gaussian is
              (epsilon + 2t, e^t delta) of the Skellam mechanism. And rounded Gaussian noise on integers is computed
              from the ideal mechanism's output, whose epsilon every accountant knows. Where units are too coarse for
              t to be small, Skellam's own Renyi-DP remains; it is known at whole orders only, which costs CDP 0.07
              and FPDP 0.43 (convexity in the order between whole ones gives the classic conversion nothing)
    range     a total beyond the range wraps around. That is post-processing of the noisy total, but a program that
              stopped there would give it away, so its probability is charged to delta all the same

The sampler's own error is charged too. Neighbours differ by adding or removing one patient.
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dopamine_lib.errors import InputError, check_whole, check_within
from dopamine_lib.privacy import skellam
from dopamine_lib.privacy.accounting import MAX_STEPS, SampledGaussian
from dopamine_lib.privacy.float_sums import FLOAT_SLACK
from dopamine_lib.privacy.randomness import Stream
from dopamine_lib.privacy.rounded_gaussian import BOX, check_terms

#: Probability per step that random rounding moves further than the sensitivity says; charged to delta.
ROUNDING_FAILURE = 1e-12
#: The largest probability of an overflow in a whole training; charged to delta.
OVERFLOW = 1e-9
#: The part of delta reserved for the sampler's error.
SAMPLER_PART = 1e-3
#: The most that log-probabilities of a whole run may differ from those of Gaussian noise, where its bound is taken.
MOST_APART = 5e-4
ROUNDINGS = ("random", "nearest")


class IntegerNoise:
    """Skellam noise on the rounded sums of K hospitals: what each sends, and what that spends.

    The discrete twin of ``RoundedGaussian``, whose box is explained there.

    noise_multiplier  sigma of the survivors' noise together, in units of C
    max_grad_norm     C, the clipping norm of one patient's gradient
    hospitals         K; ``least`` of them (by default all) must survive a round, and their shares make up sigma
    d                 number of parameters
    total_range       the largest |total| that the aggregation returns
    sample_rate       q
    steps             T, as planned
    scale             s, units in 1.0; by default the largest whose probability of an overflow is below ``OVERFLOW``
    box               largest |value| of one hospital's sum, in units of C; what is larger is clamped
    rounding          "random", or "nearest" to see what that costs
    Raises InputError for values out of their bounds, and for a scale that is too fine for the range.
    """

    discrete = True

    def __init__(
        self,
        noise_multiplier: float,
        max_grad_norm: float,
        hospitals: int,
        d: int,
        *,
        total_range: int,
        sample_rate: float,
        steps: int,
        least: int | None = None,
        scale: float | None = None,
        box: float = BOX,
        rounding: str = "random",
    ):
        check_terms(noise_multiplier, max_grad_norm, hospitals, least, d, sample_rate, steps)
        check_within("box", box, 0, 2**31, "it is in units of the clipping norm")
        if rounding not in ROUNDINGS:
            raise InputError(f"rounding is {rounding!r}, but must be one of {', '.join(ROUNDINGS)}")
        self.noise_multiplier, self.max_grad_norm, self.rounding = noise_multiplier, max_grad_norm, rounding
        self.hospitals, self.least, self.d = hospitals, least or hospitals, d
        self.total_range, self.sample_rate, self.steps = total_range, sample_rate, steps
        self._box = box * max_grad_norm
        most = self._largest_scale()
        if scale is not None and not 0 < scale <= most:
            raise InputError(
                f"scale is {scale:g}, but totals up to {total_range} hold at most {most:.6g} units in 1.0: take a "
                "smaller scale or a wider layout"
            )
        self.scale = most if scale is None else float(scale)
        self._sampler = skellam.Sampler(self.share_variance)

    @property
    def share_variance(self) -> float:
        """Variance of one hospital's noise, in units squared: (sigma s C)^2 / least, with its slack."""
        return self._share_variance(self.scale)

    @property
    def box(self) -> float:
        """Largest |value| of a hospital's sum; what is larger is clamped to it."""
        return self._box

    @property
    def box_units(self) -> int:
        """Largest |value| of a hospital's sum before the noise, in units."""
        return math.floor(self._box * self.scale)

    @property
    def l2_sensitivity(self) -> float:
        """How far one patient moves the total (L2, in units): clipping, float32 and rounding together."""
        moved, d = self.scale * self.max_grad_norm * (1 + FLOAT_SLACK), self.d
        nearest = moved + math.sqrt(d)
        if self.rounding == "nearest":
            return nearest
        deviation = math.sqrt(-2 * math.log(ROUNDING_FAILURE)) * (moved + math.sqrt(d) / 2)
        return min(nearest, math.sqrt(moved**2 + d / 4 + deviation))

    @property
    def l1_sensitivity(self) -> float:
        """The same in L1: at most sqrt(d) times as much, and at most its square, for the moves are integers."""
        return min(math.sqrt(self.d) * self.l2_sensitivity, self.l2_sensitivity**2)

    @property
    def inflation(self) -> float:
        """The L2 sensitivity relative to that of continuous noise, s C with its slack: what integers cost."""
        return self.l2_sensitivity / (self.scale * self.max_grad_norm * (1 + FLOAT_SLACK))

    @property
    def outside(self) -> float:
        """Probability of a noise value that the sampler never draws, under 1e-30."""
        return self._sampler.outside

    def overflow_probability(self, steps: int | None = None) -> float:
        """An upper bound on P(any value of any total leaves the range) over ``steps`` with all K hospitals' noise."""
        return self._overflow(self.scale, self.steps if steps is None else steps)

    def draw(self, stream: Stream, steps: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
        """One hospital's randomness for each of ``steps``, to be used once: pairs (u, noise).

        u are the roundings' uniforms, float64 (d,) in [0, 1); the noise is int64 (d,). For a small model, many steps
        drawn at once cost less.
        """
        u = skellam.uniform(stream, steps * self.d).reshape(steps, self.d)
        return list(zip(u, self._sampler.draw(stream, steps * self.d).reshape(steps, self.d), strict=True))

    def combine(self, clipped_sum: Tensor | np.ndarray, drawn: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """What one hospital sends in a step: its clipped sum (d,), clamped, rounded and noised, as int64 (d,).

        drawn  one of the pairs that ``draw`` returns
        Raises InputError for a sum of another shape.
        """
        u, noise = drawn
        x = np.multiply(np.asarray(clipped_sum), self.scale, dtype=np.float64)
        if x.shape != (self.d,):
            raise InputError(f"a sum of shape {x.shape} was given, but must be ({self.d},): take the task's own")
        np.fmin(x, self.box_units, out=x)  # a NaN, too, ends in the box
        np.fmax(x, -self.box_units, out=x)
        if self.rounding == "nearest":
            whole = np.rint(x, out=x)
        else:
            whole = np.floor(x)
            x -= whole  # exact, unlike floor(x + u) in floating point
            whole += u < x
        message = whole.astype(np.int64)
        message += noise
        return message

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The noisy sum of gradients, float64 (d,), that a total int64 (d,) stands for."""
        return total / self.scale

    def event(self, steps: int, colluding: int = 0) -> "SampledSkellam":
        """What ``steps`` totals spend against ``colluding`` hospitals, which subtract their own shares."""
        return SampledSkellam(self, steps, colluding)

    def _share_variance(self, scale: float) -> float:
        return (self.noise_multiplier * scale * self.max_grad_norm * (1 + FLOAT_SLACK)) ** 2 / self.least

    def _overflow(self, scale: float, steps: int) -> float:
        variance = self.hospitals * self._share_variance(scale)
        room = self.total_range - self.hospitals * math.floor(self._box * scale)
        return min(1.0, steps * self.d * skellam.tail(room, variance))

    def _largest_scale(self) -> float:
        """The largest scale that keeps overflows below ``OVERFLOW``, to a relative 1e-6 and rounded down."""
        low, high = 0.0, self.total_range / (self.hospitals * self._box)
        while high - low > 1e-6 * high:  # not SciPy's: every seeded run depends on the digits that these halvings give
            middle = (low + high) / 2
            low, high = (middle, high) if self._overflow(middle, max(1, self.steps)) <= OVERFLOW else (low, middle)
        return low


@dataclass(frozen=True)
class SampledSkellam:
    """The integer totals of ``steps`` rounds, as a ``DpEvent``: as their Gaussian twin's where that is near enough.

    colluding  hospitals that subtract their own shares: 1 for a curious hospital's view, 0 for an outsider's
    Raises InputError unless 0 <= colluding < least, and for a negative or fractional number of steps.
    """

    noise: IntegerNoise
    steps: int
    colluding: int = 0

    def __post_init__(self):
        check_whole("number of steps", self.steps, 0, MAX_STEPS, "count the noisy steps")
        check_within("colluding", self.colluding, 0, self.noise.least - 1, "one share must be unknown", low_open=False)

    @property
    def variance(self) -> float:
        """Of the noise that is left, the shares of ``least`` less ``colluding`` hospitals, in units squared."""
        return self.noise.share_variance * (self.noise.least - self.colluding)

    @property
    def gap(self) -> float:
        """t: by how much the log-probabilities of all the noise differ from those of rounded Gaussian noise."""
        return skellam.gaussian_gap(self.steps * self.noise.d, self.variance)

    @property
    def twin(self) -> SampledGaussian | None:
        """The sampled Gaussian mechanism whose bound holds but for ``gap``; None where that is too much."""
        if self.gap > MOST_APART:
            return None
        return SampledGaussian(math.sqrt(self.variance) / self.noise.l2_sensitivity, self.noise.sample_rate, self.steps)

    @property
    def orders(self) -> tuple[float, ...]:
        """As in ``DpEvent``."""
        return self.twin.orders if self.twin else skellam.ORDERS

    @property
    def large_orders(self) -> tuple[float, ...]:
        """As in ``DpEvent``."""
        return self.twin.large_orders if self.twin else ()

    @property
    def prv(self) -> tuple[float, float, int, int] | None:
        """As in ``DpEvent``."""
        return self.twin.prv if self.twin else None

    def rdp(self, orders: tuple[float, ...]) -> np.ndarray:
        """Renyi-DP of all steps at each of ``orders``."""
        if self.twin:
            return self.twin.rdp(orders)
        noise = self.noise
        curve = skellam.sampled_rdp(self.variance, noise.l1_sensitivity, noise.l2_sensitivity, noise.sample_rate)
        at = dict(zip(skellam.ORDERS, curve, strict=True))
        return self.steps * np.array([at[order] for order in orders])

    def delta_left(self, delta: float) -> float:
        """``delta`` less the probabilities of rounding failures and overflows, and less the sampler's thousandth."""
        failure = ROUNDING_FAILURE if self.noise.rounding == "random" else 0.0
        return (delta - self.steps * failure - self.noise.overflow_probability(self.steps)) * (1 - SAMPLER_PART)

    def with_sampler(self, epsilon: float, delta: float, left: float) -> float:
        """Epsilon of noise from ``Sampler`` where exact noise has (epsilon, left); infinity where delta is too small.

        The log-probability of n draws is off by a sum of n terms within +-e, whose mean is e^2 at most: by Hoeffding's
        inequality by no more than t = n e^2 + e sqrt(2 n ln(1/b)), except with probability b. To t comes the gap where
        the twin's bound is taken. Both neighbours' outputs change by that: (epsilon + 2t, e^t left +
        (1 + e^(epsilon + t)) times the probability of a larger error, or of a value out of reach).
        """
        draws, error = self.noise.hospitals * self.noise.d * self.steps, skellam.LOG_ERROR
        t = draws * error**2 + error * math.sqrt(2 * draws * -math.log(skellam.UNLIKELY))
        missing = skellam.UNLIKELY + draws * self.noise.outside
        if self.twin:
            t, missing = t + self.gap, missing + skellam.UNLIKELY + 2 * draws * skellam.BEYOND
        if epsilon > 300 or math.expm1(t) * delta + (1 + math.exp(epsilon + t)) * missing > SAMPLER_PART * left:
            return math.inf
        return epsilon + 2 * t
