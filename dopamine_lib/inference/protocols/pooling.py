"""Pooling: maxima by comparison, averages by adding.

Maximum of shared a and b:
    1 to 3. Compare x = a - b with 0 (``comparison``): opened m = x + r and beta, with [x >= 0] = beta ^ rho.
    4. max(a, b) = b + [x >= 0] x = b + [x >= 0] m - (beta ^ rho) r, where (beta ^ rho) r = beta r + (1 - 2 beta) rho r;
       a share of rho r comes from the crypto-provider. No message.
Nothing is opened beyond the comparison. Of two values less than 2^15 apart the smaller may be taken. Needs
|a - b| < 2^31 - 2^15.

A window of k x k at stride s takes (s + 1) (k - 1) comparisons per output when all rows are reduced first and then the
columns, instead of k^2 - 1; and since ReLU is increasing, max(ReLU(x)) = ReLU(max(x)), the pooling comes first and
leaves ReLU less to do.

An average is a sum of shares, exact and without a message; the division goes into the public scale.
"""

import itertools
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from dopamine_lib.errors import InputError
from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.comparison import COARSE, LIMIT, Comparison
from dopamine_lib.inference.protocols.convolution import pair
from dopamine_lib.inference.protocols.operation import Layer, Operation, Own, Party, Run, Shape

#: Rows and columns of a window whose maximum is taken; each takes a comparison.
MOST_COMPARED = 2**10
#: (begin, end) of each window along one axis.
Windows = tuple[tuple[int, int], ...]


