"""Pooling: maxima by comparison, averages by adding.

Maximum of shared a and b:
    1 to 3. Compare x = a - b with 0 (``comparison``): opened m = x + r and beta, with [x >= 0] = beta ^ rho.
    4. max(a, b) = b + [x >= 0] x = b + [x >= 0] m - (beta ^ rho) r, where (beta ^ rho) r = beta r + (1 - 2 beta) rho r;
       a share of rho r comes from the crypto-provider. No message.
Nothing is opened beyond the comparison. Of two values less than 2^15 apart the smaller may be taken. Needs
|a - b| < 2^31 - 2^15.

A window of k x k at stride s takes (s + 1) (k - 1) comparisons an output when all rows are reduced first and then the
columns, instead of k^2 - 1; and since ReLU is increasing, max(ReLU(x)) = ReLU(max(x)), the pooling comes first and
leaves ReLU less to do.

An average is a sum of shares, exact and without a message; the division goes into the public scale.
"""

import math

import numpy as np

from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.comparison import Comparison
from dopamine_lib.inference.protocols.operation import Party


class MaximumOperation(Comparison):
    """max(a, b) for ``count`` pairs."""

    def __init__(self, count: int):
        super().__init__(count, extra=1)

    def deal_extra(self, r, rho, patient, corrections) -> None:
        kernels.active().deal_maximum(r, rho, patient.extra[0], corrections.extra[0])

    def finish(self, number: int, b: np.ndarray, m: np.ndarray, beta: np.ndarray, own, out: np.ndarray) -> np.ndarray:
        """Step 4: this party's share (count,) of the maximum."""
        kernels.active().finish_maximum(number, b, m, beta, own.r, own.rho, own.extra[0], out)
        return out

    def run(self, party: Party, tag: int, a: np.ndarray, b: np.ndarray, own) -> np.ndarray:
        """Shares of max(a, b); a, b (count,)."""
        difference = np.subtract(a, b, out=party.workspace.array("difference", a.shape))
        m, beta = self.compare(party, tag, difference, own)
        return self.finish(party.number, b, m, beta, own, np.empty(self.count, np.uint32))


def pooled_length(length: int, kernel: int, stride: int, ceil: bool) -> int:
    """Outputs along one axis, as torch counts: with ``ceil`` a last window may stick out, but not begin outside."""
    if length < kernel and not ceil:
        return 0
    count = (length - kernel + (stride - 1 if ceil else 0)) // stride + 1
    return count - 1 if (count - 1) * stride >= length else count


def _along(x: np.ndarray, axis: int, part: slice) -> np.ndarray:
    return x[:, :, part] if axis == 2 else x[:, part]


def _candidates(x: np.ndarray, axis: int, kernel: int, stride: int, count: int) -> list[np.ndarray]:
    """The k-th element of every window along an axis, for k = 0 … kernel - 1: fewer where windows stick out."""
    starts = range(min(kernel, x.shape[axis]))
    return [_along(_along(x, axis, slice(k, None, stride)), axis, slice(count)) for k in starts]


def pair_counts(shape, kernel, stride, ceil: bool):
    """For each comparison of a max pooling of (C, H, W): the number of pairs. Columns within a row come first."""
    channels, *lengths = shape
    counts = []
    for axis in (1, 0):
        length, k, s = lengths[axis], kernel[axis], stride[axis]
        lengths[axis] = pooled_length(length, k, s, ceil)
        others = [len(range(i, length, s)[: lengths[axis]]) for i in range(1, min(k, length))]
        counts += [channels * n * lengths[1 - axis] for n in others]
    return counts


def max_pool(x: np.ndarray, kernel, stride, ceil: bool, maximum) -> np.ndarray:
    """Max pooling of (C, H, W), one axis after the other; ``maximum(a, b)`` takes flat arrays of equal length."""
    for axis in (2, 1):
        k, s = kernel[axis - 1], stride[axis - 1]
        first, *others = _candidates(x, axis, k, s, pooled_length(x.shape[axis], k, s, ceil))
        best = np.ascontiguousarray(first)
        for other in others:
            part = _along(best, axis, slice(other.shape[axis]))
            chosen = maximum(np.ascontiguousarray(other).reshape(-1), part.reshape(-1))
            part[...] = chosen.reshape(part.shape)
        x = best
    return x


def adaptive_windows(length: int, outputs: int) -> tuple[tuple[int, int], ...]:
    """Begin and end of each window of an adaptive pooling along one axis, as torch divides it."""
    return tuple((i * length // outputs, -(-(i + 1) * length // outputs)) for i in range(outputs))


def window_factors(rows, columns) -> tuple[int, np.ndarray]:
    """``(common, factors)``: a window's sum times its factor is its average times ``common``, an integer.

    factors uint32 (len(rows), len(columns)); all 1 where the windows have one size.
    """
    sizes = np.outer([b - a for a, b in rows], [b - a for a, b in columns])
    common = math.lcm(*sizes.ravel().tolist())
    return common, (common // sizes).astype(np.uint32)


def average_pool(x: np.ndarray, rows, columns) -> np.ndarray:
    """Shares of the average over each window of (C, H, W), times ``window_factors``' common multiple."""
    sums = np.stack([x[:, a:b].sum(1, dtype=x.dtype) for a, b in rows], axis=1)
    sums = np.stack([sums[:, :, a:b].sum(2, dtype=x.dtype) for a, b in columns], axis=2)
    return sums * window_factors(rows, columns)[1].astype(x.dtype)
