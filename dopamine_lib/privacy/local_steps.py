"""Several local steps under one round's noise, for a linear model: what they are, and why one sum's noise is enough.

A hospital takes the model W (classes, p + 1) of a round and draws E samples, each patient into each with probability q.
It goes through the samples patient by patient, in a random order: W <- G_i(W) = W - eta grad l_i(W), with the
cross-entropy l_i of softmax(W x_i) and eta the learning rate over q N_k. It sends the sum of these gradients, which is
(W before - W after) / eta, with a share of noise of sigma C. What may one patient v change?

    rows   x_i = (features, 1) is shortened to length R = C / sqrt(2). So |grad l_i| = |e_i| |x_i| <= C, since the error
           e_i = softmax - onehot has norm sqrt(2) at most. Nothing is clipped on the way: clipped gradients are not
           those of a convex loss
    G_i    l_i is convex, and its Hessian (diag(p) - p p^T) x x^T is at most beta = R^2 / 2 (of v^T (diag(p) - p p^T) v,
           the variance of v under p: at most (max - min)^2 / 4 <= |v|^2 / 2). So for eta <= 2 / beta = 8 / C^2 no G_i
           takes two models further apart: |G_i(V) - G_i(W)| <= |V - W| (Hardt, Recht, Singer 2016, lemma 3.7)
    j      Let v be in j of the E samples. Without v the same maps are taken in the same order, less these j. Each of
           them moves the model by eta C at most, and the maps after it take the two models no further apart: so the two
           end within j eta C, and the sums that are sent differ by j C at most (Wu et al. 2017, lemma 5, for passes)
    noise  j is Binomial(E, q), and what others draw does not depend on v. So the total is a mixture of Gaussians, and
           ``mixture`` says what dominates it: ``accounting.SampledGaussian`` with ``draws`` = E

However large a sample is: no bound on it is needed. A hospital's momentum would be needed to be bounded, and there is
none; the server's acts on what is released. A constant that is added to the scores (``balanced``) changes nothing here.

The sums are computed in float64. A map rounds to within 2^-48 (|W| + 1), and the maps after it do not enlarge that. A
sum is 1 / eta times as much, so for 10^5 maps it stays below a half of ``float_sums``' slack where |W| <= ``MOST`` and
|W| < 10^6 C eta.

The naive way is to clip every gradient, add a share of noise in every local step, and account for E steps of the full
noise. It is none: later steps read the earlier ones before the others' noise is on them (``planted_faults``).
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dopamine_lib.errors import InputError
from dopamine_lib.privacy.dpsgd import shorten_rows

#: The largest norm of a model that is stepped from: rounding grows with it.
MOST = 1e4


def longest_step(max_grad_norm: float) -> float:
    """The largest eta at which no patient's step takes two models further apart: 8 / C^2.

    >>> longest_step(2.0)
    2.0
    """
    return 8 / max_grad_norm**2


def local_sum(
    matrix: Tensor,
    rows: Tensor,
    labels: Tensor,
    offset: Tensor,
    samples: Sequence[Tensor],
    max_grad_norm: float,
    eta: float,
) -> Tensor:
    """The sum float64 (classes, p + 1) of all gradients on the way through ``samples``, from a model of that shape.

    rows (N, p + 1) are shortened; labels int64 (N,); offset (classes,) added to the scores; samples int64 (B,) each,
    one for each local step; eta of one patient's step. Raises InputError for a step that is too long, and for a model
    that is too large: neither depends on a patient.

    >>> rows, labels = torch.tensor([[1.0, 1.0]]), torch.tensor([0])
    >>> twice = [torch.tensor([0]), torch.tensor([0])]
    >>> local_sum(torch.zeros(2, 2), rows, labels, torch.zeros(2), twice, max_grad_norm=2.0, eta=1.0)
    tensor([[-0.6192, -0.6192],
            [ 0.6192,  0.6192]], dtype=torch.float64)
    """
    if not eta <= longest_step(max_grad_norm):
        raise InputError(f"eta is {eta}, but must not exceed {longest_step(max_grad_norm):.4g}: take a smaller one")
    most = min(MOST, 1e6 * max_grad_norm * eta)
    if not matrix.norm() <= most:
        raise InputError(f"the model's norm is {matrix.norm():.3g}, but at most {most:.3g}: take another learning rate")
    index = torch.cat(list(samples))
    needed = rows[index].double()
    needed = shorten_rows(needed, needed.norm(dim=1), max_grad_norm / math.sqrt(2))
    start = matrix.double().numpy()
    end = start.copy()
    _compiled()(end, needed.numpy(), labels[index].numpy(), offset.double().numpy(), eta)
    return torch.from_numpy((start - end) / eta)


def go_through(matrix: np.ndarray, rows: np.ndarray, labels: np.ndarray, offset: np.ndarray, eta: float) -> None:
    """Step ``matrix`` (classes, p + 1) in place, for each patient: rows (B, p + 1), labels (B,), offset (classes,)."""
    for i in range(len(rows)):
        scores = matrix @ rows[i] + offset
        error = np.exp(scores - scores.max())
        error /= error.sum()
        error[labels[i]] -= 1.0
        for c in range(len(error)):
            matrix[c] -= eta * error[c] * rows[i]


@functools.cache
def _compiled() -> Callable[..., None]:
    """``go_through``, compiled where numba is there."""
    try:
        from numba import njit
    except ImportError:
        return go_through
    return njit(go_through)
