"""Output perturbation: solve a convex problem once, add noise to the answer once (Chaudhuri et al. 2011, algorithm 1).

Another way to a private head. Multinomial logistic regression on features x of norm at most R (with the bias' 1),

    J(W) = sum over patients of loss(W; x, y)  +  L / 2 |W|^2,

has one minimiser; the loss of a patient with several images is their mean. How far can one patient move it? Let
J' = J + loss_z have the minimiser W' and J have W. The gradient of J' at W' is zero, so J's there is minus the new
patient's: |grad J(W')| = |grad loss_z(W')| <= G. J is L-strongly convex and grad J(W) = 0, so
L |W - W'| <= |grad J(W') - grad J(W)| <= G: the minimiser moves by at most G / L. A patient's gradient is e (x, 1)^T
with the error e = softmax - onehot, whose norm is below sqrt(2), or a mean of such; so
G = sqrt(2) R and the sensitivity is

    sqrt(2) R / L,    plus  2 t / L  for answers that are only exact to a gradient of norm t.

(The solver's W~ with |grad J(W~)| <= t lies within t / L of W.) Noise is Gaussian, calibrated exactly
(``gaussian.analytic_sigma``). The bound is central: the party that solves holds the data. With hospitals, each solves
for its own patients at L N_k / N, and the mean weighted by N_k / N is released: a patient moves its hospital's
answer by sqrt(2) R / (L N_k / N) and the mean by N_k / N of that, sqrt(2) R / L again, so K shares of noise under
secure aggregation give that bound for one message, against the server and outsiders alike; a curious hospital
subtracts its own share, and the others' patients have sqrt((K - 1) / K) of the noise left against it. N_k is
the declared size, public and fixed, as in training: whoever comes or goes, the weights stay.

What a hospital sends is on a public grid (``rounded_gaussian``), in a box far larger than answers are: L / 2 |W|^2 <=
J(W) <= J(0) = N ln(classes).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from dopamine_lib.errors import InputError, check_within
from dopamine_lib.privacy.gaussian import analytic_sigma
from dopamine_lib.privacy.randomness import Randomness
from dopamine_lib.privacy.rounded_gaussian import RoundedGaussian

#: Largest total, in units of the grid: nothing is encrypted here, so that there is room. Largest value of an answer, in
#: sensitivities.
TOTAL_RANGE, BOX = 2**53, 10**6
#: The solver stops at a gradient of this norm; one patient's gradient has norm up to sqrt(2) R.
TOLERANCE = 1e-3


def sensitivity(regularisation: float, radius: float) -> float:
    """sqrt(2) R / L plus the solver's error: how far one patient can move the answer (proof above).

    Raises InputError for arguments that are not positive.

    >>> round(sensitivity(regularisation=10.0, radius=1.0), 3)
    0.142
    """
    check_within("regularisation", regularisation, 0, 1e9, "without it one patient moves the answer without bound")
    check_within("radius", radius, 0, 1e6, "clip the features to it")
    return (math.sqrt(2) * radius + 2 * TOLERANCE) / regularisation


def clip_rows(features: np.ndarray, radius: float) -> np.ndarray:
    """Features (N, p) with a 1 for the bias, each row scaled down to norm ``radius``: float64 (N, p + 1).

    A row that is not finite becomes zeros, so that nobody's record decides whether there is an answer.

    >>> clip_rows(np.array([[2.0, 2.0]]), radius=1.5)  # the norm was 3
    array([[1. , 1. , 0.5]])
    """
    rows = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
    rows[~np.isfinite(rows).all(axis=1)] = 0
    return rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True) / radius)


def solve(
    rows: np.ndarray, labels: np.ndarray, classes: int, regularisation: float, shares: np.ndarray | None = None
) -> np.ndarray:
    """The minimiser (classes, p + 1) of J, to a gradient of norm ``TOLERANCE``, by L-BFGS.

    rows float64 (N, p + 1), labels int (N,), shares (N,): a row's part in its patient's loss, by default all of it.
    Where L-BFGS stops earlier, gradient descent goes on, which gets there whatever the patients: no failure tells of
    them.
    """
    onehot = np.eye(classes)[labels]
    shares = np.ones(len(rows)) if shares is None else shares

    def objective(flat):
        weights = flat.reshape(classes, -1)
        logits = rows @ weights.T
        logits -= logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(1))
        loss = shares @ (log_sum - (logits * onehot).sum(1)) + regularisation / 2 * (flat @ flat)
        error = shares[:, None] * (np.exp(logits - log_sum[:, None]) - onehot)
        return loss, (error.T @ rows + regularisation * weights).ravel()

    width = classes * rows.shape[1]
    # with every coordinate of the gradient at most t / sqrt(d), its norm is at most t
    options = {"gtol": TOLERANCE / math.sqrt(width), "ftol": 0.0, "maxiter": 10_000, "maxfun": 20_000, "maxcor": 20}
    found = minimize(objective, np.zeros(width), jac=True, method="L-BFGS-B", options=options)
    answer, curvature = found.x, shares @ np.square(rows).sum(1) / 2 + regularisation  # no second derivative is larger
    while np.linalg.norm(gradient := objective(answer)[1]) > TOLERANCE:
        answer = answer - gradient / curvature
    return answer.reshape(classes, -1)


def person_shares(person: np.ndarray | None, own: np.ndarray) -> np.ndarray | None:
    """1 over the number of images at ``own`` (n,) that are the same person's: float (n,); None without ``person``.

    >>> person_shares(np.array([4, 4, 7]), np.array([0, 1, 2]))
    array([0.5, 0.5, 1. ])
    """
    if person is None:
        return None
    _, whose, images = np.unique(person[own], return_inverse=True, return_counts=True)
    return 1 / images[whose]


@dataclass(frozen=True)
class Perturbed:
    """A released head, whose logits are ``rows @ weights.T``; ``noise`` is each weight's standard deviation."""

    weights: Tensor
    noise: float
    sensitivity: float


