"""``HeadTask.clipped_sums`` patient by patient, as Algorithm 1 writes it (lines 9 to 11), compiled by numba.

A batch of a few dozen patients is so small that calls into PyTorch would take most of its time; this is one call. Every
process compiles it at its first use, for the types it is given, which takes a second or two.
"""

import math

import numpy as np
from numba import njit

from dopamine_lib.privacy.dpsgd import SMALLEST


@njit(fastmath={"reassoc", "contract"}, error_model="numpy")  # sums in any order, so that they use vector registers
def add_clipped(
    w: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    offset: np.ndarray,
    norms: np.ndarray,
    index: np.ndarray,
    group: np.ndarray,
    max_grad_norm: float,
    sums: np.ndarray,
) -> None:
    """Add the clipped gradient of each patient in ``index`` to its group's row of ``sums`` (groups, d).

    w (d,): one row of p weights for each class, then the biases; features (N, p + 1), the last column ones, but
    a row of zeros where features are not finite; labels (N,); offset (classes,), added to the scores; index and
    group (B,). These floats are of one type; the ``norms`` (N,) of the features' rows are float64, and so are the
    gradients' norms. ``sums`` are of either type: what a patient adds is computed without the others, and only added.
    Raises IndexError for a patient or group that does not exist, and ValueError for a wrong length of w, sums or group.
    """
    classes, p = len(offset), features.shape[1] - 1
    if not len(w) == sums.shape[1] == classes * (p + 1) or len(group) != len(index):  # nothing here checks bounds
        raise ValueError("w, sums or group has another length")
    number = offset.dtype.type  # plain 0 and 1 would turn float32 into float64
    zero, one = number(0), number(1)
    error = np.empty_like(offset)
    for i in range(len(index)):
        patient = index[i]
        if not (0 <= patient < len(features) and 0 <= group[i] < len(sums)):
            raise IndexError("no such patient or group")
        x, total, grade = features[patient, :p], sums[group[i]], labels[patient]
        for c in range(classes):
            row, logit = w[c * p : (c + 1) * p], w[classes * p + c] + offset[c]
            for j in range(p):
                logit += row[j] * x[j]
            error[c] = logit
        highest, whole, square = error.max(), zero, 0.0
        for c in range(classes):
            error[c] = math.exp(error[c] - highest)
            whole += error[c]
        for c in range(classes):  # softmax less onehot
            error[c] = error[c] / whole - (one if c == grade else zero)
            square += np.float64(error[c]) * np.float64(error[c])
        norm = math.sqrt(square) * norms[patient]  # |(e x^T, e)| = |e| |(x, 1)|
        clip = 1.0 if norm <= max_grad_norm else max_grad_norm / norm
        for c in range(classes):
            row, clipped = total[c * p : (c + 1) * p], number(clip * error[c])
            if not abs(clipped) >= SMALLEST:  # nor is a NaN
                continue
            for j in range(p):
                row[j] += clipped * x[j]
            total[classes * p + c] += clipped * features[patient, p]