class MaximumOperation(Comparison):
    """max(a, b) for ``count`` pairs.

    watch   it is asked whether a difference is near the ring's end
    coarse  12 or 0: bits that a and b are rounded by (``comparison``)
    """

    def __init__(self, count: int, watch: bool = True, coarse: int = 0):
        super().__init__(count, count if watch else 0, coarse, extra=("u4", 1))

    def deal_extra(self, r: np.ndarray, rho: np.ndarray, patient: Own, corrections: Own) -> None:
        kernels.active().deal_maximum(r, rho, patient.extra[0], corrections.extra[0])

    def rounded(self, party: Party, x: np.ndarray) -> np.ndarray:
        """This party's share of a value as it is compared."""
        rest = self.rest(party.number)
        return (x + rest if rest else x) & ~np.uint32(2**self.coarse - 1) if self.coarse else x

    def run(self, party: Party, tag: int, own: Own, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Shares of max(a, b); a, b (count,). Where coarse, either is rounded first, as it is compared."""
        a, b = self.rounded(party, a), self.rounded(party, b)
        difference = np.subtract(a, b, out=party.workspace.array("difference", a.shape))
        m, beta = self.compare(party, tag, own, difference)
        out = np.empty(self.count, np.uint32)
        kernels.active().finish_maximum(
            party.number, b, m, beta, own.r, own.rho, own.extra[0], self.coarse, out
        )  # step 4
        return out


@dataclass(frozen=True)
class Axis:
    """Windows of ``kernel`` every ``stride`` along one axis; the first begins ``padding`` before what is there."""

    kernel: int
    stride: int
    padding: int
    ceil: bool

    def outputs(self, length: int) -> int:
        """How many windows, as torch counts: with ``ceil`` a last one may stick out, but not begin outside.

        >>> [Axis(3, 2, 0, ceil=False).outputs(8), Axis(3, 2, 0, ceil=True).outputs(8), Axis(3, 2, 1, False).outputs(8)]
        [3, 4, 4]
        """
        if length + 2 * self.padding < self.kernel and not self.ceil:
            return 0
        rest = length + 2 * self.padding - self.kernel + (self.stride - 1 if self.ceil else 0)
        count = rest // self.stride + 1
        return count - 1 if (count - 1) * self.stride >= length + self.padding else count

    def candidates(self, length: int) -> tuple[slice | np.ndarray, list[tuple[slice, slice]]]:
        """Where one element of each window lies, and for each other place in a window which windows have it.

        Those are (windows, elements), slices: a window that sticks out lacks some.
        """
        count, others = self.outputs(length), []
        last = (count - 1) * self.stride
        first = slice(0, last + 1, self.stride)
        if last >= length:  # the last window begins before the end, but its middle lies beyond
            first = np.minimum(np.arange(count) * self.stride, length - 1)
        for at in range(max(-self.padding, -last), min(self.kernel - self.padding, length)):
            begin, end = max(0, -(at // self.stride)), min(count, (length - 1 - at) // self.stride + 1)
            if at and begin < end:
                start = at + begin * self.stride
                others.append((slice(begin, end), slice(start, at + end * self.stride, self.stride)))
        return first, others


@dataclass(frozen=True)
class MaxPool(Layer):
    """Maximum over windows of ``kernel`` every ``stride``; ``padding`` counts for nothing, ``ceil`` is as in torch."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil: bool

    torch_layers = ("MaxPool2d",)

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        compiler.check_picture(name, module)
        kernel, stride, padding = pair(module.kernel_size), pair(module.stride), pair(module.padding)
        if pair(module.dilation) != (1, 1) or module.return_indices:
            raise InputError(f"layer '{name}': MaxPool2d needs dilation=1 and no return_indices")
        compiler.widen(name)
        axes = [Axis(*options, module.ceil_mode) for options in zip(kernel, stride, padding, strict=True)]
        if min(axis.outputs(n) for axis, n in zip(axes, compiler.value.images.shape[2:], strict=True)) < 1:
            raise InputError(f"layer '{name}': its windows {kernel} do not fit what arrives; use larger images")
        options = {"kernel": kernel, "stride": stride, "padding": padding, "ceil": module.ceil_mode}
        compiler.append(cls, name, module(compiler.value.images), **options)

    def output_shape(self, *inputs: Shape) -> Shape:
        compared = sum(min(k, n) for k, n in zip(self.kernel, inputs[0][1:], strict=True))
        padded = all(0 <= 2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))
        if min(*self.kernel, *self.stride) < 1 or not padded or compared > MOST_COMPARED:
            raise InputError(
                f"layer '{self.name}': windows {self.kernel} every {self.stride} are out of bounds; sides must be "
                f"positive, both together at most {MOST_COMPARED}, and padding at most half of them"
            )
        return (inputs[0][0], *(axis.outputs(n) for axis, n in zip(self.axes, inputs[0][1:], strict=True)))

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Its windows by rows and by columns."""
        return tuple(Axis(*one, self.ceil) for one in zip(self.kernel, self.stride, self.padding, strict=True))

    def operations(self, input_shape: Shape) -> list[Operation]:
        return [MaximumOperation(n, coarse=COARSE) for n in pair_counts(input_shape, self.axes)]

    def private(self, inputs: list[np.ndarray], runs: list[Run]) -> np.ndarray:
        return max_pool(inputs[0], self.axes, runs)

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return max_pool(inputs[0], self.axes, [np.maximum] * len(pair_counts(inputs[0].shape, self.axes)))

    def room(self, inputs: list[np.ndarray], output: np.ndarray) -> float:
        # the room is for differences within a window, and no window spreads more than the whole channel
        x = inputs[0]
        return float((x.max((1, 2)) - x.min((1, 2))).max()) / LIMIT


def pair_counts(shape: Shape, axes: tuple[Axis, Axis]) -> list[int]:
    """For each comparison of a max pooling of (C, H, W): the number of pairs. Columns within a row come first."""
    channels, *lengths = shape
    counts = []
    for axis in (1, 0):
        _, others = axes[axis].candidates(lengths[axis])
        lengths[axis] = axes[axis].outputs(lengths[axis])
        counts += [channels * (windows.stop - windows.start) * lengths[1 - axis] for windows, _ in others]
    return counts


def max_pool(x: np.ndarray, axes: tuple[Axis, Axis], maxima: list) -> np.ndarray:
    """Max pooling of (C, H, W), one axis after the other.

    maxima  for each of ``pair_counts``, a function of two flat arrays (pairs,) that gives the larger of each pair
    """
    remaining = iter(maxima)
    for axis in (2, 1):
        first, others = axes[axis - 1].candidates(x.shape[axis])
        before = (slice(None),) * axis
        best = x[(*before, first)].copy()  # x itself is still to be read, by the next windows and by other layers
        for windows, elements in others:
            candidate, part = np.ascontiguousarray(x[(*before, elements)]), best[(*before, windows)]
            part[...] = next(remaining)(candidate.reshape(-1), part.reshape(-1)).reshape(part.shape)
        x = best
    return x


@dataclass(frozen=True)
class AveragePool(Layer):
    """Average over windows given by (begin, end) of their rows and columns; the division is in the scale."""

    rows: Windows
    columns: Windows

    torch_layers = ("AvgPool2d", "AdaptiveAvgPool2d")

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        from torch import stack

        compiler.check_picture(name, module)
        x = compiler.value.images
        if hasattr(module, "output_size"):
            wanted = [n or own for n, own in zip(pair(module.output_size), x.shape[2:], strict=True)]
            rows, columns = (adaptive_windows(n, m) for n, m in zip(x.shape[2:], wanted, strict=True))
        else:
            if pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override:
                raise InputError(f"layer '{name}': AvgPool2d needs padding=0, ceil_mode=False and no divisor_override")
            sizes = zip(x.shape[2:], pair(module.kernel_size), pair(module.stride), strict=True)
            rows, columns = (tuple((i, i + k) for i in range(0, n - k + 1, s)) for n, k, s in sizes)
        if all(windows == adaptive_windows(n, n) for windows, n in zip((rows, columns), x.shape[2:], strict=True)):
            return  # every window is one element
        common = window_factors(rows, columns)[0]
        compiler.narrow(name)
        value = compiler.value
        if value.peak * common > compiler.limit(compared=False):
            raise InputError(f"layer '{name}': its windows differ too much in size (common multiple {common})")
        images = stack([stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], 2) for a, b in rows], 2)
        gain, scale = value.gain * common, value.scale * common
        compiler.append(cls, name, images, gain=gain, scale=scale, rows=rows, columns=columns)

    def output_shape(self, *inputs: Shape) -> Shape:
        channels, height, width = inputs[0]
        inside = all(0 <= a < b <= n for windows, n in ((self.rows, height), (self.columns, width)) for a, b in windows)
        if not inside:
            raise InputError(f"layer '{self.name}': a window does not lie in the input's {height}x{width}")
        common_multiple(self.rows, self.columns)
        return (channels, len(self.rows), len(self.columns))

    def work(self, input_shape: Shape) -> int:
        rows, columns = (sum(b - a for a, b in windows) for windows in (self.rows, self.columns))
        return input_shape[0] * (rows * input_shape[2] + len(self.rows) * columns)

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return average_pool(inputs[0], self.rows, self.columns)


def adaptive_windows(length: int, outputs: int) -> Windows:
    """Begin and end of each window of an adaptive pooling along one axis, as torch divides it."""
    return tuple((i * length // outputs, -(-(i + 1) * length // outputs)) for i in range(outputs))


def common_multiple(rows: Windows, columns: Windows) -> int:
    """Of all windows' sizes. Raises InputError where it leaves no room in the ring, as soon as that is seen."""
    heights, widths = ({b - a for a, b in windows} for windows in (rows, columns))
    common = 1
    for size in itertools.chain(heights, widths, (height * width for height in heights for width in widths)):
        common = lcm(common, size)
        if common >= LIMIT:
            raise InputError(f"windows of these sizes have no common multiple below {LIMIT}: take equal ones")
    return common


def window_factors(rows: Windows, columns: Windows) -> tuple[int, np.ndarray]:
    """``(common, factors)``: a window's sum times its factor is its average times ``common``, an integer.

    factors uint32 (len(rows), len(columns)); all 1 where the windows have one size. Raises InputError for windows whose
    common multiple leaves no room in the ring.
    """
    common, sizes = common_multiple(rows, columns), np.outer([b - a for a, b in rows], [b - a for a, b in columns])
    return common, (common // sizes).astype(np.uint32)


def average_pool(x: np.ndarray, rows: Windows, columns: Windows) -> np.ndarray:
    """Shares of the average over each window of (C, H, W), times ``window_factors``' common multiple."""
    sums = np.stack([x[:, a:b].sum(1, dtype=x.dtype) for a, b in rows], axis=1)
    sums = np.stack([sums[:, :, a:b].sum(2, dtype=x.dtype) for a, b in columns], axis=2)
    return sums * window_factors(rows, columns)[1].astype(x.dtype)
