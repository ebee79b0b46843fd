"""Algorithm 1 of the paper on one page: NumPy, plain arrays, a line of the paper beside each line of code.

    K hospitals, N patients in all     w_G (d,)   the global model       q   sampling probability
    sigma   noise multiplier           C          clipping norm          eta, beta   learning rate, momentum

What the hospitals minimise together is their patients' mean loss (Eq. 2; Eq. 3 where hospitals have one size). A round
is three verbs: each hospital *contributes* (lines 7 to 13), somebody *totals* (21), and all *step* (13 to 15, 21).

Where the paper's text needs correcting, the code is sound, and "row" names the row of the register (chapter 0):
    row 1    each hospital's noise gets the variance sigma^2 C^2 / K, not line 13's, so that K shares make up sigma C
             (Lemma 1). Sums are sent as integers, multiples of 1 / s, for a floating-point sum tells what was added
    row 2    the sum is divided by the public expected batch q N, not by a number that tells who was sampled
    row 3    an empty batch is noised like any other
    row 17   line 15 steps from the global model, which line 7 has just handed out
    row 19   hospitals send the noisy sum; momentum and learning rate act once, on the total. Both are linear, so the
             model is that of lines 14, 15 and 21, but a message depends on one round's samples alone

Everything fast is tested against this page: ``training.Training`` runs the same rounds in one process or over MPI,
with sums in the clear, under BFV (Eqs. 4 to 6) or behind masks.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np


def softmax_gradient(w: np.ndarray, x: np.ndarray, y: int) -> np.ndarray:
    """Line 10 for a linear classifier: the gradient (d,) of the cross-entropy of softmax(W x + b) at x (p,), class y.

    w (d,) holds W row by row, then b: d = classes (p + 1).

    >>> softmax_gradient(np.zeros(4), np.array([3.0]), 1)  # p = 1, two classes: W, then b
    array([ 1.5, -1.5,  0.5, -0.5])
    """
    classes = len(w) // (len(x) + 1)
    scores = w[:-classes].reshape(classes, -1) @ x + w[-classes:]
    error = np.exp(scores - scores.max())
    error /= error.sum()
    error[y] -= 1
    return np.append(np.outer(error, x), error)


def clip(gradient: np.ndarray, C: float) -> np.ndarray:
    """Line 11: a gradient (d,) shortened to length C if it is longer.

    >>> clip(np.array([3.0, 4.0]), 1.0)
    array([0.6, 0.8])
    """
    return gradient / max(1.0, float(np.linalg.norm(gradient)) / C)


def contribute(
    w: np.ndarray,
    batch: Sequence[int],
    gradient: Callable[[np.ndarray, int], np.ndarray],
    C: float,
    noised: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Lines 7 to 13 at one hospital: its sampled patients' clipped gradients' sum (d,), sent as ``noised`` says."""
    total = np.zeros_like(w)  # w is w_k, the global model (line 7)
    for i in batch:  # line 9
        g = gradient(w, i)  # line 10
        total += clip(g, C)  # line 11
    return noised(total)  # line 13; also where the batch is empty (row 3)


def total(messages: Sequence[np.ndarray]) -> np.ndarray:
    """Line 21's SecureAggregation: the sum (d,) of the messages, which is all that anybody sees of them."""
    return np.sum(messages, axis=0)


def step(
    w: np.ndarray, velocity: np.ndarray, total: np.ndarray, batch: float, eta: float, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lines 13 to 15 and 21 on the total (d,), decoded: the next model and momentum; ``batch`` is q N."""
    average = total / batch  # line 13's 1 / |D|, as a public constant (row 2)
    velocity = average + beta * velocity  # line 14
    return w - eta * velocity, velocity  # lines 15 and 21 (rows 17 and 19)


def train(
    w: np.ndarray,
    hospitals: Sequence[np.ndarray],
    gradient: Callable[[np.ndarray, int], np.ndarray],
    *,
    q: float,
    sigma: float,
    C: float,
    eta: float,
    beta: float,
    T: int,
    spent: Callable[[int], float] = lambda steps: 0.0,
    most: float = math.inf,
    sample: Callable[[int, int], Sequence[int]] | None = None,
    noised: Callable[[int, int, np.ndarray], np.ndarray] | None = None,
    s: float | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, int]:
    """Algorithm 1 from w (d,) (line 3): the final w_G and the number of rounds taken.

    hospitals    each hospital's patients, as indices that ``gradient(w, i)`` understands
    spent, most  epsilon after a number of steps (line 17), and the epsilon that must not be exceeded (line 18)
    sample       a hospital's batch in a round, called with (k, t); drawn from ``rng`` by default
    noised       what it sends for its sum (d,), called with (k, t, sum): integers (d,), multiples of 1 / s; by default
                 with noise from ``rng``
    s            units in 1.0; by default a hospital's noise has a standard deviation of 64 units
    rng          a simulation's generator: here nobody is protected
    """
    K, N = len(hospitals), sum(map(len, hospitals))
    rng = rng or np.random.default_rng()
    sample = sample or (lambda k, t: hospitals[k][rng.random(len(hospitals[k])) < q])
    share = sigma * C / math.sqrt(K) if sigma else 0.0  # row 1
    s = s or (64 / share if share else 2.0**30)
    noised = noised or (lambda k, t, total: np.rint(s * total + rng.normal(0, s * share, len(w))).astype(np.int64))
    velocity = np.zeros_like(w)
    for t in range(T):  # line 5
        if spent(t + 1) > most:  # lines 17 and 18, before the noise of this round is drawn
            return w, t  # line 19
        messages = [contribute(w, sample(k, t), gradient, C, partial(noised, k, t)) for k in range(K)]  # lines 6 to 16
        w, velocity = step(w, velocity, total(messages) / s, q * N, eta, beta)
    return w, T
