"""ReLU and truncation in one: shares of x at a fine scale become shares of max(x, 0) >> shift at a coarse one.

    5. Where x >= 0, x >> shift is (m >> shift) + s with s = -(r >> shift), plus 2^(32 - shift) if m wrapped around,
       which for x >= 0 is the case where msb(r) = 1 and msb(m) = 0. So s depends on msb(m) only: s[0] or s[1]. From
       the crypto-provider come shares of s[1], msb(r) and rho times either; of the bits modulo 2^16 where shift allows
       it, since 2^(32 - shift) times them is all that counts. (beta ^ rho) s[msb m] is rho s[msb m], or s[msb m] less
       that; y = (m >> shift) (beta ^ rho) + (beta ^ rho) s[msb m]. No message.

Why this hides x: nothing is opened beyond the comparison, and all four are shared afresh.

The result is x / 2^shift rounded down or up, at random with the right mean. If each party truncated its own share, it
would be wrong by 2^(32 - shift) with probability |x| / 2^32. A negative x above -2^15 may come out as x >> shift
instead of 0: at most 2^(15 - shift) units. Needs |x| < 2^31 - 2^15. ``pooling`` takes maxima by the same comparison.
ReLU6 is max(x, 0) - max(x - 6, 0): two such, side by side, where 6 is the provider's secret to subtract.
"""

from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from dopamine_lib.inference.protocols import kernels
from dopamine_lib.inference.protocols.comparison import COARSE, LIMIT, Comparison
from dopamine_lib.inference.protocols.operation import PATIENT, Operation, Own, Party, Shape
from dopamine_lib.inference.protocols.sharing import encode
from dopamine_lib.inference.protocols.truncation import Shift


class ReLUOperation(Comparison):
    """max(x, 0) >> shift for ``count`` elements."""

    def __init__(self, count: int, shift: int, watched: int | None = None):
        watched = count if watched is None else watched
        self.shift, self.top = shift, "u2" if shift <= 16 else "u4"
        extra = {"extra": ("u4", 2), "tops": (self.top, 2)}
        super().__init__(count, watched, COARSE if shift >= COARSE else 0, **extra)

    @property
    def kernels(self) -> ModuleType:
        """Those in use; NumPy's for shifts that no network needs: the others are compiled for bits modulo 2^16."""
        return kernels.active() if self.top == "u2" else kernels

    def deal_extra(self, r: np.ndarray, rho: np.ndarray, patient: Own, corrections: Own) -> None:
        mine = patient.extra, patient.tops
        self.kernels.deal_relu(r, rho, self.shift, *mine, corrections.extra, corrections.tops)

    def run(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """Shares of max(x, 0) >> shift, of x's shape."""
        m, beta = self.compare(party, tag, own, x.reshape(-1))
        out = np.empty(self.padded, np.uint32)
        self.kernels.finish_relu(party.number, m, beta, own.rho, own.extra, own.tops, self.shift, out)  # step 5
        return out[: self.count].reshape(x.shape)


@dataclass(frozen=True)
class ReLU(Shift):
    """max(x, 0) >> shift."""

    input_limit = LIMIT
    torch_layers = ("ReLU",)

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        """Truncate to the bits of an activation in passing."""
        compiler.widen(name)
        compiler.clip(cls, name, compiler.value.images.relu())

    def operations(self, input_shape: Shape) -> list[Operation]:
        return [ReLUOperation(prod(input_shape), self.shift)]

    def plain(self, inputs: list[np.ndarray], weights: None) -> np.ndarray:
        return np.rint(np.maximum(inputs[0], 0) / 2**self.shift)


class ReLU6Operation(ReLUOperation):
    """(max(x, 0) - max(x - b, 0)) >> shift for an array of ``shape``; the provider's bound b (C,) is above 0."""

    def __init__(self, shape: Shape, shift: int):
        # where x is not near the end, x - b is inside
        super().__init__(2 * prod(shape), shift, watched=prod(shape))

    def run(self, party: Party, tag: int, own: Own, x: np.ndarray) -> np.ndarray:
        """Shares of the result, of x's shape (C, H, W): one comparison of twice as many elements."""
        both = np.stack([x, x])
        if party.number != PATIENT:
            both[1] -= own.bias[:, None, None]
        below, above = super().run(party, tag, own, both)
        return below - above


@dataclass(frozen=True)
class ReLU6(Shift):
    """min(max(x, 0), 6) >> shift, where 6 is another ring element in every channel: the provider's secret."""

    input_limit = LIMIT - 2**30  # x less the bound is compared as well, and the bound is below 2^30
    torch_layers = ("ReLU6",)

    @classmethod
    def from_torch(cls, compiler: Any, name: str, module: Any) -> None:
        """As a ReLU; the bound is a bias without a weight."""
        compiler.widen(name, 6)
        bound = encode((6 * compiler.value.gain).numpy(), 1)
        compiler.clip(cls, name, compiler.value.images.clamp(0, 6), weights=([], bound))

    def operations(self, input_shape: Shape) -> list[Operation]:
        return [ReLU6Operation(input_shape, self.shift)]

    def plain(self, inputs: list[np.ndarray], weights: tuple[list[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.rint(np.clip(inputs[0], 0, weights[1].astype(np.float64)[:, None, None]) / 2**self.shift)
