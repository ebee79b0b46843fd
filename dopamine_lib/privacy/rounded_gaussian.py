"""Gaussian noise on a public grid: what a hospital sends is an integer, and its probabilities are exact.

Hospital j, whose clipped sum is a_j in R^d, sends at the scale s (units in 1.0)

    z_j = round(clamp(s a_j) + N(0, v)),        coordinate by coordinate, a real number rounded once (``normal``)

    clamp     to a public box: a projection onto a convex set, which moves no two points further apart. Nothing is
              refused, for a refusal would depend on the patients and tell of them
    alone     a message is computed from the ideal Gaussian mechanism's output, so it spends no more than that
    together  H messages' sum is nearly R = round(sum of clamp(s a_j) + N(0, H v) + U), with U the sum of H - 1
              independent variables uniform on (-1/2, 1/2), which is again computed from the ideal's. How nearly? With
              psi_j(t) = e^(i t x_j - v t^2 / 2) sin(t / 2) / (t / 2), z_j has the characteristic function
              sum over integers m of psi_j(t + 2 pi m) (Poisson's summation formula), and R's is the sum over m of
              prod_j psi_j(t + 2 pi m). So the two differ by the products whose m_j are not all equal. For |t| <= pi
              and i of the m_j unequal to 0 these are below e^(-2 pi^2 v i (H - i) / H), or e^(-pi^2 v H / 2) where i is
              at least H / 2, and their sum is below 12 H e^(-pi^2 v). No probability differs by more. Over the
              integers within pi v sqrt(2 H) + H / 2 of the mean, with what lies beyond, that is a total variation
              distance of at most 100 v H^2 e^(-pi^2 v) per coordinate: ``failure``, which is charged to delta. For
              v = 64^2 it is 10^-17,000. Colluders who subtract their own integers leave such a sum, or one message
    slack     sums of neighbours, as computed, may differ by more than C, relatively by ``FLOAT_SLACK``: the noise is
              larger by that, so that sigma and every epsilon stay what they are
    range     a sum beyond the layout's range would wrap around, so ``REACH`` standard deviations of noise are kept free
              on either side. The probability of more, below 10^-340 per value, is in ``failure`` too

The grid, the box and the scale are made of public numbers alone.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.privacy.accounting import SampledGaussian
from dopamine_lib.privacy.device_normal import DeviceNormals
from dopamine_lib.privacy.dpsgd import noise_share
from dopamine_lib.privacy.float_sums import FLOAT_SLACK
from dopamine_lib.privacy.gaussian import remaining_sigma
from dopamine_lib.privacy.normal import BLOCK, ERROR, Normals
from dopamine_lib.privacy.randomness import Stream

#: Standard deviation of a hospital's noise, in units: what is wanted, and the least. At 64, rounding adds a 49,000th to
#: the noise's variance; at 4 half a per cent, and ``failure`` is 10^-60 or so.
UNITS, LEAST_UNITS = 64.0, 4.0
#: Standard deviations of all hospitals' noise that the range has room for.
REACH = 40.0
#: Least of the box that clamps a hospital's sum, in units of C; usually it is larger. In the head's training the
#: largest of a sum's values was 0.9 in the median and below 4.4 in 99.9 % of the sums.
BOX = 4.0


def most_in_a_sum(sample_rate: float, patients: int) -> int:
    """A bound on one hospital's Poisson sample, exceeded with probability below 1e-16 per step (Chernoff).

    It bounds the box that a sum needs: what is larger is clamped.

    >>> most_in_a_sum(sample_rate=100 / 2930, patients=293)  # 10 on average
    52
    """
    mean = sample_rate * patients
    return math.ceil(mean + 10 * math.sqrt(mean) + 10)


def check_terms(
    noise_multiplier: float,
    max_grad_norm: float,
    hospitals: int,
    least: int | None,
    d: int,
    sample_rate: float,
    steps: int = 1,
) -> None:
    """Raise InputError for terms of a hospital's noise, as ``RoundedGaussian`` takes them, that are out of bounds."""
    SampledGaussian(noise_multiplier, sample_rate, steps)  # for its checks
    check_within("clipping norm", max_grad_norm, 0, 1e6, "without one nothing is bounded")
    check_within("hospitals", hospitals, 1, 10**6, "count those that may take part", low_open=False)
    check_within("least", hospitals if least is None else least, 1, hospitals, "no more arrive", low_open=False)
    check_within("d", d, 1, 2**31, "it is the number of values", low_open=False)