def output_perturbation(
    features: np.ndarray,
    labels: np.ndarray,
    hospitals: list[np.ndarray],
    *,
    classes: int,
    regularisation: float,
    radius: float,
    epsilon: float | None,
    delta: float,
    randomness: Randomness,
    sizes: Sequence[int] | None = None,
    before: float | None = None,
    person: np.ndarray | None = None,
    run: int = 0,
) -> Perturbed:
    """Solve at every hospital, average, perturb: (epsilon, delta) for one patient added or removed.

    features (N, p), labels (N,)  of all images
    hospitals       the training indices of each hospital; one array for a trusted curator
    regularisation  L for all patients together
    epsilon         None for the answer without noise
    sizes           declared patients of each hospital; None where all are equal
    before          noise multiplier of an earlier Gaussian release that counts as well, e.g. of the mean features:
                    Gaussians compose exactly, 1 / sigma^2 adds up (Dong, Roth, Su 2022, corollary 3.3)
    person          (N,) who each image belongs to; by default everybody has one
    Raises InputError for arguments out of bounds, or if ``before`` alone spends epsilon.
    """
    moves, sizes = sensitivity(regularisation, radius), sizes or [1] * len(hospitals)
    answers = []
    for own, declared in zip(hospitals, sizes, strict=True):
        share = declared / sum(sizes)
        rows, shares = clip_rows(features[own], radius), person_shares(person, own)
        answers.append(share * solve(rows, labels[own], classes, share * regularisation, shares))
    if epsilon is None:
        return Perturbed(torch.from_numpy(sum(answers)).float(), 0.0, moves)
    left = analytic_sigma(epsilon, delta) ** -2 - (0 if before is None else before**-2)
    if left <= 0:
        raise InputError(
            f"epsilon is {epsilon}, but the earlier release with noise {before:g} spends it all: raise one of them"
        )
    sigma, shape = 1 / math.sqrt(left), answers[0].shape
    terms = {"total_range": TOTAL_RANGE, "sample_rate": 1.0, "patients": BOX, "box": BOX}
    noise = RoundedGaussian(sigma, moves, len(hospitals), answers[0].size, **terms)
    total = np.zeros(answers[0].size, np.int64)
    for number, answer in enumerate(answers):
        drawn = noise.draw(randomness.stream("output perturbation", run, number))[0]
        total += noise.combine(answer.ravel(), drawn)
    return Perturbed(torch.from_numpy(noise.decode(total).reshape(shape)).float(), sigma * moves, moves)
