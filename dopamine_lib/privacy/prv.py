"""Opacus's privacy random variable (PRV) accountant within limits: an upper bound on epsilon, or none."""

import functools
import math
import warnings

import numpy as np
from scipy.fft import next_fast_len

#: The most points of a discretised loss: 0.3 GB and about a second.
MAX_POINTS = 2**20
#: The part of delta that the accountant reserves for its own error (Opacus's default), rounding included.
DELTA_ERROR = 1e-3


@functools.lru_cache(maxsize=4096)
def prv_epsilon(
    history: tuple[tuple[float, float, int], ...], delta: float, rough: float, reach: float
) -> float | None:
    """Epsilon at ``delta`` of (sigma, q, steps) composed; None where the accountant cannot keep its promise.

    rough  an upper bound on epsilon, for the size of the error that is allowed: a hundredth of it, 0.01 at most
    reach  the losses that matter: an upper bound on epsilon at delta ``DELTA_ERROR`` delta / 4, and on a single step's
           at ``DELTA_ERROR`` delta / (8 steps): Gopi, Lee, Wutschitz 2021, remark 5.6
    Gopi, Lee, Wutschitz 2021. Its error in epsilon is part of the answer. It is coarsened where the grid would pass
    ``MAX_POINTS``, up to a twentieth of ``rough``. The fast Fourier transform of the steps' losses is rounded to about
    2^-53 log2(points) at each frequency, and raised to the power of the steps: where that exceeds the part of delta
    for errors, the answer could be too small (without this, 16.524 against 16.544 at delta 1e-12 in FSCDP).

    >>> round(prv_epsilon(((1.15, 100 / 2930, 3001),), delta=1e-4, rough=10.0, reach=13.0), 2)
    8.99
    >>> prv_epsilon(((1.15, 100 / 2930, 3001),), delta=1e-12, rough=17.0, reach=20.0) is None
    True
    """
    steps = sum(times for *_, times in history)
    if rough == 0:
        return 0.0
    if steps * math.log2(MAX_POINTS) * 2.0**-53 > DELTA_ERROR * delta or not math.isfinite(rough):
        return None
    from opacus.accountants.analysis.prv import (
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,
    )

    error, delta_error = min(0.01, rough / 100), DELTA_ERROR * delta
    reach = max(reach, error) + 3
    per_mesh = math.sqrt(steps * math.log(12 / delta_error) / 2)  # the error that a step of the grid makes
    half = next_fast_len(min(math.ceil(reach * per_mesh / error) + 1, MAX_POINTS // 2))
    error = reach / (half - 1.5) * per_mesh  # so that the grid has 2 half points: a length that is quick to transform
    if not error <= min(1.0, rough / 20):
        return None
    with np.errstate(all="ignore"), warnings.catch_warnings():  # at the edges of its domain, logarithms of 0
        warnings.simplefilter("ignore")
        try:  # Opacus's PRVAccountant.get_epsilon, but for its reach, which would do all Renyi orders anew four times
            grid = Domain.create_aligned(-reach, reach, error / per_mesh)
            losses = [PoissonSubsampledGaussianPRV(q, sigma) for sigma, q, _ in history]
            cut = [discretize(TruncatedPrivacyRandomVariable(loss, grid.t_min, grid.t_max), grid) for loss in losses]
            composed = compose_heterogeneous(cut, [times for *_, times in history])
            answer = float(composed.compute_epsilon(delta, delta_error, error)[2])
        except (ArithmeticError, RuntimeError, ValueError, IndexError):  # what it raises where it finds no answer
            return None
    return max(0.0, answer) if math.isfinite(answer) else None