class RoundedGaussian:
    """One hospital's share of Gaussian noise, and its message as integers: Algorithm 1, line 13.

    noise_multiplier  sigma of the survivors' noise together, in units of C
    max_grad_norm     C, how far one patient moves a sum (L2)
    hospitals         K; ``least`` of them (by default all) must survive a round, and their shares make up sigma
    d                 number of values in a message
    total_range       the largest |total| that the aggregation returns
    sample_rate       q
    patients          at most in one hospital's sum
    box               C's that the box must have room for, by default ``BOX``, or ``patients`` where these are fewer
    draws             times over that a step draws patients
    Raises InputError for values out of their bounds, and for a range that is too narrow.

    >>> noise = RoundedGaussian(1.15, 0.5, 10, 2565, total_range=2**15 - 1, sample_rate=100 / 2930, patients=52)
    >>> round(noise.scale), round(noise.box / 0.5), noise.failure  # units in 1.0; C's in the box
    (352, 14, 0.0)
    """

    discrete = False

    def __init__(
        self,
        noise_multiplier: float,
        max_grad_norm: float,
        hospitals: int,
        d: int,
        *,
        total_range: int,
        sample_rate: float,
        patients: int,
        least: int | None = None,
        box: float | None = None,
        draws: int = 1,
    ):
        check_terms(noise_multiplier, max_grad_norm, hospitals, least, d, sample_rate)
        check_within("patients in a sum", patients, 1, 2**31, "somebody must be in it", low_open=False)
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.sample_rate, self.draws = sample_rate, draws
        self.hospitals, self.least, self.d, self.total_range = hospitals, least or hospitals, d, total_range
        share = noise_share(noise_multiplier, max_grad_norm, self.least) * (1 + FLOAT_SLACK)
        needed = (min(BOX, patients) if box is None else box) * max_grad_norm
        # a share of one unit takes this much of the range: every hospital's box, and the noise of all
        reach, room = REACH * math.sqrt(hospitals), total_range - hospitals / 2
        self.std = min(UNITS, room / (hospitals * needed / share + reach))
        if self.std < LEAST_UNITS:
            raise InputError(
                f"a hospital's noise would have a standard deviation of {self.std:.3g} units in totals up to "
                f"{total_range}, but needs {LEAST_UNITS:g}: take a wider layout or fewer hospitals"
            )
        self.scale = self.std / share
        fits, most = (room - reach * self.std) / hospitals, patients * max_grad_norm * 1.01 * self.scale
        self._box = math.floor(min(max(fits, needed * self.scale), most))
        # the noise's error, and that of adding it to a sum in float64
        self._sure = 0.5 - self.std * ERROR - (self._box + 9 * self.std) * 2.0**-52

    @property
    def share_variance(self) -> float:
        """v: variance of one hospital's noise, in units squared, (sigma s C)^2 / least with its slack."""
        return self.std**2

    @property
    def box(self) -> float:
        """Largest |value| of a hospital's sum; what is larger is clamped to it."""
        return self._box / self.scale

    @property
    def failure(self) -> float:
        """Total variation distance of a round's totals from what follows from the ideal's, and of an overflow."""
        v, others = self.share_variance, self.hospitals
        apart = 100 * v * others**2 * math.exp(-(math.pi**2) * v) if others > 1 else 0.0
        room = self.total_range - others * (self._box + 0.5)
        return min(1.0, self.d * (apart + 2 * math.exp(-(room**2) / (2 * others * v))))

    def draw(self, stream: Stream, steps: int = 1, device: torch.device | None = None) -> list[tuple[Normals, int]]:
        """One hospital's noise for each of ``steps``, to be used once: pairs of variables and where a step's begin.

        For a small model, many steps drawn at once cost less. Drawn for a device, it is for ``combine_there``.
        """
        if device is None:
            normals = Normals(stream, steps * self.d, self.std)
        else:
            normals = DeviceNormals(stream, steps * self.d, self.std, device)
        return [(normals, step * self.d) for step in range(steps)]

    def combine(self, clipped_sum: Tensor | np.ndarray, drawn: tuple[Normals, int]) -> np.ndarray:
        """What one hospital sends in a step: its sum (d,), clamped, noised and rounded, as int64 (d,).

        drawn  one of the pairs that ``draw`` returns
        Raises InputError for a sum of another shape.
        """
        (normals, at), clipped_sum = drawn, np.asarray(clipped_sum)
        if clipped_sum.shape != (self.d,):
            raise InputError(
                f"a sum of shape {clipped_sum.shape} was given, but must be ({self.d},): take the task's own"
            )
        message = np.empty(self.d, dtype=np.int64)
        for first in range(0, self.d, BLOCK):  # in pieces, to stay in the cache
            part = slice(first, first + BLOCK)
            x = np.multiply(clipped_sum[part], self.scale, dtype=np.float64)
            np.fmin(x, self._box, out=x)  # a NaN, too, ends in the box
            np.fmax(x, -self._box, out=x)
            y = x + normals.values[at + first : at + first + len(x)]
            whole = np.rint(y)
            message[part] = whole
            y -= whole
            np.abs(y, out=y)
            if y.max() >= self._sure:
                for i in np.flatnonzero(y >= self._sure):
                    message[first + i] = normals.nearest(at + first + int(i), float(x[i]))
        return message

    def combine_there(self, clipped_sums: Tensor, drawn: list[tuple[DeviceNormals, int]]) -> Tensor:
        """What several hospitals send in a step, int64 (K, d): ``combine`` of their sums (K, d) on a device.

        The device is waited for once, to learn which values are too near a half-integer to be rounded there.
        """
        x = (clipped_sums.double() * self.scale).nan_to_num_(self._box)  # a NaN, too, ends in the box
        x.clamp_(-self._box, self._box)
        y = x + torch.stack([normals.values[at : at + self.d] for normals, at in drawn])
        whole = y.round()
        message = whole.long()
        for k, i in ((y - whole).abs() >= self._sure).nonzero().tolist():
            normals, at = drawn[k]
            message[k, i] = normals.nearest(at + i, float(x[k, i]))
        return message

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The noisy sum, float64 (d,), that a total int64 (d,) stands for."""
        return total / self.scale

    def event(self, steps: int, colluding: int = 0) -> SampledGaussian:
        """What ``steps`` totals spend against ``colluding`` hospitals, which subtract their own shares."""
        sigma = remaining_sigma(self.noise_multiplier, self.least, colluding)
        return SampledGaussian(sigma, self.sample_rate, steps, self.failure, self.draws)
